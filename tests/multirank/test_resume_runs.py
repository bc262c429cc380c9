"""Real runs that go on: what they refuse to go on from, and what they leave behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers_data import Evil
from pairs import write_pair
from runs import write_recipe, write_shards
from safetensors.torch import load_file

from ldistill.checkpoint import folder as checkpoint_folder
from ldistill.checkpoint.logs import read_metrics
from ldistill.data.index import ShardIndex
from ldistill.data.order import Order
from ldistill.train import main
from ldistill.training.callbacks import SampleLog, read_samples
from ldistill.training.trainer import WEIGHTS, DistillTrainer


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pair, shards, a recipe, and ``run``: a finished run of four steps with checkpoints."""
    root = tmp_path_factory.mktemp("resume")
    write_pair(root / "pair")
    write_shards(root / "shards", root / "pair", count=16)
    fields = {"save_steps": 2, "save_total_limit": 1, "log_samples": True, "health_steps": 0}
    fields |= {"mix": {"vqav2": 1.5, "docvqa": 0.5}, "alpha": {"vqav2": 0.9}}
    write_recipe(root / "recipe.yaml", root / "pair", root / "shards", **fields)
    assert main(argv(root, root / "run", "--max_steps", "4")) == 0
    return root


def argv(world: Path, run: Path, *more: str) -> list[str]:
    return ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(run), *more]


@pytest.fixture
def run(world, tmp_path) -> Path:
    """A copy of the run, which keeps its id."""
    return Path(shutil.copytree(world / "run", tmp_path / "run"))


def resume(capsys, world, run: Path, *more: str, asked: str = "auto", code: int = 2) -> str:
    capsys.readouterr()
    flags = ["--max_steps", "4", "--resume_from_checkpoint", asked, *more]
    assert main(argv(world, run, *flags)) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_a_run_leaves_one_complete_checkpoint_and_no_debris(world):
    run = world / "run"
    assert [(f.step, f.problem) for f in checkpoint_folder.survey(run)] == [(4, None)]
    assert not (run / checkpoint_folder.WRITING).exists() or not any(
        (run / checkpoint_folder.WRITING).iterdir()
    )
    assert not (run / checkpoint_folder.RETIRED).exists()
    manifest = checkpoint_folder.read_manifest(run / "checkpoint-4")
    assert manifest.about["run"] == json.loads((run / "run.json").read_text())["id"]
    assert manifest.about["layout"] == {"engine": "none"}
    assert {"data.json", "student/model.safetensors", "optimizer.pt"} < set(manifest.files)


def test_the_sample_log_tells_every_step_and_every_document(world):
    samples = read_samples(world / "run")
    metrics = read_metrics(world / "run" / "metrics.jsonl")
    assert list(samples) == [1, 2, 3, 4]
    assert [sum(map(len, packs)) for packs in samples.values()] == [r["documents"] for r in metrics]
    assert all(len(packs) == 4 for packs in samples.values())


def test_a_finished_run_only_takes_its_result_again(capsys, world, run):
    shutil.rmtree(run / "student")
    assert "nothing is left to train" in resume(capsys, world, run, code=0)
    for name in ("config.json", "model.safetensors"):
        wanted = (world / "run" / "student" / name).read_bytes()
        assert (run / "student" / name).read_bytes() == wanted


def test_a_finished_run_can_be_made_longer_and_saved_and_logged_otherwise(capsys, world, run):
    flags = ["--max_steps", "6", "--save_steps", "1", "--save_total_limit", "9"]
    longer = resume(capsys, world, run, *flags, "--logging_steps", "2", code=0)
    assert "going on from" in longer
    samples = read_samples(run)
    assert list(samples) == [1, 2, 3, 4, 5, 6]
    index = ShardIndex.load(world / "shards", ["vqav2", "docvqa"])
    order = Order(index, limit=96, seed=7, shuffle_window=32, mix="vqav2=1.5,docvqa=0.5")
    expected = [[index.locate(s)[2] for s in p] for p in islice(order.packs_from(0), 6 * 4)]
    assert [pack for packs in samples.values() for pack in packs] == expected
    first = Counter(key for pack in expected[: len(order.epoch(0))] for key in pack)
    of_vqav2 = Counter(count for key, count in first.items() if key.startswith("vqav2"))
    assert (of_vqav2, sum(first.values())) == ({1: 8, 2: 8}, 32), "1.5 and 0.5 times 16"
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 6]
    assert [f.step for f in checkpoint_folder.survey(run)] == [6, 5, 4]


