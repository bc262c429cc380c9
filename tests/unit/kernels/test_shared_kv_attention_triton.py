"""The Triton kernels against the definition: in the interpreter without a GPU, compiled with one.

The interpreter is exact in fp32 and fp16 and wrong in bf16, which only the `gpu` tests use.
"""

import mmap
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when the kernels are defined
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it

from helpers_attention import DOCUMENTS, RATIOS, VARIANTS, assert_within_budget, gradients

from ldistill_kernels import shared_kv_attention
from ldistill_kernels.shared_kv_attention import (  # noqa: F401 - defined now
    triton_bwd,
    triton_fwd,
    triton_prepare,
)
from ldistill_kernels.shared_kv_attention.configs import (
    BackwardConfig,
    Config,
    override,
    split_backward,
    split_head_dim,
)
from ldistill_kernels.shared_kv_attention.ops import backward_op
from ldistill_kernels.testing import (
    AttentionCase,
    make_case,
    naive_attention,
    pack_documents,
    second_segment,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"forward": Config(16, 16, 4, 1), "backward": BackwardConfig(16, 16, 16, 16, 4, 1)}
UNEVEN = {"forward": Config(16, 32, 4, 1), "backward": BackwardConfig(32, 16, 16, 32, 4, 1)}
LONG = [[(0, 3, 2), (5, 50, 50)], [(0, 40, 6), (40, 15, 15)]]


def to_device(case: AttentionCase, dtype=torch.float32) -> AttentionCase:
    case = case.cast(dtype)
    options = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()
    }
    return AttentionCase(*(x.to(DEVICE) for x in case.positional), options)


def run(case, configs=SMALL, **options):
    """Outputs and gradients of the kernels."""
    with override(**configs):
        return gradients(shared_kv_attention, case, return_lse=True, kernels="triton", **options)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty holds NaN, so a kernel that leaves an element out is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_give_the_definition_and_its_gradients(name):
    case = to_device(VARIANTS[name])
    assert_within_budget(run(case), case)


@pytest.mark.parametrize("name", ["plain", "visible and second"])
def test_kernels_in_fp16(name):
    case = to_device(VARIANTS[name], torch.float16)
    assert_within_budget(run(case), case)


@pytest.mark.parametrize("configs", [SMALL, UNEVEN], ids=["square", "uneven"])
def test_long_documents_take_the_unmasked_path(configs):
    case = to_device(make_case(LONG, seq=55, heads=(3, 1)))
    assert_within_budget(run(case, configs), case)


def test_long_documents_with_invisible_positions_and_a_second_segment():
    visible = torch.rand(2, 55, generator=torch.Generator().manual_seed(0)) < 0.7
    case = to_device(second_segment(make_case(LONG, seq=55, heads=(2, 1), visible=visible)))
    assert_within_budget(run(case, UNEVEN), case)


def test_ranges_of_memory_tiles_are_searched_by_several_programs(monkeypatch):
    monkeypatch.setattr(triton_prepare, "TILES", 2)  # 8 and 5 tiles of the two segments
    case = to_device(second_segment(make_case(LONG, seq=55, heads=(2, 1))))
    assert_within_budget(run(case), case)


@pytest.mark.parametrize("heads", RATIOS)
def test_every_head_ratio(heads):
    case = to_device(make_case([[(0, 5, 2), (5, 4, 1)], [(1, 7, 3)]], seq=9, heads=heads))
    assert_within_budget(run(case), case)


@pytest.mark.parametrize("head_dim", [1, 40, 64, 72, 80, 96, 128, 192, 256])
def test_every_kind_of_head_dim(head_dim):
    documents = [[(0, 12, 8), (12, 20, 9)]]  # of fewer rows the largest error is a matter of luck
    case = to_device(make_case(documents, seq=33, heads=(4, 2), head_dim=head_dim))
    assert_within_budget(run(case), case)


