"""Whole runs: contracts 4, 7, 8, 9, 10 on real DeepSpeed and gloo ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pairs import write_pair
from runs import launch, losses, write_recipe, write_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldistill.checkpoint.logs import read_metrics

# Plain gradient descent: after it, equal weights mean equal gradients at every step.
SGD = ("--optim", "sgd", "--lr_scheduler_type", "constant", "--learning_rate", "1e-2")
# fp32 sums in another order; measured differences are below 1e-6.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_pair(root / "pair")
    write_shards(root / "shards", root / "pair")
    write_shards(root / "held", root / "pair", count=7)
    write_recipe(root / "recipe.yaml", root / "pair", root / "shards")
    return root


def train(world: Path, name: str, *args: str, **kwargs) -> Path:
    folder = world / name
    recipe = str(world / "recipe.yaml")
    args = tuple(str(world / "held") if arg == "HELD" else arg for arg in args)
    launch("--recipe", recipe, "--output_dir", str(folder), *args, **kwargs)
    return folder


@pytest.fixture(scope="module")
def reference(world) -> Path:
    """One rank, the global batch in one micro-batch, no DeepSpeed."""
    return train(world, "reference", "--per_device_train_batch_size", "4", *SGD)


@pytest.fixture(scope="module")
def validated(world) -> list[dict[str, float]]:
    """Validation of the reference after steps 2 and 4."""
    args = ("--per_device_train_batch_size", "4", *VALIDATED, "--per_device_eval_batch_size", "1")
    return evaluations(train(world, "validated", *args, *SGD))


def evaluations(folder: Path) -> list[dict[str, float]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "eval_ce" in r]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


# Packs that 2 ranks of 3 rows a pass do not divide.
VALIDATED = ("--eval_shards", "HELD", "--eval_steps", "2", "--per_device_eval_batch_size", "3")
CUTS = {
    "accumulation 4": {"args": ("--per_device_train_batch_size", "1")},
    "DDP, 2 ranks": {"args": (), "ranks": 2},
    "ZeRO-1, inference engine": {
        "args": ("--per_device_train_batch_size", "4", "--teacher_engine", "deepspeed-inference"),
        "config": "zero1",
    },
    "ZeRO-2, 2 ranks": {"args": VALIDATED, "ranks": 2, "config": "zero2"},
    "ZeRO-3, 2 ranks, sharded teacher, accumulation 2": {
        "args": ("--per_device_train_batch_size", "1", *VALIDATED),
        "ranks": 2,
        "config": "zero3",
    },
    "ZeRO-3, 2 ranks, replicated teacher": {
        "args": ("--teacher_engine", "replicated", *VALIDATED),
        "ranks": 2,
        "config": "zero3",
    },
}


@pytest.mark.parametrize("cut", CUTS)
def test_cut_invariance_and_export(world, reference, validated, cut):
    """Contracts 4 and 7: losses, gradients and the exported student don't depend on the cut.

    Nor does validation, which some of the runs have, and which changes nothing in them.
    """
    options = dict(CUTS[cut])
    folder = train(world, cut.replace(" ", "_"), *options.pop("args"), *SGD, **options)
    assert losses(folder) == pytest.approx(losses(reference), abs=LOSS_TOLERANCE)
    own, records = (
        [r for r in read_metrics(f / "metrics.jsonl") if "loss" in r] for f in (folder, reference)
    )
    norms = [[r["grad_norm"] for r in found] for found in (own, records)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    base, expected, got = (weights(f) for f in (world / "pair", reference, folder))
    moved = 0
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() < WEIGHT_TOLERANCE, name
        moved += not torch.equal(tensor, base[name])
    assert moved > 20
    assert [r["teacher_rows"] for r in own] == [r["teacher_rows"] for r in records]
    if found := evaluations(folder):
        assert [r["step"] for r in found] == [2, 4]
        for here, there in zip(found, validated, strict=True):
            # The mass beyond the LM's vocabulary is known only where a pass has a teacher.
            told = {k: v for k, v in there.items() if "extra_vocabulary" not in k}
            assert {k: here[k] for k in told} == pytest.approx(told, rel=1e-4)
    assert bool(found) == ("--eval_shards" in CUTS[cut]["args"])


def test_accumulation_reaches_an_offloaded_optimizer(world):
    """It reduces gradients by its own count of micro-batches, which DeepSpeed is told."""
    options = ("--per_device_train_batch_size", "1", "--max_steps", "3")
    found = {}
    for config in ("zero2", "zero2_offload"):
        folder = train(world, f"accumulated_{config}", *options, config=config)
        found[config] = [
            (r["loss"], r["grad_norm"]) for r in read_metrics(folder / "metrics.jsonl")
        ]
    for here, there in zip(*found.values(), strict=True):
        assert here == pytest.approx(there, rel=1e-3)


@pytest.mark.parametrize(
    "args", [("--kv_grad", "detached"), ("--kv_grad", "through"), ("--attention", "eager")]
)
def test_autocast_without_deepspeed(world, reference, args):
    """bf16 by autocast: weights in fp32, K and V of the student in bf16 for both models."""
    options = ("--per_device_train_batch_size", "2", "--bf16", "true", *SGD)
    folder = train(world, f"autocast_{'_'.join(args)}", *options, *args, ranks=2)
    found = read_metrics(folder / "metrics.jsonl")
    assert all(r["teacher_rows"] > 0 for r in found)
    if args != ("--kv_grad", "through"):
        assert [r["loss"] for r in found] == pytest.approx(losses(reference), rel=0.02)
    assert next(iter(weights(folder).values())).dtype == torch.float32


def test_export_is_the_checkpoint_it_came_from(world, reference):
    """Contracts 7 and 10: keys, dtypes, configuration bytes; vision untouched; no teacher."""
    base, got = weights(world / "pair"), weights(reference)
    assert list(got) == list(base)
    assert all(got[k].dtype == base[k].dtype and got[k].shape == base[k].shape for k in base)
    config = [(f / "student" / "config.json").read_bytes() for f in (world / "pair", reference)]
    assert config[0] == config[1]
    frozen = [k for k in base if k.startswith("vision_encoder") or "rotary" in k]
    assert all(torch.equal(got[k], base[k]) for k in frozen)
    assert {p.name for p in (reference / "student").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",  # the model card
    }


@pytest.mark.parametrize("engine", ["ZeRO-2, 2 ranks, bf16", "DDP, 2 ranks, then 1"])
def test_resume_continues_exactly(world, engine):
    """Contract 8: stopped after a step and resumed, a run is the run that was never stopped."""
    first, second = {"ranks": 2}, {"ranks": 2}
    extra: tuple[str, ...] = ("--save_steps", "3", "--max_steps", "6")
    if "ZeRO" in engine:
        first["config"] = second["config"] = "zero2"
        extra += ("--bf16", "true")
    else:
        second = {"ranks": 1, }  # fmt: skip
    whole = train(world, f"whole_{first.get('config')}", *extra, **first)
    # The scheduler must see the same horizon, so the run is cut by hand: forget its second half.
    cut = world / f"cut_{first.get('config')}"
    train(world, cut.name, *extra, **first)
    for name in ("checkpoint-6", "student"):
        _remove(cut / name)
    _remove(cut / "loss_curves.png")
    batch = () if second["ranks"] == 2 else ("--per_device_train_batch_size", "2")
    train(world, cut.name, *extra, *batch, "--resume_from_checkpoint", "true", **second)
    steps = [r["step"] for r in read_metrics(cut / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    same_ranks = first["ranks"] == second["ranks"]
    tolerance = 0.0 if same_ranks else LOSS_TOLERANCE
    assert losses(cut) == pytest.approx(losses(whole), abs=tolerance)
    for name, tensor in weights(whole).items():
        assert (weights(cut)[name] - tensor).abs().max() <= (0 if same_ranks else 1e-4), name
    for key in ("documents", "tokens", "teacher_rows"):
        counted = [[r[key] for r in read_metrics(f / "metrics.jsonl")] for f in (cut, whole)]
        assert counted[0] == counted[1], key


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_metrics_are_by_source_and_category(reference):
    records = read_metrics(reference / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    for record in records:
        rows = {s: record[f"source/{s}/loss"] for s in ("vqav2", "docvqa")}
        assert record["language/loss"] == rows["vqav2"]
        assert record["document/ce"] == record["source/docvqa/ce"]
        assert "source/docvqa/kd" not in record
        assert record["teacher_rows"] > 0
        assert 0 < record["mfu"] < 1
        assert 0.5 < record["packing_efficiency"] <= 1
        a, tau = 0.7, 4.0
        language = (1 - a) * record["language/ce"] + a * tau**2 * record["language/kd"]
        assert record["language/loss"] == pytest.approx(language, rel=1e-5)
    assert "teacher_alone_label_accuracy" in records[0]
    assert "teacher_alone_label_accuracy" not in records[1]
    picture = (reference / "loss_curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"


def test_run_folder_says_what_was_run(reference):
    order = json.loads((reference / "order.json").read_text())
    assert order["documents"] + sum(order["drops"].values()) == order["samples"] == 80
    recipe = (reference / "recipe.yaml").read_text()
    assert "temperature: 4.0" in recipe
    assert "optim: sgd" in recipe
    environment = json.loads((reference / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]


def test_exploding_weights_stop_the_run_and_keep_the_last_good_checkpoint(world):
    folder = world / "explodes"
    result = launch(
        "--recipe", str(world / "recipe.yaml"), "--output_dir", str(folder), "--save_steps", "1",
        "--optim", "sgd", "--learning_rate", "1e25", "--lr_scheduler_type", "constant",
        "--max_grad_norm", "0", check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "not finite" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "student").exists()
    checkpoints = sorted(folder.glob("checkpoint-*/student/model.safetensors"))
    assert checkpoints
    for path in checkpoints:
        assert all(t.isfinite().all() for t in load_file(path).values()), path


def test_not_finite_loss_names_step_and_sources(world):
    """A weight that is NaN from the start: the first step stops, before any update is kept."""
    shutil.copytree(world / "pair", world / "bad_pair")
    path = world / "bad_pair" / "student" / "model.safetensors"
    tensors = load_file(path)
    tensors["MP.proj.weight"][0, 0] = float("nan")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    folder = world / "names_sources"
    result = launch(
        "--recipe", str(world / "recipe.yaml"), "--output_dir", str(folder),
        "--student", str(world / "bad_pair" / "student"), "--save_strategy", "no", check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "the loss of step 1 is not finite" in result.stderr
    assert "docvqa, vqav2" in result.stderr


def test_gradient_checkpointing_offload_and_scopes_run(world):
    """The options that change the engine's shape, in one run on two ranks."""
    folder = train(
        world, "options", "--gradient_checkpointing", "true", "--kv_scope", "prompt",
        "--teacher_offload", "true", "--max_steps", "2", "--report_to", "wandb",
        ranks=2, config="zero3_offload", env={"WANDB_MODE": "offline", "WANDB_DIR": str(world)},
    )  # fmt: skip
    assert len(losses(folder)) == 2
    assert list((world / "wandb").glob("offline-run-*/*.wandb"))


