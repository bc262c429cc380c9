"""Whole runs of the LLaVA kind: a large teacher on every engine, LoRA, resuming, export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hf_pairs import write_llava
from runs import launch, losses, write_recipe, write_shards
from safetensors.torch import load_file

from ldistill.checkpoint.logs import read_metrics

pytestmark = pytest.mark.slow
# Plain gradient descent: after it, equal weights mean equal gradients at every step.
SGD = ("--optim", "sgd", "--lr_scheduler_type", "constant", "--learning_rate", "1e-2")
LORA = ("--lora_rank", "4", "--learning_rate", "5e-2")
LORA += ("--train", "vision,projector,decoder", "--vision_lr", "1e-2")  # the tower is trained too
# fp32 sums in another order.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("llava_runs")
    write_llava(root / "pair")
    write_shards(root / "shards", root / "pair", count=20)
    write_recipe(root / "recipe.yaml", root / "pair", root / "shards", max_steps=3)
    return root


def train(world: Path, name: str, *args: str, **kwargs) -> Path:
    folder = world / name
    launch("--recipe", str(world / "recipe.yaml"), "--output_dir", str(folder), *args, **kwargs)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    merged = {}
    for path in sorted((folder / "student").glob("*.safetensors")):
        merged |= load_file(path)
    return merged


@pytest.fixture(scope="module")
def reference(world) -> Path:
    """One rank, the global batch in one micro-batch, no DeepSpeed, a whole teacher."""
    return train(world, "reference", "--per_device_train_batch_size", "4", *SGD)


@pytest.fixture(scope="module")
def lora_reference(world) -> Path:
    """As `reference`, adapters on a frozen decoder."""
    batch = ("--per_device_train_batch_size", "4")
    return train(world, "lora", *batch, *SGD, *LORA)


ENGINES = {
    "ZeRO-3, sharded teacher": {"args": (), "config": "zero3"},
    "ZeRO-3, sharded teacher in CPU memory": {
        "args": ("--teacher_offload", "true"),
        "config": "zero3",
    },
    "ZeRO-3, replicated teacher": {
        "args": ("--teacher_engine", "replicated"),
        "config": "zero3",
    },
    "ZeRO-2, inference engine": {
        "args": ("--teacher_engine", "deepspeed-inference"),
        "config": "zero2",
    },
}


def assert_same_run(world: Path, got: Path, expected: Path, vision: bool = False) -> None:
    """Losses, gradient norms, teacher rows and exported weights."""
    assert losses(got) == pytest.approx(losses(expected), abs=LOSS_TOLERANCE)
    for key, tolerance in (("grad_norm", 1e-4), ("teacher_rows", 0)):
        mine, theirs = (
            [r[key] for r in read_metrics(f / "metrics.jsonl")] for f in (got, expected)
        )
        assert mine == pytest.approx(theirs, rel=tolerance)
    base, new, old = weights(world / "pair"), weights(got), weights(expected)
    assert {k: (t.shape, t.dtype) for k, t in new.items()} == {
        k: (t.shape, t.dtype) for k, t in base.items()
    }
    for name, tensor in old.items():
        assert (new[name] - tensor).abs().max() < WEIGHT_TOLERANCE, name
    moved = {name for name, tensor in new.items() if not torch.equal(tensor, base[name])}
    assert len(moved) >= 16
    assert any("vision_tower" in name for name in moved) == vision


@pytest.mark.parametrize("engine", ENGINES)
def test_every_teacher_engine_gives_the_same_run(world, reference, engine):
    """Student at stage 3 on two ranks; the teacher sharded, offloaded, whole, or an engine's."""
    options = dict(ENGINES[engine])
    name = engine.replace(" ", "_")
    folder = train(world, name, *options.pop("args"), *SGD, ranks=2, **options)
    assert_same_run(world, folder, reference)


def test_export_is_the_checkpoint_it_came_from(world, reference):
    """Contract 7: every file; only tensors of decoder and projector differ."""
    base, out = world / "pair" / "student", reference / "student"
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()} | {"README.md"}
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_lora_on_two_ranks_is_lora_on_one(world, lora_reference):
    """Adapters over partitioned weights; merged, the export has the keys it came with."""
    folder = train(world, "lora_zero3", *SGD, *LORA, ranks=2, config="zero3")
    assert_same_run(world, folder, lora_reference, vision=True)
    base, new = weights(world / "pair"), weights(folder)
    decoder = [k for k in base if "vision_tower" not in k]
    frozen = [k for k in decoder if "norm" in k or "embed_tokens" in k or "lm_head" in k]
    assert len(frozen) > 5
    assert all(torch.equal(base[k], new[k]) for k in frozen)


def test_lora_resumes_exactly(world):
    """Contract 8 with adapters: checkpoints hold them, optimizer states too."""
    extra = (*LORA, "--save_steps", "2", "--max_steps", "4", "--per_device_train_batch_size", "4")
    whole = train(world, "lora_whole", *extra, config="zero2")
    cut = world / "lora_cut"
    shutil.copytree(whole, cut)
    for name in ("checkpoint-4", "student"):
        shutil.rmtree(cut / name)
    train(world, cut.name, *extra, "--resume_from_checkpoint", "true", config="zero2")
    assert losses(cut) == losses(whole)
    resumed = weights(cut)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights(whole).items())