def test_two_tiles_cover_every_head_dim():
    for head_dim in range(1, 257):
        for main, tail in (split_head_dim(head_dim), split_backward(head_dim)):
            assert head_dim <= main + tail <= max(16, 1 << (head_dim - 1).bit_length())
            assert all(d == 0 or (d >= 16 and d & (d - 1) == 0) for d in (main, tail))
    assert split_head_dim(80) == split_backward(80) == (64, 16)
    assert split_head_dim(96) == (64, 32)
    assert split_backward(96) == (128, 0)


@pytest.mark.parametrize("seed", range(4))
def test_random_documents_strides_and_layouts(seed):
    generator = torch.Generator().manual_seed(seed)
    documents = pack_documents(3, 40, [1, 6, 25], [0, 1, 6, 25], generator)
    layout = ["bhsd", "bshd"][seed % 2]
    case = make_case(documents, seq=40, heads=(6, 2), layout=layout, head_dim=20, seed=seed)
    case = second_segment(case, every=seed + 1) if seed else case
    case = to_device(case)
    expected = run(case)
    wide = case.cast(torch.float32)
    for name in ("q", "k", "v"):  # the same values inside larger buffers, rows and heads swapped
        value = getattr(case, name)
        axes = (1, 0, 2) if name == "q" else (2, 0, 1, 3)
        shape = [value.shape[i] + 1 for i in axes[:-1]]
        buffer = torch.full((*shape, value.shape[-1] + 3), torch.nan, device=DEVICE)
        back = [axes.index(i) for i in range(len(axes))]
        view = buffer.permute(*back)[tuple(slice(0, n) for n in value.shape)]
        view.copy_(value)
        setattr(wide, name, view)
    assert_within_budget(expected, case)
    leaves = [x.requires_grad_() for x in (wide.q, wide.k, wide.v)]
    with override(**SMALL):
        out, lse = shared_kv_attention(
            *wide.positional, **wide.options, kernels="triton", return_lse=True
        )
    loss = (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum()
    loss = loss + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()
    actual = out, *torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(actual, (expected[0], *expected[2:5]))


def test_int64_and_int32_indices_give_the_same():
    case = to_device(VARIANTS["second"])
    other = case.cast(torch.float32)
    for name in ("batch", "start", "position"):
        setattr(other, name, getattr(case, name).long())
    for name in ("start2", "end2"):
        other.options[name] = case.options[name].int()
    torch.testing.assert_close(run(case), run(other), rtol=0, atol=0)


def test_memory_nobody_reads_may_hold_nan():
    case = to_device(VARIANTS["visible and second"])
    clean = run(case)
    seen = torch.zeros(3, 24, dtype=torch.bool)
    for b, s, p in zip(case.batch, case.start, case.position, strict=True):
        seen[b, s : p + 1] = True
    seen = seen.to(DEVICE) & case.options["visible"]
    dirty = case.cast(torch.float32)
    for tensor in (dirty.k, dirty.v):
        tensor.masked_fill_(~seen[:, None, :, None], torch.nan)
    torch.testing.assert_close(run(dirty), clean, rtol=0, atol=0)


@pytest.mark.parametrize("broken", ["q", "k", "v", "k2", "v2"])
def test_nan_that_is_read_does_not_become_a_number(broken):
    """Maxima drop NaN, sums do not: what the definition makes NaN, the kernels make NaN too."""
    case = to_device(second_segment(make_case([[(0, 20, 3)]], seq=20, heads=(2, 1))))
    case.floats()[broken].view(-1, 16)[0] = torch.nan
    expected = gradients(naive_attention, case)
    assert any(x.isnan().any() for x in expected)
    for actual, want in zip(run(case), expected, strict=True):
        assert actual[want.isnan()].isnan().all()


def test_rows_that_see_nothing_give_zero_and_minus_infinity():
    case = to_device(make_case([[(0, 5, 2)]], seq=5))
    index = [torch.tensor(x, device=DEVICE) for x in ([0, 0, 0], [0, 0, 5], [-1, 4, 4])]
    q = torch.randn(3, 3, 16, device=DEVICE, requires_grad=True)
    with override(**SMALL):
        out, lse = shared_kv_attention(q, case.k, case.v, *index, return_lse=True, kernels="triton")
        assert (out[[0, 2]] == 0).all()
        assert (lse[[0, 2]] == -torch.inf).all()
        out.sum().backward()
    assert (q.grad[[0, 2]] == 0).all()
    assert torch.isfinite(q.grad).all()


def test_one_row_and_no_rows():
    case = to_device(make_case([[(0, 3, 1)]], seq=3, heads=(1, 1)))
    assert_within_budget(run(case), case)
    nothing = to_device(make_case([[(0, 3, 0)]], seq=3))
    out, _, dq, dk, dv = run(nothing)
    assert out.shape == dq.shape == (0, 3, 16)
    assert (dk == 0).all()
    assert (dv == 0).all()


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.float16])
def test_gradients_accumulate_into_given_buffers(buffer_dtype):
    case = to_device(VARIANTS["bshd"])
    _, _, dq, dk, dv = run(case)
    buffers = {
        f"grad_{name}": torch.full_like(case.k, 2.0, dtype=buffer_dtype) for name in ("k", "v")
    }
    other = case.cast(torch.float32, requires_grad=True)
    with override(**SMALL):
        out, lse = shared_kv_attention(
            *other.positional, **other.options, **buffers, kernels="triton", return_lse=True
        )
        loss = (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum()
        (loss + lse.sin().sum()).backward()
    assert other.k.grad is None
    torch.testing.assert_close(other.q.grad, dq)
    close = 1e-5 if buffer_dtype == torch.float32 else 1e-2
    torch.testing.assert_close(buffers["grad_k"].float() - 2, dk, rtol=close, atol=close)
    torch.testing.assert_close(buffers["grad_v"].float() - 2, dv, rtol=close, atol=close)


@pytest.mark.parametrize("names", [["q"], ["k"], ["v"], ["k2"], ["q", "v2"]])
def test_each_gradient_can_be_asked_for_alone(names):
    case = to_device(VARIANTS["second"])
    everything = dict(zip(case.floats(), run(case)[2:], strict=True))
    leaves = [case.floats()[name].requires_grad_() for name in names]
    with override(**SMALL):
        out, lse = shared_kv_attention(
            *case.positional, **case.options, kernels="triton", return_lse=True
        )
    loss = (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum()
    loss = loss + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()
    actual = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(actual, tuple(everything[name] for name in names))


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
def test_gradients_that_are_not_wanted_are_tensors_of_their_own(triton):
    case = to_device(make_case([[(0, 3, 1)]], seq=3, heads=(1, 1)))
    out, lse = torch.zeros_like(case.q), torch.zeros(1, 1, device=DEVICE)
    needs, buffer = [True, False, True, False, False], torch.zeros_like(case.v)
    with override(**SMALL):
        grads = backward_op(
            out, None, *case.positional, None, None, None, None, None, None, buffer, out, lse,
            needs, 1.0, triton,
        )  # fmt: skip
    assert len({grad.untyped_storage()._cdata for grad in grads}) == 5


def test_unchecked_nonsense_reads_no_foreign_memory():
    case = to_device(make_case([[(0, 5, 5)]], seq=5))
    index = [[-3, 0, 0, 7, 2**31 - 1], [-9, 0, 99, 0, 5], [4, 99, 100, 3, 2**31 - 1]]
    index = [torch.tensor(x, device=DEVICE) for x in index]
    with override(**SMALL):
        out = shared_kv_attention(case.q, case.k, case.v, *index, kernels="triton", check=False)
    assert torch.isfinite(out).all()
    assert (out[[0, 2, 3, 4]] == 0).all()


def test_offsets_beyond_int32():
    """Positions 2^27 elements apart, so that the 17th lies beyond 2^31; few pages are touched."""
    if DEVICE == "cuda":
        pytest.skip("test_strides_beyond_int32 does it there")
    case = to_device(make_case([[(0, 12, 3), (12, 8, 8)]], seq=20, heads=(2, 1)), torch.float16)
    expected = run(case)
    far = case.cast(torch.float16, requires_grad=True)
    names = ("k", "v", "grad_k", "grad_v")
    space = mmap.mmap(-1, 20 * 2**28, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    line = torch.frombuffer(space, dtype=torch.float16)  # zeros
    views = {
        name: torch.as_strided(line, (1, 1, 20, 16), (16, 16, 2**27, 1), 16 * i)
        for i, name in enumerate(names)
    }
    far.k = views["k"].copy_(case.k).requires_grad_()
    far.v = views["v"].copy_(case.v).requires_grad_()
    buffers = {name: views[name] for name in ("grad_k", "grad_v")}
    with override(**SMALL):
        out, lse = shared_kv_attention(
            *far.positional, **far.options, **buffers, kernels="triton", return_lse=True
        )
        loss = (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        (loss + lse.sin().sum()).backward()
    actual = out.detach(), lse.detach(), far.q.grad, *buffers.values()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_table_configurations_run_in_the_interpreter():
    case = to_device(VARIANTS["second"])
    assert_within_budget(run(case, {}), case)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "visible and second"])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, d) for d in (64, 80, 96, 128, 256)]
    + [(torch.float16, 64), (torch.float32, 64), (torch.float32, 128)],
)
def test_table_configurations_on_a_gpu(name, dtype, head_dim):
    options = {"visible": torch.arange(165).view(3, 55) % 3 > 0} if "visible" in name else {}
    case = make_case(LONG + DOCUMENTS[:1], seq=55, heads=(9, 3), head_dim=head_dim, **options)
    case = to_device(second_segment(case, every=2) if "second" in name else case, dtype)
    assert_within_budget(run(case, {}), case)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [[1, 40], [1024]], ids=["sparse", "dense"])
