"""Host time of a forward call of `shared_kv_attention`, on a machine with or without a GPU.

    python -m ldistill_kernels.shared_kv_attention.host_time

Everything a call does in Python is done and timed, on CPU tensors: checks, dispatch, configuration,
allocation, Triton's look-up of the compiled kernel. The launch itself does nothing. A step asks for
the layers of a model one after another: 32 of them, the same queries over other keys.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ldistill_kernels import shared_kv_attention

LAYERS, REPEATS = 32, 60
HOPPER = 227


class NoDriver:
    """What Triton asks of a GPU: compiles for sm_90 and launches nothing."""

    launched: ClassVar[list[tuple]] = []  # what the launcher was given

    class launcher_cls:
        def __init__(self, source, metadata) -> None:
            pass

        def __call__(self, *arguments) -> None:
            NoDriver.launched.append(arguments)

    class utils:
        @staticmethod
        def load_binary(*_) -> tuple:
            return object(), 0, 0, 0, 1024  # module, function, registers, spills, threads

        @staticmethod
        def get_device_properties(_) -> dict:
            return {"max_shared_mem": HOPPER * 1024}

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def calls(queries: int = 120, heads: tuple[int, int] = (15, 5), **options) -> list[Callable]:
    """The attention of each layer of a step."""
    batch = torch.arange(queries) * 8 // queries
    index = batch, torch.zeros_like(batch), torch.arange(queries)

    def layer() -> Callable:
        q = torch.randn(queries, heads[0], 64).bfloat16()
        k, v = torch.zeros(2, 8, heads[1], 1024, 64, dtype=torch.bfloat16)
        return lambda: shared_kv_attention(
            q, k, v, *index, kernels="triton", check=False, **options
        )

    return [layer() for _ in range(LAYERS)]


def microseconds(step: list[Callable]) -> float:
    """Median over steps of the time of a call."""
    times = []
    for _ in range(REPEATS):
        NoDriver.launched.clear()
        begin = time.perf_counter()
        for call in step:
            call()
        times.append((time.perf_counter() - begin) / len(step) * 1e6)
    return statistics.median(times)


def stub_the_launch() -> None:
    """From here on Triton's kernels are looked up as on sm_90 and not launched."""
    from ldistill_kernels.shared_kv_attention import configs, triton_fwd  # noqa: F401

    driver.set_active(NoDriver())
    configs.device_class = lambda device: HOPPER
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are defined: it only lets CPU tensors in


def main() -> None:
    """Print microseconds a call."""
    stub_the_launch()
    from ldistill_kernels.shared_kv_attention.triton_fwd import _launches

    tiles = torch.tensor([[i, i + 9] for i in range(0, 360, 9)], dtype=torch.int32)
    layers = calls()
    steps = {
        "a layer like the one before": layers,
        "the same with a table of tiles": calls(tiles=tiles),
        "each like the first of a step": [lambda c=c: (_launches.clear(), c()) for c in layers],
    }
    print(f"Triton {triton.__version__}, torch {torch.__version__}: microseconds a call")
    for name, step in steps.items():
        with torch.no_grad():
            print(f"{name:<32} {microseconds(step):>6.1f}")


if __name__ == "__main__":
    main()
