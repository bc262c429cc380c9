"""distill_loss in PyTorch on the CPU, against fp64 autograd with materialised logits."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_distill_loss import (
    KLS,
    assert_equals_teach_nothing,
    assert_matches_fp64,
    assert_near_teacher_is_exact,
    fp64_gradients,
    gradients,
    leaves,
    random_case,
    relative,
)

from ldistill_kernels.distill_loss import chunked, distill_loss
from ldistill_kernels.distill_loss.testing import make_inputs

CASES = [  # targets, targets with a teacher, vocab_s, vocab_t, chunk_targets
    (13, 13, 1000, 1000, None),
    (13, 5, 1000, 937, 4),
    (9, 9, 257, 200, 2),
    (6, 2, 49218, 49152, 5),
    (4, 4, 32064, 32064, None),
    (11, 0, 1000, 1000, 3),
    (700, 300, 1000, 990, 128),
    (1, 1, 50, 33, None),
    (1, 0, 50, 33, None),
]


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64_autograd(case, kl):
    targets, taught, vocab_s, vocab_t, chunk_targets = case
    inputs = make_inputs(targets, taught, vocab_s, vocab_t, seed=targets)
    run = {"chunk_targets": chunk_targets}
    assert_matches_fp64(inputs, 2e-5, run, kl=kl, beta=0.3)


@pytest.mark.parametrize("seed", range(40))
def test_random_cases_match_fp64_autograd(seed):
    inputs, options, run = random_case(seed, targets=40, vocab=600)
    assert_matches_fp64(inputs, 5e-4, run, **options)


@pytest.mark.parametrize("kl", KLS)
def test_gradcheck(kl):
    inputs = make_inputs(7, 4, 23, 19, hidden_s=6, hidden_t=5, dtype=torch.float64)

    def loss(h_s, w_s, h_t):
        changed = inputs | {"h_s": h_s, "w_s": w_s, "h_t": h_t}
        return distill_loss(**changed, kl=kl, beta=0.2, chunk_targets=3).loss

    assert torch.autograd.gradcheck(loss, tuple(leaves(inputs).values()))


@pytest.mark.parametrize("t_squared", [True, False])
def test_t_squared_scales_loss_and_gradient_alike(t_squared):
    inputs = make_inputs(8, 6, 300, 300)
    assert_matches_fp64(inputs, 2e-5, t_squared=t_squared)


SCALINGS = [
    {"logit_scale_s": 0.0625, "logit_scale_t": 0.125},
    {"softcap_s": 3.0, "softcap_t": 5.0},
    {"logit_scale_s": 0.5, "softcap_s": 2.0, "softcap_t": 30.0},
    {"logit_scale_t": 0.3},
]


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scaled_and_capped_logits(scaling, kl):
    assert_matches_fp64(make_inputs(9, 6, 300, 290), 2e-5, kl=kl, **scaling)


def test_gradcheck_of_capped_logits():
    inputs = make_inputs(7, 4, 23, 19, hidden_s=6, hidden_t=5, dtype=torch.float64)
    scaling = {"logit_scale_s": 0.7, "softcap_s": 2.0, "logit_scale_t": 1.3, "softcap_t": 3.0}

    def loss(h_s, w_s, h_t):
        changed = inputs | {"h_s": h_s, "w_s": w_s, "h_t": h_t}
        return distill_loss(**changed, **scaling, chunk_targets=3).loss

    assert torch.autograd.gradcheck(loss, tuple(leaves(inputs).values()))


def test_shorter_vocab_cuts_both_softmaxes():
    assert_matches_fp64(make_inputs(8, 6, 300, 290), 2e-5, vocab=120)
    assert_matches_fp64(make_inputs(8, 6, 300, 320), 2e-5, vocab=300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_fp32_logits(dtype):
    """The only rounding left is that of the returned gradients."""
    inputs = make_inputs(300, 120, 1000, 990, dtype=dtype)
    assert_matches_fp64(inputs, 1.01 * torch.finfo(dtype).eps, {"chunk_targets": 64})


def test_narrow_heads_are_widened_block_by_block(monkeypatch):
    from ldistill_kernels.distill_loss import matmul

    monkeypatch.setattr(matmul, "BLOCK_ELEMENTS", 300 * 32)
    inputs = make_inputs(20, 12, 1000, 990, dtype=torch.bfloat16)
    assert_matches_fp64(inputs, 1.01 * 2**-8)


def test_tied_head_adds_to_the_embeddings_gradient():
    inputs = make_inputs(6, 3, 90, 80, dtype=torch.float64)
    tokens = torch.arange(6) * 7
    table = inputs.pop("w_s").requires_grad_()
    mixer = torch.randn(32, 32, dtype=torch.float64) / 6
    del inputs["h_s"]
    out = distill_loss(table[tokens] @ mixer, table, **inputs)
    (tied,) = torch.autograd.grad(out.loss, table)
    a, b = table.detach().clone().requires_grad_(), table.detach().clone().requires_grad_()
    out = distill_loss(a[tokens] @ mixer, b, **inputs)
    torch.testing.assert_close(tied, sum(torch.autograd.grad(out.loss, (a, b))))


def test_equal_student_and_teacher_give_exactly_nothing():
    inputs = make_inputs(40, 40, 1000, 1000, hidden_t=32)
    for kl in KLS:
        assert_equals_teach_nothing(inputs, kl=kl)
        assert_equals_teach_nothing(inputs, kl=kl, softcap_s=7.0, softcap_t=7.0)


@pytest.mark.parametrize("kl", KLS)
def test_gradient_of_a_student_close_to_its_teacher(kl):
    """A difference of two nearly equal softmaxes: narrow logits would lose it."""
    inputs = make_inputs(64, 64, 2000, 2000, hidden_t=32, dtype=torch.bfloat16, ignored=0)
    near = inputs["w_s"] + 1e-2 * torch.randn(2000, 32) * inputs["w_s"].float().std()
    assert_near_teacher_is_exact(inputs, near.bfloat16(), kl=kl)


@pytest.mark.parametrize("kl", KLS)
def test_extreme_logits_stay_finite(kl):
    inputs = make_inputs(12, 9, 500, 480, scale=1e4, ignored=0)
    out, grads = gradients(inputs, kl=kl)
    assert all(value.isfinite().all() for value in (*out, *grads.values()))
    assert out.ce.max() > 1e3
    assert_matches_fp64(inputs, 1e-3, kl=kl)


@pytest.mark.parametrize("silence", ["weights", "labels"])
def test_silent_rows_contribute_exactly_nothing(silence):
    inputs = make_inputs(10, 6, 300, 290, ignored=0)
    silent = torch.tensor([0, 3, 7, 9])
    loud = make_inputs(10, 6, 300, 290, ignored=0)
    for each in (inputs, loud):
        if silence == "labels":
            each["labels"][silent] = -100
        else:
            each["ce_weight"][silent] = each["kd_weight"][silent] = 0
    loud["h_s"][silent] *= 50
    (out, grads), (other, other_grads) = gradients(inputs), gradients(loud)
    assert out.loss == other.loss
    assert torch.count_nonzero(grads["h_s"][silent]) == 0
    torch.testing.assert_close(grads["w_s"], other_grads["w_s"], rtol=0, atol=0)
    if silence == "labels":
        assert torch.count_nonzero(out.ce[silent]) == 0
        assert not out.student_label[silent].any()


def test_all_weights_zero():
    inputs = make_inputs(6, 4, 90, 80) | {"ce_weight": 0.0, "kd_weight": 0.0}
    out, grads = gradients(inputs)
    assert out.loss == 0
    assert out.kl.max() > 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads.values())


@pytest.mark.parametrize("taught", ["none", "empty"])
def test_no_targets(taught):
    inputs = make_inputs(5, 3, 90, 80)
    inputs |= {name: inputs[name][:0] for name in ("h_s", "labels")}
    inputs |= {"ce_weight": 1.0, "kd_weight": 0.0, "temperature": 2.0}
    if taught == "none":
        inputs |= {"h_t": None, "w_t": None, "kd_targets": None}
    else:
        inputs |= {"h_t": inputs["h_t"][:0], "kd_targets": inputs["kd_targets"][:0]}
    inputs["h_s"].requires_grad_()
    inputs["w_s"].requires_grad_()
    out = distill_loss(**inputs)
    out.loss.backward()
    assert out.loss == 0
    assert inputs["w_s"].grad.shape == (90, 32)
    assert torch.count_nonzero(inputs["w_s"].grad) == 0
    assert out.ce.shape == out.kl.shape == (0,)


def test_empty_teacher_rows_stay_in_the_graph():
    """A rank without distilling targets still runs the teacher's backward, as the others do."""
    inputs = make_inputs(5, 3, 90, 80) | {"kd_weight": 0.0}
    inputs |= {"h_t": inputs["h_t"][:0], "kd_targets": inputs["kd_targets"][:0]}
    out, grads = gradients(inputs)
    assert grads["h_t"].shape == (0, 24)
    assert out.kl.shape == out.teacher_student.shape == (0,)
    assert (out.extra_mass > 0).all()


