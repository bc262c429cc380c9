"""`ldistill bench step`: an honest batch, an honest baseline, and what it reports."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from pairs import spread
from torch.nn import functional as F
from transformers import AutoConfig
from typer.testing import CliRunner

from ldistill.distill.distiller import student_inputs
from ldistill.distill.targets import supervise
from ldistill.models.flops import count_step, step_flops, student_flops, vision_flops
from ldistill.models.nanovlm import NanoVLM, decoder_config, vision_config
from ldistill.models.shapes import shape_of
from ldistill.models.towers import tower_of
from ldistill.models.zoo import write_pair
from ldistill.tools.bench import step as bench_step
from ldistill.tools.bench.batch import mix_weights, paper_batch
from ldistill.tools.bench.commands import app
from ldistill.tools.bench.naive import naive_counts
from ldistill.tools.bench.report import PARTS, append_csv
from ldistill.tools.bench.step import StepBench, StepOptions, measure_step, profile_step
from ldistill.tools.pairs import pair_config

COLUMNS = {
    "pair", "mode", "device", "dtype", "rows", "ms", "ms_min", "ms_max", "tokens_per_s", "mfu",
    "peak_memory_mib", "time_vs_ce", "memory_vs_ce", "teacher_mib", "torch", "transformers",
}  # fmt: skip


def tiny(**changes) -> StepOptions:
    return StepOptions(**{"pair": "tiny", "rows": 2, "device": "cpu"} | changes)


@pytest.fixture(scope="module")
def bench() -> StepBench:
    """Weights large enough that wrong attention would show in the loss."""
    made = StepBench(tiny())
    torch.manual_seed(1)
    spread(made.distiller.student)
    spread(made.distiller.teacher.lm)
    return made


def gradients(bench: StepBench, mode: str) -> tuple[float, dict[str, torch.Tensor]]:
    bench.distiller.zero_grad()
    loss = bench.loss(mode)
    loss.backward()
    student = bench.distiller.student
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def test_naive_and_ours_are_the_same_loss_and_gradient(bench):
    ours, our_grads = gradients(bench, "ours")
    naive, naive_grads = gradients(bench, "naive")
    assert naive == pytest.approx(ours, rel=1e-5)
    assert our_grads.keys() == naive_grads.keys()
    for name, grad in our_grads.items():
        error = (grad - naive_grads[name]).abs().max()
        assert error <= 1e-4 * grad.abs().max() + 1e-7, name
    assert ours != pytest.approx(gradients(bench, "ce")[0], rel=1e-3)


def test_ce_is_the_mean_cross_entropy_of_the_labels(bench):
    batch = bench.host_batch
    student = bench.distiller.student
    hidden = student(**student_inputs(batch))
    expected = F.cross_entropy(student.lm_head(hidden).flatten(0, 1), batch["labels"].flatten())
    assert gradients(bench, "ce")[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mix", ["paper", "uniform"])
def test_the_batch_keeps_the_papers_mix(mix):
    config = pair_config("nanovlm-460m")
    batch = paper_batch(config, 8, 1024)
    plan = supervise(
        batch, mix_weights(mix, 0.7, 4.0), "full", lambda ids: ids < config.lm_base_vocab_size
    )
    tokens = int(batch["doc_length"].sum())
    assert tokens > 0.95 * batch["input_ids"].numel()
    assert len(plan.targets) / tokens == pytest.approx(0.2, abs=0.01)
    share = len(plan.queries) / len(plan.targets)
    assert share == (1 if mix == "uniform" else pytest.approx(0.5, abs=0.05))


def test_the_batch_is_one_the_collator_could_have_made():
    config = pair_config("tiny")
    batch = paper_batch(config, 3, 200)
    images = (batch["input_ids"] == config.image_token_id).sum()
    assert images == len(batch["pictures"]["pixel_values"]) * config.mp_image_token_length
    labelled = batch["labels"] >= 0
    following = torch.roll(batch["input_ids"], -1, dims=1)
    assert torch.equal(batch["labels"][labelled], following[labelled])
    assert not (batch["labels"] == config.image_token_id).any()
    for row, start, length in zip(batch["doc_batch"], batch["doc_start"], batch["doc_length"]):
        inside = slice(int(start), int(start + length))
        assert torch.equal(batch["position_ids"][row, inside], torch.arange(int(length)))
        assert batch["document_ids"][row, inside].unique().numel() == 1
        assert not labelled[row, inside][-1]
    assert (batch["labels"][batch["document_ids"] < 0] == -100).all()
    again = paper_batch(config, 3, 200)
    torch.testing.assert_close(batch, again, rtol=0, atol=0)


def test_a_row_too_short_for_a_document_is_refused():
    with pytest.raises(ValueError, match="room for a document of 30 tokens, got 29"):
        paper_batch(pair_config("tiny"), 1, 29)


@pytest.mark.parametrize("pair", ["tiny", "nanovlm-460m"])
def test_the_arithmetic_leaves_room_below_a_tenth(pair):
    """FLOPs of ours against labels alone on the paper's mix: the time goal must be possible."""
    config = pair_config(pair)
    batch = paper_batch(config, 16, 256 if pair == "tiny" else 1024)
    vocab = config.lm_base_vocab_size
    with torch.device("meta"):
        student = NanoVLM(config)

    def flops(alpha: float, *, naive: bool = False) -> float:
        plan = supervise(batch, mix_weights("paper", alpha, 4.0), "full", lambda ids: ids < vocab)
        counts = count_step(student, batch, plan)
        return step_flops(
            decoder_config(config),
            naive_counts(counts) if naive else counts,
            vision_flops_per_tile=vision_flops(tower_of(vision_config(config))),
            projector_weights=config.mp_pixel_shuffle_factor**2
            * config.vit_hidden_dim
            * config.lm_hidden_dim,
            tokens_per_tile=config.mp_image_token_length,
            kv_scope="visual" if naive else "full",
        )

    assert 1.0 < flops(0.7) / flops(0.0) < 1.05
    assert flops(0.7, naive=True) / flops(0.0) > 1.2


