"""Memory of distill_loss: bounded for any number of targets, a fraction of materialised logits."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldistill_kernels.distill_loss import chunked, reference
from ldistill_kernels.distill_loss.targets import Settings, TargetInputs
from ldistill_kernels.distill_loss.testing import make_inputs, plain_distill_loss

VOCAB_S, VOCAB_T = 49218, 49152
MIB = 1 << 20


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes held at once by tensors made inside, autograd's included.

    Works on meta tensors, so sizes that no test machine could hold can be accounted for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def exclude(self, *tensors: Tensor) -> None:
        """Tensors made outside, whose views must not count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.held += size
            self.peak = max(self.peak, self.held)

    def _drop(self, key: int, size: int) -> None:
        del self._seen[key]
        self.held -= size


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times fewer steps to trace; counts up to four times the temporaries, never less."""
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 4 * reference.TILE_ELEMENTS)


def meta_inputs(targets: int, taught: int, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    small = make_inputs(2, 1, 3, 3, hidden_s=hidden, hidden_t=hidden, dtype=dtype)
    shapes = {"h_s": (targets, hidden), "w_s": (VOCAB_S, hidden), "h_t": (taught, hidden),
              "w_t": (VOCAB_T, hidden), "kd_targets": (taught,)}  # fmt: skip
    return {
        name: torch.empty(shapes.get(name, (targets,)), dtype=value.dtype, device="meta")
        for name, value in small.items()
    }


def our_peak(targets: int, taught: int, hidden: int, dtype: torch.dtype) -> tuple[int, int]:
    """(peak bytes, bytes of the results) of the whole computation, gradients formed."""
    inputs = meta_inputs(targets, taught, hidden, dtype)
    heads = (inputs[name] for name in ("h_s", "w_s", "h_t", "w_t"))
    names = ("labels", "ce_weight", "kd_weight", "temperature")
    problem = chunked.Problem(
        *heads, TargetInputs(*(inputs[name] for name in names)), inputs["kd_targets"],
        taught_chunk=chunked.chunk_targets("cpu", VOCAB_S + VOCAB_T),
        untaught_chunk=chunked.chunk_targets("cpu", VOCAB_S), grad_h=True, grad_w=True,
    )  # fmt: skip
    settings = Settings(
        VOCAB_T, "forward", 0.5, t_squared=True, ignore_index=-100,
        grad_student=True, grad_teacher=False, grad_dtype=torch.float32,
    )  # fmt: skip
    with PeakMemory() as memory:
        memory.exclude(*inputs.values())
        solution = chunked.solve(problem, settings, reference.target_step)
    results = (solution.loss, *solution.targets, solution.grad_h_s, solution.grad_w_s)
    return memory.peak, sum(result.nbytes for result in results)


def plain_peak(targets: int, taught: int, hidden: int, dtype: torch.dtype) -> int:
    inputs = meta_inputs(targets, taught, hidden, dtype)
    wanted = [inputs[name].requires_grad_() for name in ("h_s", "w_s")]
    with PeakMemory() as memory:
        memory.exclude(*inputs.values())
        torch.autograd.grad(plain_distill_loss(**inputs)[0], wanted)
    return memory.peak


def test_the_account_is_right():
    with PeakMemory() as memory:
        a = torch.zeros(1000, device="meta")
        b = a.view(10, 100) + 1
        del a, b
        torch.zeros(500, device="meta")
    assert memory.peak == 8000
    assert memory.held == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tenth_of_plain_pytorch_at_8k_targets(large_tiles, dtype):
    """The goal, with every byte of ours counted: gradients and their fp32 sum as well."""
    ours, _ = our_peak(8192, 8192, 960, dtype)
    assert ours <= 0.1 * plain_peak(8192, 8192, 960, dtype)


@pytest.mark.parametrize("taught_share", [0.3, 1.0])
def test_extra_memory_does_not_grow_with_the_targets(large_tiles, taught_share):
    """Beyond results and a few numbers a target, 4k targets need what 2k targets need."""
    extra = {}
    for targets in (2048, 4096):
        peak, results = our_peak(targets, int(targets * taught_share), 576, torch.bfloat16)
        extra[targets] = peak - results - 100 * targets
    assert extra[4096] <= extra[2048] <= 256 * MIB


_CHILD = """
import sys, torch
from pathlib import Path
from ldistill_kernels.distill_loss import distill_loss
from ldistill_kernels.distill_loss.testing import make_inputs, plain_distill_loss

torch.set_num_threads(1)
loss = distill_loss if sys.argv[1] == "ours" else lambda **x: plain_distill_loss(**x)
targets = int(sys.argv[2])
inputs = make_inputs(targets, targets, 49218, 49152, hidden_s=32, hidden_t=32)
inputs["h_s"].requires_grad_(), inputs["w_s"].requires_grad_()

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
loss(**inputs)[0].backward()
print(status("VmHWM") - before)
"""


def resident_peak(provider: str, targets: int) -> int:
    """Bytes by which the resident memory of a process of its own rises at most."""
    command = [sys.executable, "-c", _CHILD, provider, str(targets)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_resident_memory_of_a_real_process():
    chunk = chunked.chunk_targets("cpu", VOCAB_S + VOCAB_T)
    few, many = resident_peak("ours", chunk), resident_peak("ours", 4 * chunk)
    logits_of_one = 4 * (VOCAB_S + VOCAB_T)
    assert many - few < 0.05 * 3 * chunk * logits_of_one
    assert many < 256 * MIB
    # Plain PyTorch grows with the targets: a quarter of them already needs far more.
    assert resident_peak("plain", chunk) > 2 * many