def test_rows_without_a_teacher_never_touch_its_head():
    inputs = make_inputs(9, 4, 300, 290, ignored=0)
    alone = {k: inputs[k] for k in ("h_s", "w_s", "labels", "ce_weight")}
    want = distill_loss(**alone, h_t=None, w_t=None)
    out = distill_loss(**inputs)
    others = [target for target in range(9) if target not in inputs["kd_targets"].tolist()]
    torch.testing.assert_close(out.ce[others], want.ce[others])
    broken = inputs | {"h_t": torch.full_like(inputs["h_t"], float("nan"))}
    _, grads = gradients(broken | {"ce_weight": 1.0})
    assert grads["h_s"][others].isfinite().all()


def test_diagnostics():
    inputs = make_inputs(200, 120, 60, 50, ignored=0)
    out = distill_loss(**inputs)
    student = inputs["h_s"] @ inputs["w_s"].t()
    teacher = inputs["h_t"] @ inputs["w_t"].t()
    pairs, labels = inputs["kd_targets"], inputs["labels"]
    assert torch.equal(out.student_label, student.argmax(-1) == labels)
    agree = student[pairs, :50].argmax(-1) == teacher.argmax(-1)
    assert torch.equal(out.teacher_student, agree)
    assert torch.equal(out.teacher_label, teacher.argmax(-1) == labels[pairs])
    torch.testing.assert_close(out.extra_mass, student.softmax(-1)[:, 50:].sum(-1))
    for counted in (out.student_label, out.teacher_student, out.teacher_label):
        assert counted.any()
        assert not counted.all()


