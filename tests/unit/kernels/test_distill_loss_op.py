"""distill_loss as PyTorch sees it: operator schema, tracing, compilation, autocast."""

from __future__ import annotations

import pytest
import torch
from helpers_distill_loss import gradients, leaves, relative
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldistill_kernels.distill_loss import chunked, distill_loss, matmul
from ldistill_kernels.distill_loss.function import OP
from ldistill_kernels.distill_loss.testing import make_inputs


def op_arguments(taught: int, grads: tuple[bool, bool, bool], dtype: torch.dtype) -> tuple:
    inputs = make_inputs(7, taught, 90, 80, dtype=dtype)
    weights = [inputs[name] for name in ("ce_weight", "kd_weight", "temperature", "kd_targets")]
    if not taught:
        weights[1:] = [None] * 3
    heads = (inputs[name] for name in ("h_s", "w_s", "h_t", "w_t", "labels"))
    settings = (80 if taught else 90, "forward", 0.5, True, 0.5, 30.0, 1.0, 0.0, -100, 3, 4, False)
    return *heads, *weights, *settings, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("taught", "grads"), [(4, (True, True, True)), (0, (True, True, False)), (7, (False,) * 3)]
)
def test_opcheck(taught, grads, dtype):
    """Schema, fake twin against real results, and tracing with dynamic shapes."""
    op = getattr(torch.ops, OP.split("::")[0]).distill_loss.default
    torch.library.opcheck(op, op_arguments(taught, grads, dtype))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_compile(backend):
    torch._dynamo.reset()
    inputs = make_inputs(12, 7, 90, 80)
    want, want_grads = gradients(inputs)
    wanted = leaves(inputs)

    @torch.compile(fullgraph=True, backend=backend)
    def loss(**inputs):
        out = distill_loss(**inputs, chunk_targets=5)
        return out.loss * 2, out.ce, out.teacher_student

    double, ce, agree = loss(**inputs)
    torch.testing.assert_close(double, want.loss * 2)
    torch.testing.assert_close(ce, want.ce)
    assert torch.equal(agree, want.teacher_student)
    grads = torch.autograd.grad(double, wanted.values())
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, want_grads[name] * 2)


def test_fullgraph_compile_rounds_narrow_gradients_once():
    torch._dynamo.reset()
    inputs = make_inputs(12, 7, 90, 80, dtype=torch.float16)
    _, want = gradients(inputs)
    wanted = leaves(inputs)
    compiled = torch.compile(distill_loss, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(**inputs).loss, wanted.values())
    for name, grad in zip(wanted, grads, strict=True):
        assert grad.dtype == torch.float16
        assert relative(grad, want[name]) < 2**-10


def test_another_number_of_targets_does_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(distill_loss, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for targets in (8, 11, 19):
        inputs = make_inputs(targets, 5, 90, 80)
        torch.testing.assert_close(compiled(**inputs).loss, distill_loss(**inputs).loss)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def test_autocast_does_not_narrow_the_products():
    inputs = make_inputs(12, 7, 90, 80)
    want, want_grads = gradients(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = gradients(inputs)
    assert out.loss == want.loss
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name])


class Products(TorchDispatchMode):
    """The dtypes of the matrix products done inside."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.overloadpacket.__name__:
            self.dtypes.append(out.dtype)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_product_on_a_gpu_is_summed_in_fp32(dtype):
    """A 16-bit result may be reduced in 16 bits; tensors without memory stand for a GPU's."""
    with FakeTensorMode(), Products() as products:
        narrow = {"dtype": dtype, "device": "cuda"}
        hidden, weight = torch.empty(4, 32, **narrow), torch.empty(90, 32, **narrow)
        grad, logits = torch.empty(4, 90, **narrow), torch.empty(4, 90, device="cuda")
        matmul.project(hidden, weight, logits)
        for first in (True, False):
            matmul.add_weight_gradient(torch.empty(90, 32, device="cuda"), grad, hidden, first)
        assert matmul.input_gradient(grad, weight).dtype == torch.float32
    assert products.dtypes == [torch.float32] * 4


class Operations(TorchDispatchMode):
    """Names of what PyTorch is asked to do, views and allocations left out."""

    FREE = ("alias", "view", "as_strided", "slice", "t", "detach", "empty", "new_empty")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_without_gradients_a_call_is_its_products_its_steps_and_one_sum(monkeypatch):
    """What else a call asks for is a launch on a GPU, and none is worth it."""
    operations, solve = Operations(), chunked.solve

    def watched(problem, settings, step):
        with operations:
            return solve(problem, settings, lambda logits, teacher, *_: (logits, teacher))

    monkeypatch.setattr(chunked, "solve", watched)
    with torch.no_grad():
        distill_loss(**make_inputs(12, 12, 90, 80), chunk_targets=4)
    assert operations.names == ["mm"] * 6 + ["sum"]


def test_second_derivative_is_refused():
    """Gradients are formed in the forward; differentiating them would silently give nothing."""
    inputs = make_inputs(6, 4, 90, 80)
    wanted = leaves(inputs)
    loss = distill_loss(**inputs).loss.square()
    grads = torch.autograd.grad(loss, wanted.values(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()
