"""`ldistill plan`: does a pair fit so many GPUs, laid out how, and what will a run take?

    plan = make_plan(pair_shape("llava-13b"), Cluster.of(32), Request())

Every layout is tried: the shipped DeepSpeed configurations, the teacher engines, micro-batches,
with and without recomputed activations. Of those that fit the fastest is taken. Nothing is
measured here: memory and bytes are formulas, compute is FLOPs over a stated MFU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ldistill.models.shapes import PairShape
from ldistill.tools.bench.batch import RowCounts, count_rows
from ldistill.tools.plan.hardware import GIB, ZEROS, Cluster
from ldistill.tools.plan.layouts import Layout, Request, fits, layouts

HORIZON = 4096  # GPUs up to which a plan that does not fit looks for one that does


@dataclass(frozen=True)
class Plan:
    """The layout chosen, and the best one of every other kind."""

    shape: PairShape
    cluster: Cluster
    request: Request
    rows: RowCounts
    chosen: Layout
    others: list[Layout]

    @property
    def tokens(self) -> float:
        """Real tokens of a step."""
        return self.rows.tokens * self.request.global_batch

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.chosen.seconds

    @property
    def tokens_per_s_exposed(self) -> float:
        return self.tokens / self.chosen.seconds_exposed

    @property
    def gpu_hours(self) -> float:
        return self._hours(self.chosen.seconds)

    @property
    def gpu_hours_exposed(self) -> float:
        return self._hours(self.chosen.seconds_exposed)

    def _hours(self, seconds: float) -> float:
        return seconds * self.request.steps * self.cluster.gpus / 3600


def make_plan(shape: PairShape, cluster: Cluster, request: Request) -> Plan:
    """The fastest layout that fits.

    Raises:
        ValueError: nothing fits (what is too big and what to change is said), or the global batch
            cannot be cut over the GPUs.
    """
    request = request.settled(shape)
    rows = count_rows(shape.image_tokens, request.length, request.mix)
    tried = list(layouts(shape, cluster, request, rows))
    fitting = [layout for layout in tried if fits(layout, cluster)]
    if not fitting:
        raise ValueError(_too_big(shape, cluster, request, tried))
    best: dict[tuple[str, str], Layout] = {}
    for layout in sorted(fitting, key=lambda layout: _cost(layout, shape.micro_batch)):
        best.setdefault((layout.strategy.zero.name, layout.strategy.teacher_name), layout)
    chosen = _simplest(list(best.values()), shape.micro_batch)
    others = [layout for layout in best.values() if layout is not chosen]
    return Plan(shape, cluster, request, rows, chosen, others)


def _cost(layout: Layout, usual: int) -> tuple[float, ...]:
    """Time; where it is the same, the micro-batch closest to the usual one; then memory."""
    distance = abs(math.log(layout.strategy.micro_batch / usual))
    return round(layout.seconds_exposed, 6), distance, layout.memory.total


def _simplest(tried: list[Layout], usual: int) -> Layout:
    """Of the layouts within a tenth of the fastest the one with the simplest configuration."""
    limit = tried[0].seconds_exposed * 1.1
    names = list(ZEROS)
    good = [layout for layout in tried if layout.seconds_exposed <= limit]
    return min(
        good, key=lambda layout: (names.index(layout.strategy.zero.name), *_cost(layout, usual))
    )


# ---- what does not fit ----


def _too_big(shape: PairShape, cluster: Cluster, request: Request, tried: list[Layout]) -> str:
    least = min(tried, key=lambda layout: layout.memory.total)
    need = least.memory.total / GIB
    parts = sorted(least.memory.parts.items(), key=lambda part: -part[1])[:2]
    largest = " and ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in parts)
    how = f"{least.strategy.zero.name}, teacher {least.strategy.teacher_name}, "
    how += f"micro-batch {least.strategy.micro_batch}"
    how += ", activations recomputed" if least.strategy.checkpointing else ""
    plural = "s" if cluster.gpus > 1 else ""
    return (
        f"{shape.name} does not fit {cluster.gpus} GPU{plural} of {cluster.memory:g} GiB: the "
        f"leanest layout ({how}) needs {need:.1f} GiB a GPU, most of it {largest} GiB. "
        f"It fits with {_remedies(shape, cluster, request, need)}."
    )


def _remedies(shape: PairShape, cluster: Cluster, request: Request, need: float) -> str:
    """What would make it fit, each tried by itself."""
    found = []
    gpus = _enough_gpus(shape, cluster, request)
    if gpus:
        found.append(f"--gpus {gpus}")
    for length in (request.length // 2, request.length // 4):
        if length > shape.image_tokens + 64 and _would_fit(
            shape, cluster, replace(request, length=length)
        ):
            found.append(f"--seq {length}")
            break
    if not request.lora and _would_fit(shape, cluster, replace(request, lora=16)):
        found.append("--lora 16")
    if request.zero and _would_fit(shape, cluster, replace(request, zero=None)):
        found.append("another configuration than --zero " + request.zero)
    if request.micro_batch and _would_fit(shape, cluster, replace(request, micro_batch=1)):
        found.append("--micro-batch 1")
    found.append(f"--gpu-memory {int(need) + 1}")
    return " or ".join(found)


def _enough_gpus(shape: PairShape, cluster: Cluster, request: Request) -> int | None:
    gpus = cluster.gpus * 2
    while gpus <= min(HORIZON, request.global_batch):
        nodes = replace(cluster, gpus=gpus, per_node=max(cluster.per_node, min(gpus, 8)))
        if request.global_batch % gpus == 0 and _would_fit(shape, nodes, request):
            return gpus
        gpus *= 2
    return None


def _would_fit(shape: PairShape, cluster: Cluster, request: Request) -> bool:
    try:
        rows = count_rows(shape.image_tokens, request.length, request.mix)
        return any(fits(layout, cluster) for layout in layouts(shape, cluster, request, rows))
    except ValueError:
        return False
