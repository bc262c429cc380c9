"""The Triton target step of distill_loss: under the interpreter without a GPU, compiled with one.

The interpreter is exact in fp32 and fp16 and wrong in bf16, which only the `gpu` tests use.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is first imported

from helpers_distill_loss import (
    KLS,
    assert_equals_teach_nothing,
    assert_matches_fp64,
    assert_near_teacher_is_exact,
    fp64_gradients,
    gradients,
    leaves,
    random_case,
)

from ldistill_kernels.distill_loss import checks, distill_loss
from ldistill_kernels.distill_loss import triton as step
from ldistill_kernels.distill_loss.testing import make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
TRITON = {"kernels": "triton"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a row with a ragged last one, at sizes the interpreter can bear."""
    monkeypatch.setattr(step, "launch_config", lambda vocab: step.Launch(64, 1, 128))


def make(*args, **options):
    return make_inputs(*args, **{"device": DEVICE} | options)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize(
    ("targets", "taught", "vocab_s", "vocab_t"),
    [(5, 5, 256, 256), (5, 2, 300, 290), (4, 4, 218, 152), (3, 1, 40, 33), (1, 0, 70, 70)],
)
def test_matches_fp64_autograd(targets, taught, vocab_s, vocab_t, kl):
    inputs = make(targets, taught, vocab_s, vocab_t, seed=targets)
    assert_matches_fp64(inputs, 2e-5, TRITON | {"chunk_targets": 3}, kl=kl, beta=0.3)


@pytest.mark.parametrize("seed", range(100, 112))
def test_random_cases_match_fp64_autograd(seed):
    inputs, options, run = random_case(seed, targets=6, vocab=300, device=DEVICE)
    assert_matches_fp64(inputs, 5e-4, TRITON | run, **options)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kl", KLS)
def test_narrow_gradients_lie_at_the_back_of_their_rows(kl, dtype):
    inputs = make(5, 3, 300, 290, dtype=dtype)
    tolerance = 2.5 * torch.finfo(dtype).eps
    assert_matches_fp64(inputs, tolerance, TRITON | {"chunk_targets": 2}, kl=kl)


