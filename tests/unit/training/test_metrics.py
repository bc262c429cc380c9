"""Metrics: means by source and category, throughput, drops; the metrics file; FLOPs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from pairs import small_config, weights
from torch.utils.flop_counter import FlopCounterMode

from ldistill.checkpoint.logs import StepLog, read_metrics
from ldistill.common.cards import CARDS
from ldistill.common.device import listed_peak
from ldistill.common.errors import TransientError
from ldistill.distill.objective import COLUMNS
from ldistill.models.flops import (
    StepCounts,
    linear_weights,
    step_flops,
    student_flops,
    vision_flops,
)
from ldistill.models.lora import add_lora
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.parts import DEFAULT_TRAIN, train_only
from ldistill.models.towers import tower_of
from ldistill.training.callbacks import ShortProgress, WriteMetrics, plot_curves, short_line
from ldistill.training.metrics import Meter


def sums(**by_source) -> torch.Tensor:
    matrix = torch.zeros(2, len(COLUMNS))
    for name, values in by_source.items():
        matrix[:, COLUMNS.index(name)] = torch.tensor(values)
    return matrix


def test_means_are_over_rows_and_kd_rows():
    meter = Meter(weights(), torch.device("cpu"), peak=1e12)
    meter.add_sums(sums(rows=[4.0, 6.0], ce=[8.0, 3.0], kd_rows=[2.0, 0.0], kl=[1.0, 0.0]))
    meter.add_sums(sums(rows=[1.0, 0.0], ce=[2.0, 0.0], kd_rows=[0.0, 0.0]))
    logs = meter.flush()
    assert logs["ce"] == pytest.approx(13 / 11)
    assert logs["source/vqav2/ce"] == logs["language/ce"] == pytest.approx(2.0)
    assert logs["document/ce"] == pytest.approx(0.5)
    assert logs["kd"] == logs["language/kd"] == pytest.approx(0.5)
    assert "document/kd" not in logs
    assert logs["rows"] == 11
    assert (logs["language/rows"], logs["source/docvqa/rows"]) == (5, 6)
    assert logs["kd_rows"] == logs["language/kd_rows"] == logs["source/vqav2/kd_rows"] == 2
    assert logs["document/kd_rows"] == logs["source/docvqa/kd_rows"] == 0
    assert "ce" not in meter.flush()


def test_drops_and_documents_are_counted_by_interval():
    meter = Meter(weights(), torch.device("cpu"), peak=1e12)
    counts = StepCounts(positions=64, pairs=1, tiles=2, targets=3)
    batch = {"doc_length": torch.tensor([20, 30]), "drops": {"undecodable image": 2}}
    meter.add_batch(batch, counts, 1e9)
    meter.add_batch(batch | {"drops": {}}, counts, 1e9)
    logs = meter.flush()
    assert logs["documents"] == 4
    assert logs["dropped/undecodable image"] == 2
    assert logs["packing_efficiency"] == pytest.approx(100 / 128)
    assert not any(k.startswith("dropped") for k in meter.flush())


def test_metrics_file_forgets_what_a_resumed_run_does_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    first = WriteMetrics(path)
    for state.global_step in (1, 2, 3):
        first.on_log(None, state, None, {"loss": float(state.global_step), "bad": float("nan")})
    path.write_text(path.read_text() + '{"step": 4, "lo')  # cut off by a kill
    again = WriteMetrics(path, resume_step=2)
    again.on_train_begin(None, state, None)
    again.on_log(None, state, None, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "bad" not in path.read_text()
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_log_on_a_full_disk_keeps_why_and_writes_no_more(tmp_path):
    path = tmp_path / "rank-0.jsonl"
    path.symlink_to("/dev/full")
    log = StepLog(path)
    log.append({"step": 1})
    path.unlink()
    log.append({"step": 2})
    assert not path.exists()
    with pytest.raises(TransientError, match=r"rank-0\.jsonl could not be written \(No space left"):
        log.sync()


def test_flops_match_what_torch_counts():
    """Against torch's own counter on the real modules; attention is counted unmasked there."""
    config = small_config()
    student = NanoVLM(config).eval()
    for part in (student.decoder, student.vision):  # torch 2.14 overlooks fused attention
        part.config._attn_implementation = "eager"
    ids = torch.randint(3, 300, (2, 32))
    ids[:, :4] = student.image_token_id
    pixels = torch.rand(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student.lm_head(student(ids, pictures={"pixel_values": pixels}))
    vision = vision_flops(tower_of(student.vision.config))
    counts = StepCounts(positions=64, pairs=2 * 32 * 32, tiles=2, targets=64)
    step = step_flops(
        student.decoder.config,
        counts,
        vision_flops_per_tile=vision,
        projector_weights=student.projector.proj.weight.numel(),
        tokens_per_tile=config.mp_image_token_length,
    )
    forward = (step - 2 * vision) / 3 + 2 * vision
    assert forward == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize(
    ("train", "rank"),
    [(DEFAULT_TRAIN, 0), (DEFAULT_TRAIN, 4), ("vision,projector,gate_up", 0), ("projector", 0)],
)
def test_flops_of_forward_and_backward_match_what_torch_counts(train, rank):
    """What is frozen is not charged with gradients of its weights; adapters are."""
    config = small_config()
    student = NanoVLM(config)
    train_only(student, train)
    if rank:
        pytest.importorskip("peft", reason="needs the extra: pip install ldistill[lora]")
        add_lora(student, rank)
    for part in (student.decoder, student.vision):
        part.config._attn_implementation = "eager"
    ids = torch.randint(3, 300, (2, 32))
    ids[:, :4] = student.image_token_id
    pixels = torch.rand(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        student.lm_head(student(ids, pictures={"pixel_values": pixels})).sum().backward()
    sizes = {"image_tokens": 2 * config.mp_image_token_length}
    counts = StepCounts(positions=64, pairs=2 * 32 * 32, tiles=2, targets=64, **sizes)
    unneeded = 2 * linear_weights(student.projector) * config.mp_image_token_length * 2
    if "vision" in train:  # of 16 patches of each picture, instead
        unneeded = 2 * student.vision.embeddings.patch_embedding.weight.numel() * 16 * 2
    expected = counter.get_total_flops() + unneeded
    assert student_flops(student, counts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L4", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_card_is_known_by_its_whole_name(name, card):
    assert listed_peak(name) == (None if card is None else CARDS[card].flops)


def test_curves_are_drawn_by_category(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not plot_curves(path, tmp_path / "none.png")
    lines = [
        {"step": s, "ce": 1.0, "kd": 0.5, "language/ce": 2.0 / s, "language/kd": 0.1 * s}
        for s in (1, 2, 3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_curves(path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_a_validation_has_a_line_of_its_own():
    shown: list[str] = []
    progress = ShortProgress({"vqav2": 4.0})
    progress.training_bar = SimpleNamespace(write=shown.append)
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9)
    logs = {"eval_loss": 1.0, "eval_language/ce": 2.0, "eval_kd": 0.5, "eval_kd_rows": 2.0}
    logs |= {"eval_source/vqav2/kd": 0.5, "eval_source/vqav2/kd_rows": 2.0}
    progress.on_log(None, state, None, logs)
    progress.on_log(None, state, None, {"eval_tiny_facts": 0.5})
    progress.on_log(None, state, None, {"train_runtime": 0.5})
    assert shown == ["validation at step 3/9: loss 1.000, CE lang 2.000, KD 2"]


def test_short_line():
    logs = {"loss": 1.23456, "language/ce": 2.0, "tokens_per_second": 12345.6}
    assert short_line(7, 9, logs, {}) == "step 7/9: loss 1.235, CE lang 2.000, tok/s 12,346"
    logs = {"loss": 0.2, "kd": 0.000573, "kd_rows": 4.0, "source/vsr/kd_rows": 0.0}
    logs |= {"source/vqav2/kd": 0.000573, "source/vqav2/kd_rows": 4.0}
    scales = {"vqav2": 1.0, "vsr": 1.0}
    assert short_line(8, 9, logs, scales) == "step 8/9: loss 0.200, KD 0.00057"
    scales = {"vqav2": 16.0, "vsr": 4.0}
    shown = "step 8/9: loss 0.200, KD 0.0092"
    assert short_line(8, 9, logs, scales) == shown, "τ² KL, beside a CE of its kind"
    logs |= {"kd_rows": 16.0, "source/vsr/kd_rows": 12.0, "source/vsr/kd": 0.003}
    expected = (4 * 16 * 0.000573 + 12 * 4 * 0.003) / 16
    assert short_line(8, 9, logs, scales) == f"step 8/9: loss 0.200, KD {expected:.2g}"