def test_frozen_is_frozen(world):
    """Contract 10, on the live modules: teacher and vision are bit-identical after training."""
    from ldistill.recipe import parse
    from ldistill.training import run as runs

    folder = world / "frozen"
    recipe = parse(
        ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(folder), "--max_steps", "3"]
    )
    data = runs.open_data(recipe)
    pair = runs.open_pair(recipe, data.weights)
    frozen = {
        **dict(pair.lm.named_parameters()),
        **dict(pair.student.vision.named_parameters()),
    }
    before = {name: p.detach().clone() for name, p in frozen.items()}
    projector = pair.student.projector.proj.weight.detach().clone()
    trainer = runs.build_trainer(recipe, pair, data, folder, None)
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    assert all(p.grad is None for p in frozen.values())
    assert not torch.equal(pair.student.projector.proj.weight, projector)
    inside = {id(p) for p in trainer.distiller.parameters()}
    assert not inside & {id(p) for p in pair.lm.parameters()}


def test_a_zero3_teacher_survives_steps_where_one_rank_or_none_distils(world):
    """Only one source distils and batches are small: ranks differ in whether they teach."""
    folder = train(
        world, "idle", "--packing", "false", "--global_batch_size", "2",
        "--per_device_train_batch_size", "1", "--max_steps", "8", "--health_steps", "1",
        ranks=2, config="zero3",
    )  # fmt: skip
    assert len(losses(folder)) == 8
    rows = [r["teacher_rows"] for r in read_metrics(folder / "metrics.jsonl")]
    assert min(rows) == 0 or len(set(rows)) > 2
