"""The operation on CPU: reference against the definition, autograd, errors, tracing."""

import pytest
import torch

from ldistill_kernels import shared_kv_attention
from ldistill_kernels.shared_kv_attention.reference import reference_forward, row_groups
from ldistill_kernels.testing import (
    error_ratio,
    make_case,
    naive_attention,
    pack_documents,
    second_segment,
)

DOCUMENTS = [[(0, 7, 3), (7, 9, 9), (18, 4, 1)], [], [(2, 11, 4), (13, 1, 1), (14, 8, 0)]]
RATIOS = [(15, 5), (9, 3), (32, 32), (32, 8), (32, 4), (6, 1)]


def variants():
    yield "plain", make_case(DOCUMENTS, seq=24, heads=(15, 5), dtype=torch.float64)
    yield "bshd", make_case(DOCUMENTS, seq=24, heads=(9, 3), dtype=torch.float64, layout="bshd")
    case = make_case(DOCUMENTS, seq=24, heads=(6, 1), dtype=torch.float64)
    yield "second", second_segment(case, every=2)
    visible = torch.rand(3, 24, generator=torch.Generator().manual_seed(3)) < 0.5
    case = make_case(DOCUMENTS, seq=24, heads=(4, 2), dtype=torch.float64, visible=visible)
    yield "visible", case
    yield "visible and second", second_segment(case)
    hidden = torch.zeros(3, 24, dtype=torch.bool)
    yield "nothing", make_case(DOCUMENTS, seq=24, dtype=torch.float64, visible=hidden)


VARIANTS = dict(variants())


def gradients(function, case, **options):
    case = case.cast(case.q.dtype, requires_grad=True)
    out, lse = function(*case.positional, **case.options, **options)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weight).sum() + lse.sin().sum()
    return out, lse, torch.autograd.grad(loss, list(case.floats().values()))


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_gives_the_definition_and_its_gradients(name):
    expected = gradients(naive_attention, VARIANTS[name])
    actual = gradients(shared_kv_attention, VARIANTS[name], return_lse=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_backward_agrees_with_autograd_of_the_reference_forward(name):
    def plain(*positional, layout, **options):
        if layout == "bshd":
            positional = (positional[0], *(x.transpose(1, 2) for x in positional[1:3]),
                          *positional[3:])  # fmt: skip
        return reference_forward(*positional, **options)

    expected = gradients(plain, VARIANTS[name])
    actual = gradients(shared_kv_attention, VARIANTS[name], return_lse=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", RATIOS)
def test_reference_covers_every_head_ratio(heads):
    case = make_case(DOCUMENTS, seq=24, heads=heads, dtype=torch.float64)
    out = shared_kv_attention(*case.positional)
    torch.testing.assert_close(out, naive_attention(*case.positional)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reference_in_low_precision_stays_within_the_error_budget(dtype):
    case = second_segment(make_case(DOCUMENTS, seq=24, heads=(9, 3))).cast(dtype)
    exact = naive_attention(
        *case.cast(torch.float64).positional, **case.cast(torch.float64).options
    )
    baseline = naive_attention(*case.positional, **case.options)
    out, lse = shared_kv_attention(*case.positional, **case.options, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert error_ratio(out, baseline[0], exact[0]) <= 2


def test_row_groups_cut_long_documents_and_never_span_batch_rows():
    generator = torch.Generator().manual_seed(0)
    documents = pack_documents(3, 700, [700, 20, 90], [1, 15, 600], generator)
    case = make_case(documents, seq=700, heads=(1, 1))
    groups = list(row_groups(*case.positional[3:]))
    assert [g.first for g in groups] == [0, *(g.last for g in groups[:-1])]
    assert groups[-1].last == case.q.shape[0]
    for g in groups:
        rows = slice(g.first, g.last)
        assert set(case.batch[rows].tolist()) == {g.batch}
        assert int(case.start[rows].min()) == g.low
        assert int(case.position[rows].max()) == g.high - 1
    assert len(groups) < sum(len(row) for row in documents)
    torch.testing.assert_close(
        shared_kv_attention(*case.positional), naive_attention(*case.positional)[0]
    )


@pytest.mark.parametrize("kernels", ["reference"])
def test_memory_nobody_reads_may_hold_nan(kernels):
    case = VARIANTS["visible and second"]
    clean = gradients(shared_kv_attention, case, return_lse=True, kernels=kernels)
    seen = torch.zeros(3, 24, dtype=torch.bool)
    for b, s, p in zip(case.batch, case.start, case.position, strict=True):
        seen[b, s : p + 1] = True
    seen &= case.options["visible"]
    dirty = case.cast(torch.float64)
    for tensor in (dirty.k, dirty.v):
        tensor.masked_fill_(~seen[:, None, :, None], torch.nan)
    actual = gradients(shared_kv_attention, dirty, return_lse=True, kernels=kernels)
    torch.testing.assert_close(actual, clean, rtol=0, atol=0)


def test_rows_that_see_nothing_give_zero_and_minus_infinity():
    case = make_case([[(0, 5, 2)]], seq=5, dtype=torch.float64)
    batch = torch.tensor([0, 0, 0])
    start, position = torch.tensor([0, 0, 5]), torch.tensor([-1, 4, 4])
    q = torch.randn(3, 3, 16, dtype=torch.float64, requires_grad=True)
    out, lse = shared_kv_attention(q, case.k, case.v, batch, start, position, return_lse=True)
    assert (out[[0, 2]] == 0).all()
    assert (lse[[0, 2]] == -torch.inf).all()
    out.sum().backward()
    assert (q.grad[[0, 2]] == 0).all()
    assert (q.grad[1] != 0).any()


def test_no_rows_give_empty_outputs_and_zero_gradients():
    case = make_case([[(0, 5, 0)]], seq=5).cast(torch.float32, requires_grad=True)
    out = shared_kv_attention(*case.positional)
    assert out.shape == (0, 3, 16)
    out.sum().backward()
    assert (case.k.grad == 0).all()
    assert (case.v.grad == 0).all()


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradient_buffers_are_added_to_and_autograd_returns_none(layout):
    case = make_case(DOCUMENTS, seq=24, heads=(4, 2), layout=layout).cast(torch.float32, True)
    shared_kv_attention(*case.positional, **case.options).square().sum().backward()
    expected = case.k.grad, case.v.grad, case.q.grad
    other = case.cast(torch.float32, True)
    buffers = {f"grad_{name}": torch.full_like(case.k.detach(), 2.0) for name in "kv"}
    out = shared_kv_attention(*other.positional, **other.options, **buffers)
    out.square().sum().backward()
    assert other.k.grad is None
    assert other.v.grad is None
    actual = buffers["grad_k"] - 2, buffers["grad_v"] - 2, other.q.grad
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_only_the_gradients_asked_for_are_made():
    case = make_case(DOCUMENTS, seq=24)
    case.v.requires_grad_(True)
    shared_kv_attention(*case.positional).sum().backward()
    assert case.v.grad is not None
    assert case.q.grad is None
    assert case.k.grad is None