def test_only_the_loss_is_differentiable():
    inputs = make_inputs(6, 4, 90, 80)
    leaves(inputs)
    out = distill_loss(**inputs)
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out[1:])


@pytest.mark.parametrize("wanted", [("h_s",), ("w_s",), ("h_t",), ()])
def test_only_wanted_gradients(wanted):
    inputs, every = make_inputs(6, 4, 90, 80), make_inputs(6, 4, 90, 80)
    _, full = gradients(every)
    chosen = [inputs[name].requires_grad_() for name in wanted]
    out = distill_loss(**inputs)
    assert out.loss.requires_grad == bool(wanted)
    if wanted:
        (grad,) = torch.autograd.grad(out.loss, chosen)
        torch.testing.assert_close(grad, full[wanted[0]])


def test_under_no_grad_values_are_the_same():
    inputs = make_inputs(6, 4, 90, 80)
    leaves(inputs)
    with torch.no_grad():
        quiet = distill_loss(**inputs)
    loud = distill_loss(**inputs)
    assert not quiet.loss.requires_grad
    for a, b in zip(quiet, loud, strict=True):
        assert torch.equal(a, b)


def test_backward_does_not_read_the_head():
    """ZeRO-3 gathers the head for the forward and lets it go: its values are then garbage."""
    inputs, kept = make_inputs(6, 4, 90, 80), make_inputs(6, 4, 90, 80)
    _, want = gradients(kept)
    head = torch.nn.Parameter(inputs["w_s"])
    full, shard = head.data.clone(), torch.full((), float("nan"))
    loss = distill_loss(**inputs | {"w_s": head}).loss
    head.data = shard
    head.data = torch.full_like(full, float("nan"))
    loss.backward()
    assert head.grad.shape == full.shape
    torch.testing.assert_close(head.grad, want["w_s"])


