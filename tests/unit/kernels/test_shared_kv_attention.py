"""The operation on CPU: reference against the definition, autograd, errors, tracing."""

import os
import subprocess
import sys

import pytest
import torch
from helpers_attention import DOCUMENTS, RATIOS, VARIANTS, gradients

from ldistill_kernels import shared_kv_attention
from ldistill_kernels.shared_kv_attention.reference import query_groups, reference_forward
from ldistill_kernels.testing import (
    error_ratio,
    make_case,
    naive_attention,
    pack_documents,
    second_segment,
)

OPTIONS = ("visible", "k2", "v2", "start2", "end2", "tiles")


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
        options.pop("tiles", None)
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


def test_query_groups_cut_long_documents_and_never_span_batch_rows():
    generator = torch.Generator().manual_seed(0)
    documents = pack_documents(3, 700, [700, 20, 90], [1, 15, 600], generator)
    case = make_case(documents, seq=700, heads=(1, 1))
    groups = list(query_groups(*case.positional[3:]))
    assert [g.first for g in groups] == [0, *(g.last for g in groups[:-1])]
    assert groups[-1].last == case.q.shape[0]
    for g in groups:
        queries = slice(g.first, g.last)
        assert set(case.batch[queries].tolist()) == {g.batch}
        assert int(case.start[queries].min()) == g.low
        assert int(case.position[queries].max()) == g.high - 1
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


def test_queries_that_see_nothing_give_zero_and_minus_infinity():
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


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_with_a_sink_alone_the_output_is_0_and_the_sink_the_log_sum_exp(kernels, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the interpreter has the kernels on CPU tensors")
    case = make_case([[(0, 5, 2)]], seq=5)
    index = torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([-1, 4])
    sinks = torch.tensor([-1.0, 0.0, 3.0])
    q = torch.randn(2, 3, 16)
    out, lse = shared_kv_attention(
        q, case.k, case.v, *index, sinks=sinks, return_lse=True, kernels=kernels
    )
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[0], sinks)
    assert (lse[1] > sinks).all()


def test_no_queries_give_empty_outputs_and_zero_gradients():
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


