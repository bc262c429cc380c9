"""The ways to lay a pair over a cluster, and what each costs: what `scale_plan` chooses from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ldistill.distill.attention import BACKENDS
from ldistill.models.flops import StepCounts, decoder_layer_weights, step_flops
from ldistill.models.shapes import PairShape
from ldistill.tools.bench.batch import MIXES, RowCounts
from ldistill.tools.plan.hardware import GIB, ZEROS, Cluster, Strategy, Zero
from ldistill.tools.plan.memory import Memory, memory
from ldistill.tools.plan.network import Transfer, network_seconds, transfers

ENGINES = ("auto", "none", "replicated", "zero3", "deepspeed-inference")
MOST_ROWS = 64  # of a micro-batch that is looked for


@dataclass(frozen=True)
class Request:
    """What is asked of a plan; None leaves the choice to it, or takes the pair's usual run.

    Args:
        length, global_batch, steps: of the run.
        micro_batch: packed rows of one card.
        mfu: model FLOPs utilisation the compute is counted with.
        teacher: engine, ``auto`` to choose, ``none`` for a run on labels alone.
        zero: name of a DeepSpeed configuration.
        checkpointing: recompute activations.
        attention: the student's backend.
        mix: ``paper`` (language sources distil) or ``uniform`` (all).
        lora: rank of adapters; 0 trains the decoder's weights.
    """

    length: int | None = None
    global_batch: int | None = None
    steps: int | None = None
    micro_batch: int | None = None
    mfu: float = 0.4
    teacher: str = "auto"
    zero: str | None = None
    checkpointing: bool | None = None
    attention: str = "sdpa"
    mix: str = "paper"
    lora: int = 0

    def settled(self, shape: PairShape) -> Request:
        """With the pair's usual run where nothing was asked.

        Raises:
            ValueError: a name or number that means nothing.
        """
        for name, known in (
            ("teacher", ENGINES),
            ("zero", (None, *ZEROS)),
            ("mix", (*MIXES,)),
            ("attention", BACKENDS[1:]),
        ):
            if getattr(self, name) not in known:
                names = ", ".join(k for k in known if k)
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}.")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be above 0 and at most 1, got {self.mfu}.")
        if self.lora < 0:
            raise ValueError(f"lora must be a rank of at least 0, got {self.lora}.")
        settled = replace(
            self,
            length=shape.length if self.length is None else self.length,
            global_batch=shape.global_batch if self.global_batch is None else self.global_batch,
            steps=shape.steps if self.steps is None else self.steps,
        )
        for name in ("length", "global_batch", "steps", "micro_batch"):
            value = getattr(settled, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        return settled


@dataclass(frozen=True)
class Layout:
    """One way to lay a pair over a cluster, and what it costs."""

    strategy: Strategy
    accumulation: int
    memory: Memory
    transfers: list[Transfer]
    compute: float

    @property
    def network(self) -> float:
        """Seconds a step's transfers take by themselves."""
        return network_seconds(self.transfers)

    @property
    def seconds(self) -> float:
        """A step whose transfers hide behind its compute as far as they can."""
        return max(self.compute, self.network)

    @property
    def seconds_exposed(self) -> float:
        """A step whose transfers hide behind nothing."""
        return self.compute + self.network


def fits(layout: Layout, cluster: Cluster) -> bool:
    """Whether a layout's memory is within the card's."""
    return layout.memory.total <= cluster.memory * GIB


def layouts(
    shape: PairShape, cluster: Cluster, request: Request, rows: RowCounts
) -> Iterator[Layout]:
    for strategy in _strategies(cluster, request):
        accumulation = request.global_batch // (cluster.gpus * strategy.micro_batch)
        yield Layout(
            strategy=strategy,
            accumulation=accumulation,
            memory=memory(
                shape,
                cluster,
                strategy,
                request.length,
                supervised=rows.supervised / request.length,
                tiles=rows.tiles,
            ),
            transfers=transfers(shape, cluster, strategy, accumulation),
            compute=compute_seconds(shape, cluster, strategy, request, rows),
        )


