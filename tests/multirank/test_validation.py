"""Validation in real runs: right numbers, an untouched training, the best student, exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairs import write_pair
from runs import write_recipe, write_shards
from safetensors.torch import load_file

from ldistill.checkpoint import folder as checkpoint_folder
from ldistill.checkpoint.logs import read_metrics
from ldistill.data.held_out import held_out, parse_share
from ldistill.data.index import ShardIndex
from ldistill.data.loader import make_loader
from ldistill.data.order import Order
from ldistill.models.formats import load_processor, load_student
from ldistill.train import main
from ldistill.training.callbacks import read_samples

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pair with dropout, shards, and ``run``: six steps, validated after each, best by CE."""
    root = tmp_path_factory.mktemp("validation")
    write_pair(root / "pair", lm_dropout=0.1)
    write_shards(root / "shards", root / "pair", count=30)
    write_shards(root / "others", root / "pair", count=7)
    fields = {"save_steps": 3, "save_total_limit": 1, "log_samples": True, "max_steps": STEPS}
    fields |= {"validation": "25%", "eval_steps": 1, "health_steps": 0}
    write_recipe(root / "recipe.yaml", root / "pair", root / "shards", **fields)
    # The worst is looked for, since the first is: its checkpoint is older than all that are kept.
    best = ("--load_best_model_at_end", "true", "--metric_for_best_model", "ce")
    assert main(argv(root, root / "run", *best, "--greater_is_better", "true")) == 0
    return root


def argv(world: Path, run: Path, *more: str) -> list[str]:
    return ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(run), *more]


def held_keys(world: Path) -> set[str]:
    index = ShardIndex.load(world / "shards")
    mask = held_out(index, parse_share("25%"))
    return {index.locate(sample)[2] for sample in mask.nonzero()[0]}


def evaluations(run: Path) -> list[dict[str, float]]:
    return [r for r in read_metrics(run / "metrics.jsonl") if "eval_ce" in r]


def test_cross_entropy_is_that_of_the_held_out_documents_one_by_one(world):
    """Against log-softmax over single documents, with the weights of a checkpoint."""
    index = ShardIndex.load(world / "shards", ["vqav2", "docvqa"])
    order = Order(index, limit=96, packing=False, chosen=held_out(index, parse_share("25%")))
    [checkpoint] = [f for f in checkpoint_folder.survey(world / "run") if f.step == STEPS]
    student = load_student(checkpoint.path / "student").double().eval()
    processor = load_processor(checkpoint.path / "student")
    sums: dict[int, list[float]] = {0: [], 1: []}
    loader = make_loader(
        index, processor, limit=96, batch_size=1, packing=False, order=order,
        stop_pack=len(order.epoch(0)),
    )  # fmt: skip
    with torch.no_grad():
        for batch in loader:
            pixels = {k: v.double() for k, v in batch["pictures"].items()}
            logits = student.lm_head(student(batch["input_ids"], batch["position_ids"], pixels))
            ce = F.cross_entropy(logits[0], batch["labels"][0], reduction="none")
            sums[int(batch["doc_source"])] += ce[batch["labels"][0] != -100].tolist()
    found = evaluations(world / "run")[-1]
    everything = torch.tensor(sums[0] + sums[1]).mean().item()
    assert found["eval_rows"] == len(sums[0]) + len(sums[1])
    assert found["eval_ce"] == pytest.approx(everything, rel=1e-5)
    for number, source in enumerate(("vqav2", "docvqa")):
        mean = torch.tensor(sums[number]).mean().item()
        assert found[f"eval_source/{source}/ce"] == pytest.approx(mean, rel=1e-5)
    assert found["eval_kd"] == found["eval_language/kd"] > 0
    assert "eval_document/kd" not in found


def test_what_is_held_out_is_never_trained_on(world):
    held = held_keys(world)
    trained = {key for packs in read_samples(world / "run").values() for p in packs for key in p}
    assert 8 < len(held) < 25
    assert not held & trained


def test_a_run_that_is_validated_is_the_run_that_is_not(world, tmp_path):
    """Dropout on: bit-identical losses, weights and saved states."""
    assert main(argv(world, tmp_path / "run", "--eval_steps", "100")) == 0
    quiet, loud = tmp_path / "run", world / "run"
    losses = [
        [r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
        for run in (quiet, loud)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    assert [r["step"] for r in evaluations(quiet)] == [STEPS], "the last state, in any case"
    assert [r["step"] for r in evaluations(loud)] == list(range(1, STEPS + 1))
    names = ("student/model.safetensors", "rng_state.pth")
    for name in names:
        here, there = (run / f"checkpoint-{STEPS}" / name for run in (quiet, loud))
        assert here.read_bytes() == there.read_bytes(), name


def test_the_best_is_kept_and_exported(world):
    values = {r["step"]: r["eval_ce"] for r in evaluations(world / "run")}
    best = max(values, key=values.get)
    assert best < STEPS, values
    kept = [found.step for found in checkpoint_folder.survey(world / "run")]
    assert kept == [STEPS, best], "one by --save_total_limit, and the best"
    result, chosen, last = (
        (world / "run" / name / "model.safetensors").read_bytes()
        for name in ("student", f"checkpoint-{best}/student", f"checkpoint-{STEPS}/student")
    )
    assert result == chosen != last


def test_a_resumed_run_evaluates_and_chooses_as_one_that_went_through(world, tmp_path):
    """Cut back to the checkpoint before the end: the same records, checkpoints and result."""
    best = ("--load_best_model_at_end", "true", "--metric_for_best_model", "language/ce")
    flags = (*best, "--save_total_limit", "9")
    assert main(argv(world, tmp_path / "whole", *flags)) == 0
    cut = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
    for found in checkpoint_folder.survey(cut):
        if found.step > 3:
            shutil.rmtree(found.path)
    shutil.rmtree(cut / "student")
    assert main(argv(world, cut, *flags, "--resume_from_checkpoint", "auto")) == 0
    whole = tmp_path / "whole"
    assert evaluations(cut) == evaluations(whole)
    assert [f.step for f in checkpoint_folder.survey(cut)] == [
        f.step for f in checkpoint_folder.survey(whole)
    ]
    one, other = (load_file(run / "student" / "model.safetensors") for run in (cut, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_shards_of_their_own(capsys, world, tmp_path):
    """All that they have of the run's sources is read; nothing is held out of the training."""
    text = (world / "recipe.yaml").read_text().replace("validation: 25%\n", "")
    (tmp_path / "recipe.yaml").write_text(text)
    flags = ["--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    flags += ["--eval_shards", str(world / "others"), "--sources", "docvqa", "--max_steps", "2"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "validation leaves out vqav2" in said
    assert "validation every 1 steps: 7 of 7 samples" in said
    assert "30 of 30 samples" in said
    curves = tmp_path / "run" / "loss_curves.png"
    assert curves.read_bytes()[:4] == b"\x89PNG"
    found = evaluations(tmp_path / "run")[-1]
    assert found["eval_rows"] == found["eval_source/docvqa/rows"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--validation", "0"), "write a share of the documents"),
        (("--validation", "0.0001%"), "documents is none: choose a larger share"),
        (("--eval_shards", "x"), "both say what to validate on: choose one"),
        (("--metric_for_best_model", "eval_c"), "metric_for_best_model 'c' is not evaluated. "),
        (("--metric_for_best_model", "document/kd"), "'document/kd' is not evaluated"),
        (("--save_strategy", "no"), "leave out --save_strategy no"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(capsys, world, tmp_path, flags, message):
    best = ("--load_best_model_at_end", "true")
    assert main(argv(world, tmp_path / "run", *best, *flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
