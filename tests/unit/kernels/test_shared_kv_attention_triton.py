"""The Triton kernels against the definition: in the interpreter without a GPU, compiled with one.

The interpreter is exact in fp32 and fp16 and wrong in bf16, which only the `gpu` tests use.
"""

import mmap
import os
import subprocess
import sys

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
    with_tiles,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"forward": Config(16, 16, 4, 1), "backward": BackwardConfig(16, 16, 16, 16, 4, 1)}
MEDIUM = {"forward": Config(32, 32, 4, 1), "backward": BackwardConfig(32, 32, 32, 32, 4, 1)}
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


@pytest.mark.parametrize("name", ["plain", "visible and second", "everything"])
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
    documents = [[(0, 12, 8), (12, 20, 9)]]  # of fewer, the largest error is a matter of luck
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
    for name in ("q", "k", "v"):  # the same values inside larger buffers, axes swapped
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


@pytest.mark.parametrize("seed", range(int(os.environ.get("LDISTILL_FUZZ", 8))))
def test_random_calls(seed):
    """Whatever a call may ask for, in random company; LDISTILL_FUZZ=N runs N of them."""
    case, configs = random_call(seed)
    case = to_device(case)
    exact = gradients(naive_attention, case.cast(torch.float64))
    for actual, expected in zip(run(case, configs), exact, strict=True):
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=3e-5 * size)


def random_call(seed: int) -> tuple[AttentionCase, dict]:
    """A call with any options, documents, groups of 1 to 8 and head dims up to 256; its tiles."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    seq, kv_heads, group = draw(5, 24, 70, 150), draw(1, 2), draw(1, 2, 3, 4, 5, 6, 7, 8)
    head_dim = draw(16, 16, 40, 64, 80, 128, 256)
    documents = pack_documents(draw(1, 2, 3), seq, [1, 7, 33, 90], [0, 1, 5, 40], generator)
    options = {"window": draw(None, None, 1, 2, 9, 64), "softcap": draw(None, None, 2.0)}
    if draw(False, True):
        options["sinks"] = torch.randn(group * kv_heads, generator=generator)
    if draw(False, True):
        options["visible"] = torch.rand(len(documents), seq, generator=generator) < 0.7
    case = make_case(
        documents, seq=seq, heads=(group * kv_heads, kv_heads), head_dim=head_dim,
        v_dim=draw(None, None, 24, 128), layout=draw("bhsd", "bshd"), seed=seed, **options,
    )  # fmt: skip
    if draw(False, True):  # the first queries of some documents see nothing
        first = torch.ones_like(case.start, dtype=torch.bool)
        first[1:] = (case.start[1:] != case.start[:-1]) | (case.batch[1:] != case.batch[:-1])
        blind = first & (torch.rand(len(first), generator=generator) < 0.5)
        case.position[blind] = case.start[blind] - 1
    case = second_segment(case, every=draw(1, 2, 3)) if draw(False, True) else case
    case = with_tiles(case) if draw(False, True, True) else case
    return case, draw(SMALL, UNEVEN, MEDIUM, {})


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


def test_queries_that_see_nothing_give_zero_and_minus_infinity():
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


@pytest.mark.parametrize("table", [[[0, 6], [6, 10]], [[0, 10]]], ids=["alone", "among others"])
def test_tiles_whose_queries_see_nothing_read_nothing_in_a_window(table):
    case = make_case([[(0, 12, 3), (0, 9, 2)]], seq=13, heads=(2, 1), window=2)
    case.position[:3] = case.start[:3] - 1
    case.options["tiles"] = torch.tensor(table, dtype=torch.int32)
    case = to_device(case)
    assert_within_budget(run(case), case)


def test_one_query_and_no_queries():
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
            out, None, *case.positional, *[None] * 7, buffer, out, lse, needs,
            1.0, 0, 0.0, triton,
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


@pytest.mark.parametrize("window", [1, 10, 33, 1000])
@pytest.mark.parametrize("table", [False, True], ids=["", "table"])
def test_windows_over_long_documents(window, table):
    """Tiles before, inside and after what all of their lanes see, runs that begin in a window."""
    case = make_case(LONG, seq=55, heads=(3, 1), window=window)
    case = to_device(with_tiles(case) if table else case)
    for configs in (SMALL, UNEVEN):
        assert_within_budget(run(case, configs), case)


@pytest.mark.parametrize("name", ["second", "tiles", "tiles, visible and second", "everything"])
def test_table_configurations_run_in_the_interpreter(name):
    case = to_device(VARIANTS[name])
    assert_within_budget(run(case, {}), case)


@pytest.mark.parametrize("configs", [SMALL, UNEVEN, MEDIUM, {}], ids=["16", "32", "32x32", "64"])
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 1)])
def test_tiles_of_a_table_in_every_height(configs, heads):
    """Long documents in several tiles, small ones together in one, a rest in a tile of 16 lanes."""
    documents = [[(0, 40, 25), (40, 5, 2), (45, 6, 3)], [], [(3, 7, 1), (20, 31, 7)]]
    case = to_device(with_tiles(make_case(documents, seq=51, heads=heads)))
    assert_within_budget(run(case, configs), case)


def test_a_table_changes_nothing_but_rounding():
    generator = torch.Generator().manual_seed(5)
    documents = pack_documents(3, 90, [4, 20, 60], [0, 1, 5, 30], generator)
    plain = to_device(second_segment(make_case(documents, seq=90, heads=(6, 2))))
    for actual, expected in zip(run(with_tiles(plain), {}), run(plain, {}), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_unchecked_tables_read_no_foreign_memory():
    """Tiles over two batch rows, beyond the queries, empty: garbage, but of this call's memory."""
    case = to_device(make_case([[(0, 5, 5)], [(1, 4, 4)]], seq=5, heads=(2, 1)))
    case.q.requires_grad_()
    tiles = [[0, 18], [-7, 3], [10, 2**31 - 1], [900, 2**31 - 1], [3, 3], [-(2**31), -5]]
    for table in (tiles, tiles[:1]):
        table = torch.tensor(table, dtype=torch.int32, device=DEVICE)
        for configs in (SMALL, {}):
            with override(**configs):
                out = shared_kv_attention(
                    *case.positional, tiles=table, kernels="triton", check=False
                )
                out.sum().backward()
            assert torch.isfinite(out).all()