def test_overwriting_begins_anew_whatever_auto_would_find(capsys, world, run):
    before = (run / "run.json").read_bytes()
    (run / "checkpoint-4" / "data.json").unlink()
    flags = ("--overwrite", "true", "--max_steps", "1")
    assert "going on from" not in resume(capsys, world, run, *flags, code=0)
    assert (run / "run.json").read_bytes() != before
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [1]
    old = run.with_name(f"{run.name}.old-1")
    assert (old / "run.json").read_bytes() == before


@pytest.mark.parametrize("where", ["set-up", "train"])
def test_a_run_has_its_name_back_if_the_new_one_fails(capsys, world, run, monkeypatch, where):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    flags = ["--overwrite", "true"]
    if where == "set-up":
        flags += ["--shards", str(run / "none")]
    else:
        engine = Mock(side_effect=ValueError("the engine refuses its configuration"))
        monkeypatch.setattr(DistillTrainer, "_prepare_for_training", engine)
    assert ("shards" if where == "set-up" else "refuses") in resume(capsys, world, run, *flags)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert not run.with_name(f"{run.name}.old-1").exists()


def test_a_disk_that_fills_between_checkpoints_is_a_sentence_and_may_pass(
    capsys, world, run, monkeypatch
):
    begin = SampleLog.on_train_begin

    def begin_on_a_full_disk(log: SampleLog, *args, **kwargs) -> None:
        begin(log, *args, **kwargs)
        log.file.path.unlink()
        log.file.path.symlink_to("/dev/full")

    monkeypatch.setattr(SampleLog, "on_train_begin", begin_on_a_full_disk)
    message = resume(capsys, world, run, "--max_steps", "6", code=75)
    assert "rank-0.jsonl could not be written (No space left on device)" in message
    assert "(step 6, rank 0)" in message


def test_a_restart_may_change_rates_and_schedule(capsys, world, run):
    """They hold from its first step on; another test sees that the same ones change nothing."""
    before = load_file(run / "checkpoint-4" / WEIGHTS)
    flags = ["--projector_lr", "5e-3", "--decoder_lr", "0", "--lr_scheduler_type", "constant"]
    flags += ["--weight_decay", "0.3", "--adam_beta2", "0.9"]
    resume(capsys, world, run, "--max_steps", "5", *flags, code=0)
    assert read_metrics(run / "metrics.jsonl")[4]["learning_rate"] == 5e-3
    groups = torch.load(run / "checkpoint-5" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [g["lr"] for g in groups] == [5e-3, 0, 0]
    assert [g["weight_decay"] for g in groups] == [0.3, 0.3, 0]
    assert {g["betas"] for g in groups} == {(0.9, 0.9)}
    after = load_file(run / "checkpoint-5" / WEIGHTS)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith("projector")}