def test_upstream_gradient_scales_every_gradient():
    inputs = make_inputs(6, 4, 90, 80, dtype=torch.bfloat16)
    wanted = leaves(inputs)
    loss = distill_loss(**inputs).loss
    once = torch.autograd.grad(loss, wanted.values(), retain_graph=True)
    third = torch.autograd.grad(loss / 3, wanted.values())
    for a, b in zip(once, third, strict=True):
        assert relative(b * 3, a) < 2**-7


def test_fp16_gradients_survive_a_small_weight():
    """Weights of 1e-6 put gradients below what fp16 can hold; a loss scale brings them back."""
    inputs = make_inputs(20, 12, 300, 290, dtype=torch.float16, ignored=0)
    (_, want), scale = fp64_gradients(inputs), 2.0**20
    for name in ("ce_weight", "kd_weight"):
        inputs[name] = inputs[name] / scale
    wanted = leaves(inputs)
    loss = distill_loss(**inputs).loss * scale
    for name, grad in zip(wanted, torch.autograd.grad(loss, wanted.values()), strict=True):
        assert relative(grad, want[name]) < 2e-3, name


def test_loss_does_not_depend_on_the_chunks():
    inputs = make_inputs(100, 61, 300, 290, dtype=torch.float64)
    (a, grads), (b, other) = (gradients(inputs, chunk_targets=size) for size in (7, 1000))
    torch.testing.assert_close(a.loss, b.loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other[name])


@pytest.mark.parametrize(
    ("device", "vocab", "targets"),
    [
        ("cuda", 49218 + 49152, 1024),  # 1023 would fill the budget
        ("cuda", 49218, 2048),  # twice as many where there is no teacher
        ("cuda", 2 * 128256, 384),
        ("cuda", 2 * 151936, 384),  # 331 would
        ("cuda", 2 * 262144, 128),  # 256 would be a third more than the budget
        ("cuda", 2 * 1000, 4096),
        ("cpu", 49218 + 49152, 384),
    ],
)
def test_chunks_are_whole_tiles_near_the_budget(device, vocab, targets):
    assert chunked.chunk_targets(device, vocab) == targets


def test_chunks_without_a_teacher_are_sized_as_such(monkeypatch):
    monkeypatch.setitem(chunked.LOGITS_BYTES, "cpu", 4 * 90 * 128)  # 128 targets with one head
    sizes, project = [], chunked.project

    def watched(hidden, weight, out):
        sizes.append(tuple(out.shape))
        project(hidden, weight, out)

    monkeypatch.setattr(chunked, "project", watched)
    monkeypatch.setattr(chunked, "TILE", 16)
    distill_loss(**make_inputs(300, 150, 90, 90))
    assert sizes == [(64, 90)] * 4 + [(22, 90)] * 2 + [(128, 90), (22, 90)]


def test_numbers_for_weights_and_temperature():
    inputs = make_inputs(10, 6, 90, 80)
    scalars = {"ce_weight": 0.3, "kd_weight": 0.7, "temperature": 4.0}
    tensors = {name: torch.full((10,), value) for name, value in scalars.items()}
    tensors["kd_weight"] = torch.zeros(10).index_fill(0, inputs["kd_targets"], 0.7)
    a, b = distill_loss(**inputs | scalars), distill_loss(**inputs | tensors)
    assert a.loss == b.loss
    assert math.isfinite(a.loss)


