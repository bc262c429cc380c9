"""Does a pair fit so many GPUs, laid out how, and what will a run take?

    plan = make_plan(pair_shape("llava-13b"), Cluster.of(32), Request())

Every layout is tried: the shipped DeepSpeed configurations, the teacher engines, micro-batches,
with and without recomputed activations. Of those that fit the fastest is taken. Nothing is
measured here: memory and bytes are formulas, compute is FLOPs over a stated MFU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from ldistill.models.shapes import PairShape
from ldistill.tools.plan.hardware import GIB, ZEROS, Cluster, Zero
from ldistill.tools.plan.layout import Layout

MOST_ROWS = 64  # of a micro-batch that is looked for
MOST_GPUS = 4096  # up to which a plan that does not fit looks for one that does


@dataclass(frozen=True)
class Request:
    """What is asked of a plan, as :class:`Layout` has it; None leaves the choice to the plan.

    Tokens of a row, rows and number of steps are then those of the pair's recipe.
    """

    length: int | None = None
    global_batch: int | None = None
    steps: int | None = None
    micro_batch: int | None = None
    mfu: float = 0.4
    teacher: str = "auto"
    zero: str | None = None  # by name
    checkpointing: bool | None = None
    attention: str = "sdpa"
    mix: str = "paper"
    lora: int = 0


class Plan(NamedTuple):
    """The layout chosen, and the best one of every other kind."""

    request: Request
    chosen: Layout
    others: list[Layout]


def make_plan(shape: PairShape, cluster: Cluster, request: Request) -> Plan:
    """The fastest layout that fits.

    Raises:
        ValueError: nothing fits (what is too big and what to change is said), or the global batch
            cannot be cut over the GPUs.
    """
    usual = {name: getattr(shape, name) for name in ("length", "global_batch", "steps")}
    request = replace(request, **{n: v for n, v in usual.items() if getattr(request, n) is None})
    tried = list(layouts(shape, cluster, request))
    fitting = sorted((layout for layout in tried if layout.fits), key=_cost)
    if not fitting:
        raise ValueError(_too_big(request, min(tried, key=lambda layout: layout.total)))
    best: dict[tuple[str, str], Layout] = {}
    for layout in fitting:
        best.setdefault((layout.zero.name, layout.teacher_name), layout)
    # within a tenth of the fastest the simplest configuration wins
    limit, simple = 1.1 * min(layout.seconds.exposed for layout in best.values()), list(ZEROS)
    good = [layout for layout in best.values() if layout.seconds.exposed <= limit]
    chosen = min(good, key=lambda layout: (simple.index(layout.zero.name), *_cost(layout)))
    return Plan(request, chosen, [layout for layout in best.values() if layout is not chosen])


def _cost(layout: Layout) -> tuple[float, ...]:
    """Time; where it is the same, the micro-batch closest to the usual one; then memory."""
    distance = abs(math.log(layout.micro_batch / layout.shape.micro_batch))
    return round(layout.seconds.exposed, 6), distance, layout.total


def layouts(shape: PairShape, cluster: Cluster, request: Request) -> Iterator[Layout]:
    """Every layout that a request leaves open.

    Raises:
        ValueError: the global batch or the partitions of ZeRO cannot be cut over the GPUs.
    """
    batch, step = request.global_batch, cluster.gpus * (request.micro_batch or 1)
    if batch % step:
        per_card = f" with --micro-batch {request.micro_batch}" if request.micro_batch else ""
        raise ValueError(
            f"a global batch of {batch} rows cannot be cut over {cluster.gpus} GPUs{per_card}, it "
            f"is no multiple of {step}: change --global-batch, --gpus or --micro-batch."
        )
    share = batch // cluster.gpus
    sizes = [request.micro_batch] if request.micro_batch else range(1, min(share, MOST_ROWS) + 1)
    recompute = (False, True) if request.checkpointing is None else (request.checkpointing,)
    fixed = {name: getattr(request, name) for name in ("attention", "lora", "mix", "mfu")}
    for zero in _zeros(cluster, request.zero):
        engines = _engines(zero, request.teacher)
        for (teacher, offload), size, checkpointing in product(engines, sizes, recompute):
            if share % size == 0:
                cut = (size, request.length, share // size)
                how = {"teacher_offload": offload, "checkpointing": checkpointing}
                yield Layout(shape, cluster, zero, teacher, *cut, **how, **fixed)


def _zeros(cluster: Cluster, asked: str | None) -> Iterator[Zero]:
    for zero in [ZEROS[asked]] if asked else ZEROS.values():
        whole = cluster.on_node % zero.node_partition == 0
        if asked and not whole:
            raise ValueError(
                f"{zero.name} partitions weights within {zero.node_partition} GPUs of a node, and "
                f"{cluster.on_node} is no multiple of that: change zero_hpz_partition_size in the "
                "file, --gpus or --gpus-per-node."
            )
        # partitions within nodes are of use where there are several
        if asked or zero.node_partition == 1 or (whole and cluster.nodes > 1):
            yield zero


def _engines(zero: Zero, asked: str) -> list[tuple[str, bool]]:
    """(engine, whether its partitions are offloaded)."""
    sharded = [("zero3", False), ("zero3", True)]
    if asked == "auto":
        return [("replicated", False), *(sharded if zero.stage == 3 else [])]
    return sharded if asked == "zero3" else [(asked, False)]


# ---- what does not fit ----


def _too_big(request: Request, least: Layout) -> str:
    cluster, need = least.cluster, least.total / GIB
    parts = sorted(least.memory.items(), key=lambda part: -part[1])[:2]
    largest = " and ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in parts)
    recomputed = ", activations recomputed" if least.checkpointing else ""
    found = [*_remedies(least.shape, cluster, request), f"--gpu-memory {int(need) + 1}"]
    return (
        f"{least.shape.name} does not fit {cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''} of "
        f"{cluster.memory:g} GiB: the leanest layout ({least.zero.name}, teacher "
        f"{least.teacher_name}, micro-batch {least.micro_batch}{recomputed}) needs {need:.1f} GiB "
        f"a GPU, most of it {largest} GiB. It fits with {' or '.join(found)}."
    )


def _remedies(shape: PairShape, cluster: Cluster, request: Request) -> Iterator[str]:
    """Flags that would make it fit, each tried by itself, of a kind the first that does."""
    doubled = (cluster.gpus * 2**n for n in range(1, MOST_GPUS.bit_length()))
    counts = [gpus for gpus in doubled if gpus <= min(MOST_GPUS, request.global_batch)]
    nodes = {gpus: max(cluster.per_node, min(gpus, 8)) for gpus in counts}
    lengths = [request.length // n for n in (2, 4) if request.length // n > shape.image_tokens + 64]
    for kind in (
        [(f"--gpus {n}", replace(cluster, gpus=n, per_node=of), {}) for n, of in nodes.items()],
        [(f"--seq {length}", cluster, {"length": length}) for length in lengths],
        [("--lora 16", cluster, {"lora": 16})],
        [(f"another configuration than --zero {request.zero}", cluster, {"zero": None})],
        [("--micro-batch 1", cluster, {"micro_batch": 1})],
    ):
        for flag, where, changes in kind:
            with suppress(ValueError):  # the batch cannot be cut like that
                tried = layouts(shape, where, replace(request, **changes))
                if any(layout.fits for layout in tried):
                    yield flag
                    break