@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck_of_both_ops(name):
    case = VARIANTS[name].cast(torch.float32, requires_grad=True)
    k, v = case.k, case.v
    if case.options.get("layout") == "bshd":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    options = [case.options.get(x) for x in OPTIONS]
    inputs = (case.q, k, v, case.batch, case.start, case.position, *options)
    options = case.options
    scores = 0.25, options.get("window", 0), options.get("softcap", 0.0)
    sinks = options.get("sinks")
    sinks = sinks if sinks is None else sinks.detach()
    arguments = (*inputs, sinks, None, None, *scores, False, True)
    torch.library.opcheck(torch.ops.ldistill.shared_kv_attention.default, arguments)
    inputs = [x if x is None else x.detach() for x in inputs]
    out, lse = torch.ops.ldistill.shared_kv_attention(
        *inputs, sinks, None, None, *scores, False, True
    )
    second = inputs[7] is not None
    needs = [True, True, True, second, second]
    buffer = torch.zeros_like(inputs[2])
    arguments = (out, torch.ones_like(lse), *inputs, None, buffer, out, lse, needs, *scores, False)
    torch.library.opcheck(torch.ops.ldistill.shared_kv_attention_backward.default, arguments)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_fullgraph_compile_gives_the_eager_result_and_gradients(layout):
    case = second_segment(make_case(DOCUMENTS, seq=24, heads=(4, 2), layout=layout))
    compiled = torch.compile(
        lambda *args, **options: shared_kv_attention(*args, **options),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = gradients(shared_kv_attention, case, return_lse=True)
    actual = gradients(compiled, case, return_lse=True)
    torch.testing.assert_close(actual, expected)


def test_compiled_code_still_refuses_unsorted_queries():
    case = make_case(DOCUMENTS, seq=24)
    compiled = torch.compile(shared_kv_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="sorted by"):
        compiled(case.q, case.k, case.v, case.batch.flip(0), case.start, case.position)


def base() -> dict:
    case = second_segment(make_case([[(0, 4, 2), (4, 4, 3)]], seq=8, heads=(4, 2)))
    names = ("q", "k", "v", "batch", "start", "position")
    return dict(zip(names, case.positional, strict=True)) | case.options


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


BAD = {
    "layout": (lambda a: {"layout": "sbhd"}, "layout must be .* got 'sbhd'"),
    "kernels": (lambda a: {"kernels": "cuda"}, "kernels must be one of .* got 'cuda'"),
    "q dims": (lambda a: {"q": a["q"][0]}, r"q must have 3 dimensions, got shape \(4, 16\)"),
    "k dims": (lambda a: {"k": a["k"][0]}, "k must have 4 dimensions"),
    "v shape": (lambda a: {"v": a["v"][:, :, 1:]}, r"v must have shape .* got \(1, 2, 7, 16\)"),
    "q type": (
        lambda a: {"q": a["q"].int()},
        "q must be fp16, bf16, fp32 or fp64, got torch.int32",
    ),
    "k type": (lambda a: {"k": a["k"].half()}, "k must be torch.float32, got torch.float16"),
    "k device": (lambda a: {"k": a["k"].to("meta")}, "k must be on cpu like q, got meta"),
    "head dim": (lambda a: {"q": a["q"][..., :8]}, "k has head dim 16, q has 8"),
    "heads": (lambda a: {"q": a["q"][:, :3]}, "q has 3 heads, not a multiple of the 2 heads of k"),
    "q stride": (lambda a: {"q": a["q"].mT.contiguous().mT}, "q must have last stride 1"),
    "v stride": (lambda a: {"v": a["v"].mT.contiguous().mT}, "v must have last stride 1"),
    "batch type": (lambda a: {"batch": a["batch"].float()}, "batch must be int32 or int64"),
    "position stride": (
        lambda a: {"position": torch.stack([a["position"]] * 2, 1)[:, 0]},
        r"position must have last stride 1, got strides \(2,\)",
    ),
    "start size": (
        lambda a: {"start": a["start"][1:]},
        r"start must have shape \(5,\), got \(4,\)",
    ),
    "visible size": (
        lambda a: {"visible": torch.ones(1, 7, dtype=torch.bool)},
        "visible must have",
    ),
    "visible type": (lambda a: {"visible": torch.ones(1, 8)}, "visible must be torch.bool"),
    "half a segment": (lambda a: {"v2": None}, r"needs k2, v2, start2 and end2; missing: \['v2'\]"),
    "k2 heads": (lambda a: {"k2": a["k2"][:, :1]}, "k2 must have shape"),
    "k2 dims": (lambda a: {"k2": a["k2"][0]}, "k2 must have 3 dimensions"),
    "end2 type": (lambda a: {"end2": a["end2"].half()}, "end2 must be int32 or int64"),
    "window": (lambda a: {"window": 0}, "window must be positive, got 0"),
    "softcap": (lambda a: {"softcap": -2.0}, "softcap must be positive, got -2.0"),
    "sinks size": (lambda a: {"sinks": torch.zeros(3)}, r"sinks must have shape \(4,\)"),
    "sinks type": (lambda a: {"sinks": integers(1, 2, 3, 4)}, "sinks must be fp16, bf16, fp32"),
    "sinks gradient": (
        lambda a: {"sinks": torch.zeros(4, requires_grad=True)},
        "sinks get no gradient",
    ),
    "v2 width": (lambda a: {"v": a["v"][..., :8]}, r"v2 must have shape \(5, 2, 8\)"),
    "scale": (lambda a: {"scale": -1.0}, "scale must be positive, got -1.0"),
    "buffer": (lambda a: {"grad_k": a["k"][0]}, "grad_k must have shape"),
    "buffer type": (lambda a: {"grad_v": a["v"].int()}, "grad_v must be fp16, bf16, fp32 or fp64"),
    "batch range": (
        lambda a: {"batch": integers(0, 0, 0, 0, 1)},
        r"batch\[4\] = 1 is outside 0..0",
    ),
    "start range": (lambda a: {"start": integers(-1, 0, 4, 4, 4)}, r"start\[0\] = -1 is outside"),
    "position range": (
        lambda a: {"position": integers(2, 3, 5, 6, 8)},
        r"position\[4\] = 8 is out",
    ),
    "before": (lambda a: {"position": integers(2, 3, 2, 6, 7)}, r"position\[2\] = 2 lies before"),
    "outside": (lambda a: {"position": integers(2, 4, 5, 6, 7)}, r"position\[1\] = 4 lies outside"),
    "unsorted": (lambda a: {"position": integers(3, 2, 5, 6, 7)}, "queries must be sorted by"),
    "starts": (lambda a: {"start": integers(3, 0, 4, 4, 4)}, "queries must be sorted by"),
    "start2 order": (lambda a: {"start2": integers(0, 0, 2, 1, 2)}, r"start2 must not decrease"),
    "end2 range": (lambda a: {"end2": integers(1, 2, 3, 4, 9)}, r"end2\[4\] = 9 is outside 0..5"),
    "end2 first": (
        lambda a: {"start2": integers(0, 0, 4, 4, 4)},
        r"end2\[2\] = 3 lies before start2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    change, message = BAD[name]
    arguments = base()
    shared_kv_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        shared_kv_attention(**arguments | change(arguments))


def test_values_are_not_looked_at_when_checks_are_off():
    arguments = base()
    arguments["start"] = integers(0, 0, 0, 0, 0)  # one document inside another: fine to compute
    with pytest.raises(ValueError, match="sorted"):
        shared_kv_attention(**arguments | {"position": integers(2, 3, 7, 6, 7)})
    assert shared_kv_attention(**arguments, check=False).shape == arguments["q"].shape


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got q on cpu"):
        shared_kv_attention(**base(), kernels="triton")


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"head_dim": 257}])
def test_what_only_the_reference_can_do(change, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case([[(0, 4, 2)]], seq=4, **change)
    with pytest.raises(ValueError, match=r"reference'|up to 256"):
        shared_kv_attention(*case.positional, kernels="triton")
    assert shared_kv_attention(*case.positional).isfinite().all()


LAUNCHES = """
import torch
from ldistill_kernels import shared_kv_attention
from ldistill_kernels.shared_kv_attention import host_time, triton_fwd

host_time.stub_the_launch()
launched, kept = host_time.NoDriver.launched, triton_fwd._launches
call, other = host_time.calls(queries=12)[0], host_time.calls(queries=13)[0]
with torch.no_grad():
    call(), call()
first, again = launched
assert len(first) == len(again)
outputs = [i for i, x in enumerate(first) if isinstance(x, torch.Tensor)][-2:]  # new ones each time
for i, (x, y) in enumerate(zip(first, again)):
    if i in outputs:
        assert x.shape == y.shape and x.data_ptr() != y.data_ptr()
    elif isinstance(x, torch.Tensor):
        assert x is y
    elif i != 6:  # what profilers are told, made anew
        assert x == y, (i, x, y)
assert len(kept) == 1
with torch.no_grad():
    other()
    assert len(kept) == 2  # other shapes
    odd = torch.zeros(12 * 15 * 64 + 1).bfloat16()[1:].view(12, 15, 64)
    index = [torch.zeros(12, dtype=torch.int64)] * 3
    memory = torch.zeros(1, 5, 20, 64).bfloat16()
    shared_kv_attention(odd, memory, memory, *index, kernels="triton", check=False)
    assert len(kept) == 2  # a pointer that 16 does not divide is another kernel
shared_kv_attention(odd.clone().requires_grad_(), memory, memory, *index, kernels="triton",
                    check=False)
assert len(kept) == 2 and len(launched) == 5  # autograd's way
try:
    with torch.no_grad():
        shared_kv_attention(odd[:, :, :32], memory, memory, *index, kernels="triton", check=False)
except ValueError as error:
    assert "k has head dim 64, q has 32" in str(error)
else:
    raise AssertionError("not checked")
"""


def test_a_call_like_the_last_launches_the_same_without_asking_triton_again():
    """In a child: this process has the interpreter, which compiles and keeps nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_queries_that_have_no_key_at_all_are_nothing():
    """The fused CPU kernel would divide by the number of keys."""
    q, k = torch.randn(2, 3, 16), torch.randn(1, 1, 4, 16)
    batch, start = torch.zeros(2, dtype=torch.long), torch.tensor([1, 1])
    with torch.no_grad():
        out, lse = shared_kv_attention(q, k, k, batch, start, start - 1, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