def test_same_values_as_the_reference():
    inputs = make(9, 6, 218, 152)
    ours, theirs = (distill_loss(**inputs, kernels=k) for k in ("triton", "reference"))
    for name in ("loss", "ce", "kl", "extra_mass"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    for name in ("teacher_student", "teacher_label", "student_label"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("place", ["compared", "further"])
def test_best_token_is_found_anywhere(place):
    """Diagnostics when the student's best token is a label within or beyond the vocabulary."""
    inputs = make(4, 4, 200, 130, ignored=0)
    best = torch.tensor([3, 64, 127, 129] if place == "compared" else [130, 140, 194, 199])
    basis = torch.eye(32, device=DEVICE)[:4]
    inputs |= {"h_s": basis.clone(), "labels": best.to(DEVICE)}
    inputs["w_s"] = 0.01 * inputs["w_s"] - 1.0
    inputs["w_s"][best.to(DEVICE)] = 9 * basis
    out = distill_loss(**inputs, **TRITON)
    assert out.student_label.all()
    assert bool((out.extra_mass > 0.9).all()) == (place == "further")
    assert not out.teacher_student.all()


@pytest.mark.parametrize("places", [(3, 4), (2, 70), (63, 64, 129), (0, 128)])
def test_of_equal_logits_the_first_token_is_the_best(places):
    """In one load, in one block, in several."""
    inputs = make(len(places), len(places), 130, 130, ignored=0)
    inputs["labels"] = torch.tensor(places, device=DEVICE)
    inputs["h_t"] = torch.ones_like(inputs["h_t"])
    inputs["w_t"] = torch.zeros_like(inputs["w_t"])
    inputs["w_t"][list(places)] = 1.0
    out = distill_loss(**inputs, **TRITON)
    assert out.teacher_label.tolist() == [True] + [False] * (len(places) - 1)


@pytest.mark.parametrize("kl", KLS)
def test_equal_student_and_teacher_give_exactly_nothing(kl):
    inputs = make(5, 5, 200, 200, hidden_t=32)
    assert_equals_teach_nothing(inputs, kl=kl, **TRITON)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize(
    "scaling",
    [
        {"logit_scale_s": 0.0625, "logit_scale_t": 0.3},
        {"softcap_s": 3.0, "softcap_t": 5.0},
        {"logit_scale_s": 0.5, "softcap_s": 2.0},
    ],
    ids=str,
)
def test_scaled_and_capped_logits(scaling, kl):
    inputs = make(5, 3, 218, 152)
    assert_matches_fp64(inputs, 2e-5, TRITON | {"chunk_targets": 2}, kl=kl, **scaling)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("cap", [None, 7.0])
def test_equal_student_and_teacher_give_nothing_when_scaled(cap, kl):
    """Nothing is fused there: the difference of two equal products must be 0."""
    inputs = make(5, 5, 200, 200, hidden_t=32)
    scaling = {"logit_scale_s": 0.3, "softcap_s": cap, "logit_scale_t": 0.3, "softcap_t": cap}
    assert_equals_teach_nothing(inputs, kl=kl, **scaling, **TRITON)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_best_tokens_are_found_before_the_cap(kernels):
    """Of logits far beyond the cap many are equal to it."""
    inputs = make(12, 12, 200, 130, ignored=0, scale=400.0)
    capped = distill_loss(**inputs, softcap_s=1.0, softcap_t=1.0, kernels=kernels)
    free = distill_loss(**inputs, kernels=kernels)
    for name in ("teacher_student", "teacher_label", "student_label"):
        assert torch.equal(getattr(capped, name), getattr(free, name))
    labels = (inputs["h_s"] @ inputs["w_s"].t()).argmax(-1)
    assert distill_loss(
        **inputs | {"labels": labels}, softcap_s=1.0, kernels=kernels
    ).student_label.all()


def test_only_logits_that_are_products_are_computed_without_fusing():
    cases = {case.name: case.fp_fusion for case in step.compile_cases()}
    assert cases["loss targets bf16 forward vocab 49152"]
    assert not cases["loss targets bf16 forward vocab 49152 scaled"]
    assert not cases["loss targets bf16 forward vocab 49152 capped"]


@pytest.mark.parametrize("kl", KLS)
def test_gradient_of_a_student_close_to_its_teacher(kl):
    inputs = make(8, 8, 200, 200, hidden_t=32, ignored=0)
    noise = 1e-2 * torch.randn(200, 32).to(DEVICE) * inputs["w_s"].std()
    assert_near_teacher_is_exact(inputs, inputs["w_s"] + noise, kl=kl, **TRITON)


@pytest.mark.parametrize("kl", KLS)
def test_extreme_logits_stay_finite(kl):
    inputs = make(4, 3, 200, 190, scale=1e4, ignored=0)
    out, grads = gradients(inputs, kl=kl, **TRITON)
    assert all(value.isfinite().all() for value in (*out, *grads.values()))
    assert_matches_fp64(inputs, 1e-3, TRITON, kl=kl)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("broken", ["h_s", "h_t", "w_s", "w_t"])
def test_nan_is_left_where_the_reference_leaves_it(broken, kl):
    """In one target's states, or in the last row of a head: the student's is not compared."""
    inputs = make(3, 3, 70, 66, ignored=0)
    inputs[broken][-1, 0] = float("nan")
    (ours, grads), (theirs, want) = (
        gradients(inputs, kl=kl, kernels=kernels) for kernels in ("triton", "reference")
    )
    assert ours.loss.isnan()
    for name in ("ce", "kl", "extra_mass"):
        assert torch.equal(getattr(ours, name).isnan(), getattr(theirs, name).isnan()), name
    for name, grad in grads.items():
        assert torch.equal(grad.isnan(), want[name].isnan()), name


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_unchecked_labels_that_are_no_token_give_nan(kernels, monkeypatch):
    """As on a GPU, where looking at them would wait; an ignored target still gives nothing."""
    monkeypatch.setattr(checks, "checks_values", lambda device: False)
    inputs = make(6, 3, 70, 66, ignored=0)
    inputs["labels"] = torch.tensor([-1, 70, 2**32 + 3, 69, 0, -100], device=DEVICE)
    out, grads = gradients(inputs, kernels=kernels)
    assert out.ce.isnan().tolist() == [True] * 3 + [False] * 3
    assert out.loss.isnan()
    assert not out.student_label[[0, 1, 2, 5]].any()
    assert out.ce[5] == 0
    assert torch.count_nonzero(grads["h_s"][5]) == 0


def test_padding_and_other_rows_are_neither_read_nor_written(monkeypatch):
    """Poison what `torch.empty` returns: the padding of a row and rows of a larger chunk."""
    empty = torch.empty

    def poisoned(*size, **options):
        return empty(*size, **options).fill_(float("nan"))

    inputs = make(5, 3, 218, 152)
    _, want = gradients(inputs, **TRITON)
    monkeypatch.setattr(torch, "empty", poisoned)
    _, got = gradients(inputs, **TRITON, chunk_targets=2)
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name])


def test_silent_rows_contribute_exactly_nothing():
    inputs = make(6, 4, 200, 190, ignored=0)
    silent = torch.tensor([0, 3, 5], device=DEVICE)
    inputs["labels"][silent] = -100
    out, grads = gradients(inputs, **TRITON)
    assert torch.count_nonzero(grads["h_s"][silent]) == 0
    assert torch.count_nonzero(out.ce[silent]) == 0
    assert_matches_fp64(inputs, 2e-5, TRITON)


def test_no_targets():
    inputs = make(5, 3, 90, 80)
    inputs |= {name: inputs[name][:0] for name in ("h_s", "labels", "h_t", "kd_targets")}
    inputs |= {"ce_weight": 1.0, "kd_weight": 0.0, "temperature": 2.0}
    out, grads = gradients(inputs, **TRITON)
    assert out.loss == 0
    assert torch.count_nonzero(grads["w_s"]) == 0