def _strategies(cluster: Cluster, request: Request) -> Iterator[Strategy]:
    for zero in ZEROS.values():
        if request.zero is None and _pointless(zero, cluster):
            continue
        _check_node_partition(zero, cluster, request)
        for teacher, offload in _engines(zero, request.teacher):
            for micro_batch in _micro_batches(cluster, request):
                for checkpointing in (False, True):
                    if request.zero not in (None, zero.name):
                        continue
                    if request.checkpointing not in (None, checkpointing):
                        continue
                    yield Strategy(
                        zero=zero,
                        teacher=teacher,
                        micro_batch=micro_batch,
                        teacher_offload=offload,
                        checkpointing=checkpointing,
                        attention=request.attention,
                        lora=request.lora,
                    )


def _pointless(zero: Zero, cluster: Cluster) -> bool:
    """Hierarchical partitions where there is one node, or nodes of another size."""
    return zero.node_partition > 1 and (
        cluster.nodes == 1 or cluster.per_node % zero.node_partition != 0
    )


def _check_node_partition(zero: Zero, cluster: Cluster, request: Request) -> None:
    if request.zero == zero.name and cluster.on_node % zero.node_partition:
        raise ValueError(
            f"{zero.name} partitions weights within {zero.node_partition} GPUs of a node, and "
            f"{cluster.on_node} is no multiple of that: change zero_hpz_partition_size in the "
            "file, --gpus or --gpus-per-node."
        )


def _engines(zero: Zero, asked: str) -> Iterator[tuple[str, bool]]:
    if asked == "none":
        yield "none", False
    elif asked == "auto":
        yield "replicated", False
        if zero.stage == 3:
            yield "zero3", False
            yield "zero3", True
    else:
        yield asked, False
        if asked == "zero3":
            yield asked, True


def _micro_batches(cluster: Cluster, request: Request) -> list[int]:
    """Divisors of what one card takes of the global batch.

    Raises:
        ValueError: the global batch is no multiple of the GPUs, or of the micro-batch on them.
    """
    share, rest = divmod(request.global_batch, cluster.gpus)
    if rest or not share:
        raise ValueError(
            f"a global batch of {request.global_batch} rows cannot be cut over {cluster.gpus} "
            "GPUs: change --global-batch to a multiple of them, or --gpus."
        )
    if request.micro_batch is None:
        return [size for size in range(1, min(share, MOST_ROWS) + 1) if share % size == 0]
    if share % request.micro_batch:
        raise ValueError(
            f"a global batch of {request.global_batch} rows gives {share} to each of "
            f"{cluster.gpus} GPUs, which is no multiple of --micro-batch {request.micro_batch}."
        )
    return [request.micro_batch]


def compute_seconds(
    shape: PairShape, cluster: Cluster, strategy: Strategy, request: Request, rows: RowCounts
) -> float:
    """Seconds one card computes in a step at the stated MFU; recomputing takes extra time."""
    per_card = request.global_batch / cluster.gpus
    counts = rows.times(per_card, request.length, teacher=strategy.teacher != "none")
    flops = step_flops(
        shape.decoder,
        counts,
        vision_flops_per_tile=shape.vision_flops,
        projector_weights=shape.projector_weights,
        tokens_per_tile=shape.image_tokens,
        lora_rank=strategy.lora,
    )
    if strategy.checkpointing:
        flops += _recomputed_flops(shape, counts)
    return flops / (request.mfu * cluster.flops)


def _recomputed_flops(shape: PairShape, counts: StepCounts) -> float:
    config = shape.decoder
    width = config.num_attention_heads * shape.head_dim
    layer = 2 * decoder_layer_weights(config) * counts.positions + 4 * width * counts.pairs
    return config.num_hidden_layers * layer
