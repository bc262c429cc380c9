"""What a plan runs on: cards, nodes and the links between them; ZeRO as the shipped configs set it.

Rates are the vendors' for one direction. A link is never as fast as its datasheet: give what
`nccl-tests` measured on your machines (``--gpu-link``, ``--node-link``) where you know it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldistill.models.flops import PEAKS

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A card: memory in GiB and the link to its neighbours in GB/s, one direction."""

    memory: float
    link: float


# NVLink where the card has it, else PCIe (gen 4 x16: 32, gen 5 x16: 64).
GPUS: dict[str, GPU] = {
    "H100": GPU(80, 450),
    "H200": GPU(141, 450),
    "B200": GPU(180, 900),
    "A100": GPU(80, 300),
    "H100 PCIe": GPU(80, 64),
    "RTX PRO 6000": GPU(96, 64),
    "RTX 6000 Ada": GPU(48, 32),
    "RTX A6000": GPU(48, 32),
    "A40": GPU(48, 32),
    "L40S": GPU(48, 32),
    "RTX 4090": GPU(24, 32),
    "RTX 3090": GPU(24, 32),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs and links of a plan.

    Args:
        gpus: in all nodes together.
        per_node: GPUs of a node.
        memory: GiB of a card.
        flops: peak of a card, FLOP/s.
        gpu_link: GB/s between the cards of a node, one direction.
        node_link: GB/s into a node over all of its network cards, one direction.
        host_link: GB/s between a card and CPU memory.
        host_memory_rate: GB/s of a node's CPU memory, which bounds AdamW there.
    """

    gpus: int
    per_node: int
    memory: float
    flops: float
    gpu_link: float
    node_link: float
    host_link: float = 25.0
    host_memory_rate: float = 200.0

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    @property
    def on_node(self) -> int:
        """Cards that the plan uses of one node."""
        return min(self.gpus, self.per_node)

    @property
    def world_rate(self) -> float:
        """Bytes/s of a ring over all cards: each ring enters a node over its network once."""
        across = self.gpu_link if self.nodes == 1 else min(self.gpu_link, self.node_link)
        return across * 1e9

    @classmethod
    def of(
        cls,
        gpus: int,
        *,
        gpu: str = "H100",
        per_node: int | None = None,
        memory: float | None = None,
        tflops: float | None = None,
        gpu_link: float | None = None,
        node_link: float = 50.0,
    ) -> Cluster:
        """A cluster of a named card, each number replaceable.

        Raises:
            ValueError: unknown card, or numbers that make no cluster.
        """
        if gpu not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}.")
        card = GPUS[gpu]
        per_node = min(gpus, 8) if per_node is None else per_node
        cluster = cls(
            gpus=gpus,
            per_node=per_node,
            memory=card.memory if memory is None else memory,
            flops=PEAKS[gpu] if tflops is None else tflops * 1e12,
            gpu_link=card.link if gpu_link is None else gpu_link,
            node_link=node_link,
        )
        for name in ("gpus", "per_node", "memory", "flops", "gpu_link", "node_link"):
            if getattr(cluster, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(cluster, name)}.")
        if gpus > per_node and gpus % per_node:
            raise ValueError(
                f"{gpus} GPUs are no whole number of nodes with {per_node}: change --gpus or "
                "--gpus-per-node."
            )
        return cluster


@dataclass(frozen=True)
class Zero:
    """A file of ``ds_configs/`` as far as memory and network depend on it; sizes in elements."""

    name: str
    stage: int
    reduce_bucket: int
    offload_optimizer: bool = False
    offload_param: bool = False
    node_partition: int = 1  # zero_hpz_partition_size
    max_reuse: int = 10**9  # stage3_max_reuse_distance
    prefetch: int = 50_000_000

    @property
    def kept(self) -> int:
        """Weights at a model's end that stay whole between forward and backward.

        A gathered weight is kept if it is needed again before so many others have passed, on the
        way to the end and back, or if prefetching already looked that far ahead.
        """
        return max(self.max_reuse, self.prefetch) // 2


# The tests hold these against the files, which are not part of an installed package.
ZEROS: dict[str, Zero] = {
    zero.name: zero
    for zero in (
        Zero("zero1", 1, 200_000_000),
        Zero("zero2", 2, 200_000_000),
        Zero("zero3", 3, 100_000_000),
        Zero("zero3_multinode", 3, 100_000_000, node_partition=8),
        Zero("zero2_offload", 2, 200_000_000, offload_optimizer=True),
        Zero("zero3_offload", 3, 100_000_000, offload_optimizer=True, offload_param=True),
    )
}


@dataclass(frozen=True)
class Strategy:
    """How a pair is laid over a cluster.

    Args:
        zero: the student's DeepSpeed configuration.
        teacher: ``none``, ``replicated``, ``zero3`` or ``deepspeed-inference``.
        teacher_offload: partitions of a ``zero3`` teacher stay in CPU memory.
        micro_batch: packed rows a card runs at once.
        checkpointing: activations of the decoder are recomputed in backward.
        attention: the student's backend.
        lora: rank of adapters on the decoder; 0 trains its weights.
    """

    zero: Zero
    teacher: str
    micro_batch: int
    teacher_offload: bool = False
    checkpointing: bool = False
    attention: str = "sdpa"
    lora: int = 0

    @property
    def teacher_name(self) -> str:
        return f"{self.teacher}, offloaded" if self.teacher_offload else self.teacher