@pytest.mark.parametrize("wanted", [("h_s",), ("w_s",), ("h_t",), ()])
def test_only_wanted_gradients(wanted):
    inputs, every = make(4, 3, 90, 80), make(4, 3, 90, 80)
    _, full = gradients(every, **TRITON)
    chosen = [inputs[name].requires_grad_() for name in wanted]
    out = distill_loss(**inputs, **TRITON)
    assert out.loss.requires_grad == bool(wanted)
    if wanted:
        torch.testing.assert_close(torch.autograd.grad(out.loss, chosen)[0], full[wanted[0]])


def test_launch_table_keeps_rows_in_registers():
    """Blocks stay small for any vocabulary: one block of a whole row would spill."""
    from importlib import reload

    table = reload(step).launch_config
    assert [table(v) for v in (33, 1000, 2048, 49152, 151936)] == [
        (128, 1, 128), (1024, 4, 128), *[(2048, 8, 128)] * 3
    ]  # fmt: skip


def test_compile_cases_fit_the_kernel():
    for case in step.compile_cases():
        names = set(case.types) | set(case.constants)
        assert names == set(step.distill_targets_kernel.arg_names), case.name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
class TestOnDevice:
    """What the interpreter cannot show: bf16, races between warps, graphs, large offsets."""

    @pytest.fixture(autouse=True)
    def shipped_blocks(self, small_blocks, monkeypatch):
        monkeypatch.undo()

    @pytest.mark.parametrize("kl", KLS)
    @pytest.mark.parametrize("vocabs", [(49218, 49152), (32064, 32064), (1000, 1000)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_matches_fp64_autograd(self, dtype, vocabs, kl):
        inputs = make(300, 130, *vocabs, hidden_s=64, hidden_t=96, dtype=dtype)
        tolerance = max(2e-5, 2.5 * torch.finfo(dtype).eps)
        assert_matches_fp64(inputs, tolerance, TRITON | {"chunk_targets": 128}, kl=kl)

    def test_a_thousand_runs_are_equal(self):
        inputs = make(512, 300, 49218, 49152, hidden_s=64, hidden_t=64, dtype=torch.bfloat16)
        first, first_grads = gradients(inputs, chunk_targets=256)
        for _ in range(1000):
            out, grads = gradients(inputs, chunk_targets=256)
            assert all(torch.equal(a, b) for a, b in zip(out, first, strict=True))
            assert all(torch.equal(grads[name], first_grads[name]) for name in grads)

    def test_close_to_the_teacher_in_bf16(self):
        inputs = make(512, 512, 49152, 49152, hidden_t=32, dtype=torch.bfloat16, ignored=0)
        noise = 1e-2 * torch.randn_like(inputs["w_s"], dtype=torch.float32)
        near = (inputs["w_s"] + noise * inputs["w_s"].float().std()).bfloat16()
        inputs |= {"h_t": inputs["h_s"].clone(), "w_t": near, "ce_weight": 0.0}
        _, want = fp64_gradients(inputs)
        _, got = gradients(inputs)
        for name, grad in got.items():
            assert (grad.double() - want[name]).norm() / want[name].norm() <= 0.005

    def test_equal_student_and_teacher_in_bf16(self):
        inputs = make(256, 256, 49152, 49152, hidden_t=32, dtype=torch.bfloat16)
        inputs |= {"h_t": inputs["h_s"].clone(), "w_t": inputs["w_s"].clone(), "ce_weight": 0.0}
        out, grads = gradients(inputs)
        assert out.loss == 0
        assert all(grad.abs().max() <= 1e-6 for grad in grads.values())

    def test_more_than_2_31_logits_in_a_chunk(self):
        inputs = make(70000, 0, 32064, 32064, hidden_s=16, dtype=torch.bfloat16)
        whole = distill_loss(**inputs, chunk_targets=70000)
        parts = distill_loss(**inputs, chunk_targets=1000)
        torch.testing.assert_close(whole.ce, parts.ce)

    def test_captured_in_a_graph(self):
        inputs = make(300, 130, 1000, 990, dtype=torch.bfloat16)
        want, want_grads = gradients(inputs)
        want_loss = want.loss.detach().clone()
        del want  # its graph would keep the leaves bound to a stream that is not captured
        wanted = leaves(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradients(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = distill_loss(**inputs)
            grads = torch.autograd.grad(out.loss, wanted.values())
        graph.replay()
        assert torch.equal(out.loss, want_loss)
        for name, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, want_grads[name])

    def test_fullgraph_compile(self):
        inputs = make(300, 130, 1000, 990, dtype=torch.bfloat16)
        want, want_grads = gradients(inputs)
        wanted = leaves(inputs)
        out = torch.compile(distill_loss, fullgraph=True)(**inputs)
        torch.testing.assert_close(out.loss, want.loss)
        for name, grad in zip(wanted, torch.autograd.grad(out.loss, wanted.values()), strict=True):
            torch.testing.assert_close(grad, want_grads[name])

    def test_nothing_is_read_back(self):
        inputs = make(300, 130, 1000, 990, dtype=torch.bfloat16)
        gradients(inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