def test_memory_of_each_mode_is_measured_alone():
    results = measure_step(tiny(rows=8, steps=1, warmup=0, modes=("ours", "ce")))
    ce, ours = results
    assert (ce["mode"], ours["mode"]) == ("ce", "ours")
    assert ce["teacher_rows"] == ce["teacher_mib"] == 0
    assert ours["teacher_rows"] > 0
    assert ours["teacher_mib"] == pytest.approx(1.78, abs=0.02)
    assert ce["memory_vs_ce"] == 1
    assert ours["memory_less_teacher_vs_ce"] < 1.1


@pytest.mark.parametrize("memory", [True, False])
def test_memory_that_runs_out_is_a_sentence(memory, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr(bench_step, "peak_memory", full)
    monkeypatch.setattr(StepBench, "step", full)
    what = "the step of ce" if memory else "timing all modes in one process"
    with pytest.raises(ValueError, match=rf"^{what}: out of memory; try fewer --rows, [^\n]*$"):
        measure_step(tiny(steps=1, warmup=0, memory=memory))


def test_a_killed_measurement_of_memory_is_a_sentence(monkeypatch):
    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(bench_step, "peak_memory", killed)
    with pytest.raises(ValueError, match="the step of ce: killed, probably for memory"):
        measure_step(tiny(steps=1, warmup=0))


def test_the_command_prints_a_row_per_mode_and_appends_csv(tmp_path):
    file = tmp_path / "new" / "step.csv"
    arguments = ["step", "--rows", "1", "--steps", "2", "--warmup", "0", "--no-memory"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--csv", str(file)])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert [row["mode"] for row in rows] == ["ce", "naive", "ours"]
    assert rows[0].keys() >= COLUMNS
    for row in rows:
        assert row["mode"] in result.output
        assert float(row["ms_min"]) <= float(row["ms"]) <= float(row["ms_max"])
        assert float(row["tokens_per_s"]) > 0
        assert float(row["mfu"]) > 0
    assert float(rows[0]["time_vs_ce"]) == 1
    assert int(rows[1]["teacher_rows"]) > int(rows[2]["teacher_rows"]) > 0


def test_parts_of_a_step_are_told_and_drawn(tmp_path):
    picture = tmp_path / "new" / "step.png"
    arguments = ["step", "--rows", "1", "--steps", "1", "--warmup", "0", "--no-memory"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "where the time goes, ms (share)" in result.output
    assert "attention: sdpa (nothing else runs here)." in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_parts_sum_to_the_step_and_labels_alone_have_no_teacher(bench, monkeypatch):
    now = itertools.count()  # every look at it is a second: parts are then exact
    monkeypatch.setattr(bench, "clock", lambda: float(next(now)))
    ours = profile_step(bench, "ours")
    looks = next(now)
    assert sum(ours.values()) == pytest.approx(1e3 * (looks - 5), abs=1)  # four gaps between parts
    assert all(ours[part] > 0 for part in PARTS)
    ce = profile_step(bench, "ce")
    assert ce["teacher"] == 0
    assert profile_step(bench, "naive")["teacher"] > 0
    assert "hidden" not in vars(bench.distiller.teacher)
    assert not bench.distiller.student._forward_hooks


@pytest.mark.slow
def test_compiled_blocks_are_timed_beside_eager_ones():
    options = tiny(steps=1, warmup=1, modes=("ce", "ours"), memory=False, compile=True)
    results = {row["mode"]: row for row in measure_step(options)}
    assert list(results) == ["ce", "ours", "ce compiled", "ours compiled"]
    assert results["ce"]["compile_gain"] is None
    assert results["ours compiled"]["compile_gain"] > 0
    assert results["ours compiled"]["teacher_rows"] == results["ours"]["teacher_rows"] > 0
    bench = StepBench(options)
    assert bench.loss("ours compiled").item() == pytest.approx(bench.loss("ours").item(), rel=1e-4)


@pytest.mark.parametrize("family", [
    "llava", "llava-next", "llava-onevision", "smolvlm2", "qwen2.5-vl", "internvl", "mistral3",
    "gemma3", "aya-vision", "kimi", "videollama3",
])  # fmt: skip
def test_other_families_run_through_the_same_bench(family, tmp_path, monkeypatch):
    """Small models of the very classes: naive and ours still agree."""
    made = AutoConfig.from_pretrained(write_pair(family, tmp_path))
    monkeypatch.setattr(bench_step, "pair_config", lambda name: made)
    monkeypatch.setattr(bench_step, "pair_shape", lambda name: shape_of(name, made, {}))
    length = 5000 if family == "videollama3" else 1300  # a position a patch
    bench = StepBench(dataclasses.replace(tiny(), pair="smolvlm-256m", length=length))
    torch.manual_seed(1)
    spread(bench.distiller.student)
    spread(bench.distiller.teacher.lm)
    ours = bench.loss("ours").item()
    if family == "kimi":
        with pytest.raises(ValueError, match=r"caches no keys.*--modes ce,ours"):
            bench.loss("naive")
    else:
        assert bench.loss("naive").item() == pytest.approx(ours, rel=1e-5)
    assert ours != pytest.approx(bench.loss("ce").item(), rel=1e-3)
    assert bench.flops("naive") > bench.flops("ours") > bench.flops("ce") > 0
    if family not in ("qwen2.5-vl", "mistral3", "kimi", "videollama3"):  # towers of one size
        student = bench.distiller.student
        counts = count_step(student, bench.host_batch, bench.targets("ce"))
        assert bench.flops("ce") == pytest.approx(student_flops(student, counts), rel=0.01)


def test_csv_grows_and_refuses_a_file_of_other_columns(tmp_path):
    options = tiny(steps=1, warmup=0, modes=("ce",), memory=False)
    results = measure_step(options)
    file = tmp_path / "step.csv"
    append_csv(file, results, ("torch",))
    append_csv(file, [results[0] | {"ms": 1.0}], ("torch",))
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert [float(row["ms"]) == 1.0 for row in rows] == [False, True]
    other = tmp_path / "other.csv"
    other.write_text("a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other columns"):
        append_csv(other, results, ("torch",))
    assert other.read_text(encoding="utf-8") == "a,b\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": "huge"}, "no pair 'huge'.* Give one of nanovlm-460m, .*tiny"),
        ({"attention": "flex_attention"}, "no backward for flex_attention on a CPU"),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--modes", "ours,best", "modes must be among ce,naive,ours, got 'ours,best'"),
        ("--modes", ",", "modes must be among ce,naive,ours, got ','"),
        ("--dtype", "int8", "'int8' is not one of"),
        ("--mix", "half", "'half' is not one of 'paper', 'uniform'"),
        ("--rows", "0", "greater than or equal to 1"),
        ("--device", "tpu", "'tpu' is not one of 'cpu', 'cuda'"),
        ("--attention", "fast", "'fast' is not one of 'auto', 'sdpa'"),
    ],
)
def test_values_that_a_flag_cannot_have_are_named(flag, value, message):
    result = CliRunner().invoke(app, ["step", flag, value])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_small_pair_runs_its_recipes_rows_on_a_cpu_and_a_large_one_a_single_row():
    assert tiny(rows=None).rows == 16
    assert tiny(rows=None, pair="nanovlm-460m").rows == 1
