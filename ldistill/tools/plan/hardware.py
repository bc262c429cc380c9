"""What a plan runs on: nodes, cards and the links between them; ZeRO as the shipped configs set it.

A link is never as fast as its datasheet: give what `nccl-tests` measured on your machines
(``--gpu-link``, ``--node-link``) where you know it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldistill.common.cards import CARDS

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """GPUs and links of a plan; links in GB/s, one direction."""

    gpus: int  # in all nodes together
    per_node: int
    memory: float  # GiB of a card
    flops: float  # peak of a card, FLOP/s
    gpu_link: float  # between the cards of a node
    node_link: float = 50.0  # into a node over all of its network cards
    host_link: float = 25.0  # between a card and CPU memory
    host_memory_rate: float = 200.0  # GB/s of a node's CPU memory, which bounds AdamW there

    def __str__(self) -> str:
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {self.memory:g} GiB"

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    @property
    def on_node(self) -> int:
        """Cards that the plan uses of one node."""
        return min(self.gpus, self.per_node)

    @property
    def world_link(self) -> float:
        """GB/s of a ring over all cards: each ring enters a node over its network once."""
        return self.gpu_link if self.nodes == 1 else min(self.gpu_link, self.node_link)

    @classmethod
    def of(cls, gpus: int, gpu: str = "H100", **given: float | None) -> Cluster:
        """So many GPUs of a card, 8 a node; fields that are given and not None replace its own.

        Raises ValueError: no whole number of nodes.
        """
        card = CARDS[gpu]
        usual = {"per_node": min(gpus, 8), "memory": card.memory, "flops": card.flops}
        given = {name: value for name, value in given.items() if value is not None}
        cluster = cls(gpus, **usual | {"gpu_link": card.link} | given)
        if gpus > cluster.per_node and gpus % cluster.per_node:
            raise ValueError(
                f"{gpus} GPUs are no whole number of nodes with {cluster.per_node}: change --gpus "
                "or --gpus-per-node."
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
        """Weights at a model's end that stay whole between forward and backward."""
        # those needed again before so many others have passed there and back, or fetched ahead
        return max(self.max_reuse, self.prefetch) // 2


# The simplest first. Tests hold these against the files.
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
