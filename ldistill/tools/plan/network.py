"""What crosses the links in one optimizer step, per GPU, by formula.

Collectives are counted as rings: gathering B bytes over n ranks brings every rank B (n-1)/n, a
reduction with scattering likewise, an all-reduce both. What DeepSpeed runs was read from its
source, and differs from the usual account in three places: ZeRO-1 and 2 reduce gradients by
all-reduce (``use_multi_rank_bucket_allreduce``); ZeRO-3 keeps the last weights of the forward for
backward (``stage3_max_reuse_distance``), all of them where a model is small; and with
``zero_hpz_partition_size`` only the first gather after an optimizer step leaves the node. Two ranks
really send these bytes: ``tests/multirank/test_scale_measured.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldistill.models.shapes import PairShape
from ldistill.tools.plan.hardware import Cluster, Strategy
from ldistill.tools.plan.memory import lora_weights, trained_weights

WORLD, NODE, HOST = "all GPUs", "within nodes", "CPU memory"
# AdamW on the CPU reads gradient, weight and moments (16 bytes) and writes the last three and bf16.
ADAM_BYTES = 30


@dataclass(frozen=True)
class Transfer:
    """Bytes that enter one GPU (or leave it) for one purpose, in one step.

    Args:
        what: purpose, for people.
        where: ``WORLD``, ``NODE`` or ``HOST``.
        bytes: of one optimizer step.
        seconds: on the cluster's links.
    """

    what: str
    where: str
    bytes: float
    seconds: float


def transfers(
    shape: PairShape, cluster: Cluster, strategy: Strategy, accumulation: int
) -> list[Transfer]:
    """Transfers of one optimizer step of so many micro-batches."""
    found = _student(shape, cluster, strategy, accumulation)
    found += _teacher(shape, cluster, strategy, accumulation)
    found += _host(shape, cluster, strategy, accumulation)
    return [transfer for transfer in found if transfer.bytes > 0]


def network_seconds(found: list[Transfer]) -> float:
    """Seconds of all transfers, one after another."""
    return sum(transfer.seconds for transfer in found)


def _world(what: str, size: float, cluster: Cluster) -> Transfer:
    moved = size * (cluster.gpus - 1) / cluster.gpus
    return Transfer(what, WORLD, moved, moved / cluster.world_rate)


def _student(
    shape: PairShape, cluster: Cluster, strategy: Strategy, accumulation: int
) -> list[Transfer]:
    zero, trained = strategy.zero, 2 * trained_weights(shape, strategy.lora)
    if zero.stage < 3:
        # stage 1 keeps whole gradients and reduces them once; stage 2 after every micro-batch
        times = 1 if zero.stage == 1 else accumulation
        return [
            _world("gradients, all-reduce", 2 * trained * times, cluster),
            _world("updated weights, all-gather", trained, cluster),
        ]
    found = [_world("gradients, reduce-scatter", trained * accumulation, cluster)]
    whole = 2 * (shape.student_weights + lora_weights(shape, strategy.lora))
    # the frozen vision tower has no backward
    decoder = whole - 2 * shape.vision_weights
    backward = max(0, decoder - 2 * zero.kept)
    everything = (whole + backward) * accumulation
    if zero.node_partition == 1:
        return [*found, _world("weights, all-gather", everything, cluster)]
    # The first forward fetches what the optimizer changed; all else is in the node's own copy.
    changed = trained if strategy.lora else decoder
    part = zero.node_partition
    moved = (everything - changed) * (part - 1) / part
    inside = Transfer("weights, all-gather", NODE, moved, moved / (cluster.gpu_link * 1e9))
    return [*found, _world("updated weights, all-gather", changed, cluster), inside]


def _teacher(
    shape: PairShape, cluster: Cluster, strategy: Strategy, accumulation: int
) -> list[Transfer]:
    if strategy.teacher != "zero3":
        return []
    size = 2 * shape.teacher_weights * accumulation
    return [_world("teacher's weights, all-gather", size, cluster)]


def _host(
    shape: PairShape, cluster: Cluster, strategy: Strategy, accumulation: int
) -> list[Transfer]:
    zero, rate = strategy.zero, cluster.host_link * 1e9
    found = []

    def add(what: str, size: float) -> None:
        found.append(Transfer(what, HOST, size, size / rate))

    if zero.offload_optimizer:
        part = trained_weights(shape, strategy.lora) / cluster.gpus
        add("gradients out, weights back", 2 * part * (accumulation + 1))
        adam = ADAM_BYTES * part
        seconds = adam * cluster.on_node / (cluster.host_memory_rate * 1e9)
        found.append(Transfer("AdamW on the CPU", HOST, adam, seconds))
    if zero.offload_param:
        backward = max(0, shape.trained_weights - zero.kept)
        add("weights in", 2 * (shape.student_weights + backward) / cluster.gpus * accumulation)
    if strategy.teacher_offload:
        add("teacher's weights in", 2 * shape.teacher_weights / cluster.gpus * accumulation)
    return found