def test_auto_without_a_folder_goes_on_with_the_newest_run(capsys, world, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, age in (("recipe", 300), ("recipe-2", 100), ("recipe-3", 200), ("recipe-b", 0)):
        folder = Path(shutil.copytree(world / "run", tmp_path / "runs" / name))
        started = time.time() - age
        os.utime(folder / "recipe.yaml", (started, started))
    flags = ["--recipe", str(world / "recipe.yaml"), "--max_steps", "4"]
    assert main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    said = capsys.readouterr().out
    assert "runs/recipe-2 holds the newest run" in said
    assert "going on from runs/recipe-2/checkpoint-4" in said
    assert len(list((tmp_path / "runs").iterdir())) == 4


def test_epochs_are_counted_in_packs(capsys, world, tmp_path):
    run = tmp_path / "run"
    assert main(argv(world, run, "--num_train_epochs", "0.5", "--save_strategy", "no")) == 0
    packs = json.loads((run / "order.json").read_text())["packs"]
    steps = math.ceil(packs / 2 / 4)
    assert f"num_train_epochs 0.5: {steps} steps" in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == list(range(1, steps + 1))


def test_a_checkpoint_of_another_run_is_refused(capsys, world, run):
    shutil.move(run / "checkpoint-4", run / "checkpoint-3")
    other = json.loads((run / "run.json").read_text()) | {"id": "0" * 32}
    (run / "run.json").write_text(json.dumps(other))
    assert "belongs to another run" in resume(capsys, world, run)


def test_a_checkpoint_of_other_weights_under_the_same_name_is_refused(capsys, world, run):
    kept = world / "kept"
    shutil.move(world / "pair", kept)
    try:
        write_pair(world / "pair", seed=5)
        assert "began from another student" in resume(capsys, world, run)
        shutil.rmtree(world / "pair" / "student")
        shutil.copytree(kept / "student", world / "pair" / "student")
        assert "a run with another teacher" in resume(capsys, world, run)
    finally:
        shutil.rmtree(world / "pair")
        shutil.move(kept, world / "pair")


def test_a_checkpoint_over_other_shards_is_refused(capsys, world, run, tmp_path):
    write_shards(tmp_path / "shards", world / "pair", count=17)
    message = resume(capsys, world, run, "--shards", str(tmp_path / "shards"))
    assert "over other shards" in message
    moved = shutil.copytree(world / "shards", tmp_path / "moved")
    resume(capsys, world, run, "--shards", str(moved), code=0)


@pytest.mark.parametrize(("flag", "value"), [("--shuffle_window", "3"), ("--optim", "sgd")])
def test_a_run_of_another_recipe_is_refused(capsys, world, run, flag, value):
    before = (run / "recipe.yaml").read_bytes()
    message = resume(capsys, world, run, flag, value)
    assert "is a run of another recipe" in message
    assert f"now {value}" in message.replace("'", "")
    assert (run / "recipe.yaml").read_bytes() == before


def test_a_checkpoint_that_holds_code_is_refused(capsys, world, run):
    """Even with a manifest that fits it."""
    folder = run / "checkpoint-4"
    torch.save(Evil(), folder / "optimizer.pt")
    manifest = checkpoint_folder.read_manifest(folder)
    (folder / "manifest.json").unlink()
    work = run / checkpoint_folder.WRITING / "checkpoint-4"
    work.parent.mkdir(exist_ok=True)
    folder.rename(work)
    checkpoint_folder.publish(work, 4, checkpoint_folder.seal(work), manifest.about)
    message = resume(capsys, world, run, asked=str(folder))
    assert "optimizer.pt would run code of its own" in message


def test_zero_and_plain_checkpoints_are_not_mixed(capsys, world, run):
    path = run / "checkpoint-4" / "manifest.json"
    record = json.loads(path.read_text())
    record["about"]["layout"] = {"engine": "zero2", "ranks": 2}
    path.write_text(json.dumps(record))
    message = resume(capsys, world, run, "--max_steps", "6")
    assert "written with zero2, this run has no DeepSpeed" in message


def test_a_run_that_never_saved_begins_again_with_auto(capsys, world, run):
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "student")
    said = resume(capsys, world, run, code=0)
    assert "beginning at step 0" in said
    for name in ("metrics.jsonl", "samples/rank-0.jsonl"):
        steps = [r["step"] for r in read_metrics(run / name)]
        assert steps == [1, 2, 3, 4], name
    losses = [[r["loss"] for r in read_metrics(f / "metrics.jsonl")] for f in (run, world / "run")]
    assert losses[0] == losses[1]
    assert "already holds a run" in resume(capsys, world, run, asked="false")


def test_intervals_cut_by_a_restart_are_whole_again(capsys, world, tmp_path):
    """Logged every 3 steps, saved every 2: what was gathered since is in the checkpoint."""
    flags = ["--logging_steps", "3", "--save_steps", "2", "--save_total_limit", "9"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(argv(world, whole, "--max_steps", "6", *flags)) == 0
    shutil.copytree(whole, cut)
    for step in (4, 6):
        shutil.rmtree(cut / f"checkpoint-{step}")
    resume(capsys, world, cut, *flags, "--max_steps", "6", code=0)
    one, other = (read_metrics(f / "metrics.jsonl") for f in (whole, cut))
    assert [r["step"] for r in one] == [3, 6]
    timed = ("tokens_per_second", "mfu", "memory_gib")
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - set(timed):
            assert mine[key] == theirs[key], key