def test_a_thousand_runs_are_equal_to_the_bit(rows):
    documents = pack_documents(4, 1024, [180, 1024], rows, torch.Generator().manual_seed(0))
    case = second_segment(make_case(documents, seq=1024, heads=(15, 5), head_dim=64))
    case = to_device(case, torch.bfloat16)
    first = run(case, {})
    for _ in range(1000):
        assert all(map(torch.equal, run(case, {}), first))


@pytest.mark.gpu
def test_strides_beyond_int32():
    seq, stride = 40, 2**26  # 40 x 2^26 elements apart: offsets pass 2^31
    documents = [[(0, 17, 17), (17, 23, 23)]]
    case = to_device(make_case(documents, seq=seq, heads=(2, 1), head_dim=64), torch.bfloat16)
    far = case.cast(torch.bfloat16)
    far.k, far.v = (
        torch.empty_strided((1, 1, seq, 64), (64, 64, stride, 1), dtype=x.dtype, device=DEVICE)
        for x in (case.k, case.v)
    )
    far.k.copy_(case.k)
    far.v.copy_(case.v)
    torch.testing.assert_close(run(far, {}), run(case, {}), rtol=0, atol=0)


@pytest.mark.gpu
def test_fullgraph_compile_on_a_gpu():
    case = to_device(second_segment(make_case(LONG, seq=55, heads=(3, 1), head_dim=64)))
    case = case.cast(torch.bfloat16)
    compiled = torch.compile(shared_kv_attention, fullgraph=True)
    expected = gradients(shared_kv_attention, case, return_lse=True)
    torch.testing.assert_close(gradients(compiled, case, return_lse=True), expected)


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_rows():
    documents = [[(0, 17, 17), (17, 23, 23)]]
    case = to_device(make_case(documents, seq=40, heads=(6, 2), head_dim=64), torch.bfloat16)
    case = case.cast(torch.bfloat16, requires_grad=True)

    def step():
        out = shared_kv_attention(*case.positional, **case.options)
        return out, *torch.autograd.grad(out, (case.q, case.k, case.v), torch.ones_like(out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    case.position.copy_(torch.maximum(case.start, case.position - 1))
    with torch.no_grad():
        case.q.copy_(torch.randn_like(case.q))
    graph.replay()
    assert all(map(torch.equal, captured, step()))