BAD = {
    "h_s": ({"h_s": torch.zeros(6)}, "h_s must be a float matrix, got torch.float32 \\[6\\]"),
    "w_s shape": ({"w_s": torch.zeros(90, 31)}, "w_s must be \\[vocab, 32\\]"),
    "w_s gathered": ({"w_s": torch.zeros(0)}, "w_s must be a float matrix"),
    "w_s dtype": ({"w_s": torch.zeros(90, 32).double()}, "w_s is torch.float64"),
    "w_s device": ({"w_s": torch.zeros(90, 32, device="meta")}, "w_s is on meta"),
    "h_t alone": ({"w_t": None}, "w_t is None but h_t is given"),
    "w_t shape": ({"w_t": torch.zeros(80, 3)}, "w_t must be \\[vocab, 24\\]"),
    "teacher too large": ({"w_t": torch.zeros(91, 24)}, "w_t has a vocabulary of 91, larger"),
    "vocab": ({"vocab": 81}, "vocab must be between 1 and 80, the shorter head, got 81"),
    "labels dtype": ({"labels": torch.zeros(6).int()}, "labels must be int64 \\[targets\\]"),
    "labels shape": ({"labels": torch.zeros(5).long()}, "labels must be int64 \\[targets\\]"),
    "labels range": ({"labels": torch.tensor([1, 2, 90, 0, 0, 0])}, "got 90 at target 2"),
    "labels negative": ({"labels": torch.tensor([1, -1, 9, 0, 0, 0])}, "got -1 at target 1"),
    "ce_weight": ({"ce_weight": -0.1}, "ce_weight must be at least 0 and finite, got -0.1"),
    "ce_weight target": (
        {"ce_weight": torch.tensor([0, 0, 1, -2, 0, 0.0])},
        "got -2.0 at target 3",
    ),
    "ce_weight shape": ({"ce_weight": torch.ones(5)}, "ce_weight must be a number or a float"),
    "ce_weight int": ({"ce_weight": torch.ones(6).long()}, "ce_weight must be a number or a fl"),
    "kd_weight nan": ({"kd_weight": float("nan")}, "kd_weight must be at least 0 and finite"),
    "kd_weight missing": ({"kd_weight": None}, "kd_weight is None but h_t is given"),
    "kd_weight uncovered": ({"kd_weight": torch.ones(6)}, "has no state in h_t"),
    "no teacher": (
        {"h_t": None, "w_t": None, "kd_targets": None, "kd_weight": 0.5},
        "kd_weight is 0.5 but h_t is None",
    ),
    "temperature": ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    "temperature target": ({"temperature": torch.tensor([1, 1, 1, 1, 0.0, 1])}, "0.0 at target 4"),
    "kd_targets missing": ({"kd_targets": None}, "h_t has 4 targets and h_s 6: pass kd_targets"),
    "kd_targets dtype": ({"kd_targets": torch.arange(4).int()}, "kd_targets must be int64 \\[4\\]"),
    "kd_targets order": ({"kd_targets": torch.tensor([0, 2, 1, 3])}, "kd_targets must be sorted"),
    "kd_targets twice": (
        {"kd_targets": torch.tensor([0, 1, 1, 3])},
        "kd_targets must be sorted and uni",
    ),
    "kd_targets range": (
        {"kd_targets": torch.tensor([0, 1, 2, 6])},
        "kd_targets must lie in \\[0, 6\\)",
    ),
    "kl": ({"kl": "sideways"}, "kl must be one of forward, reverse, jsd, got 'sideways'"),
    "beta": ({"kl": "jsd", "beta": 1.0}, "beta must lie between 0 and 1"),
    "logit_scale_s": ({"logit_scale_s": 0.0}, "logit_scale_s must be positive and finite, got 0"),
    "softcap_t": ({"softcap_t": -30.0}, "softcap_t must be positive and finite, got -30.0"),
    "chunk_targets": ({"chunk_targets": 0}, "chunk_targets must be at least 1, got 0"),
    "kernels": ({"kernels": "cuda"}, "kernels must be one of auto, triton, reference"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(bad):
    changes, message = BAD[bad]
    inputs = make_inputs(6, 4, 90, 80, ignored=0) | changes
    with pytest.raises(ValueError, match=message):
        distill_loss(**inputs)


def test_teacher_without_student_rows_is_refused():
    inputs = make_inputs(4, 4, 90, 80)
    inputs["h_t"] = torch.cat((inputs["h_t"], inputs["h_t"]))
    inputs["kd_targets"] = torch.arange(8)
    with pytest.raises(ValueError, match="kd_targets must be unique targets of h_s"):
        distill_loss(**inputs)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="kernels='triton' needs CUDA tensors"):
        distill_loss(**make_inputs(6, 4, 90, 80), kernels="triton")