def test_short_answers_fill_tiles_and_their_programs_end_early():
    """The schedule of the kernels themselves, counted: five-token answers, 8 rows of 1024."""
    module = "ldistill_kernels.shared_kv_attention.simulate"
    done = subprocess.run(
        [sys.executable, "-m", module, "--rows", "8", "--answers", "5"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    found = {(line[3], line[4]): line for line in lines}  # by pass, and table or none
    assert len(found) == 4
    for kind in ("forward", "backward"):
        before, after = found[kind, "none"], found[kind, "table"]
        assert int(before[7].rstrip("%")) < 20
        assert int(after[7].rstrip("%")) >= 45
        assert int(after[-1]) <= int(before[-1]) / 2


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
@pytest.mark.parametrize("queries", [[1, 40], [1024]], ids=["sparse", "dense"])
def test_a_thousand_runs_are_equal_to_the_bit(queries):
    documents = pack_documents(4, 1024, [180, 1024], queries, torch.Generator().manual_seed(0))
    case = second_segment(make_case(documents, seq=1024, heads=(15, 5), head_dim=64))
    for tried in (case, with_tiles(case)):
        tried = to_device(tried, torch.bfloat16)
        first = run(tried, {})
        for _ in range(1000):
            assert all(map(torch.equal, run(tried, {}), first))


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
def test_cuda_graph_replays_with_new_queries():
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
