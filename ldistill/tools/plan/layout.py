"""A pair laid over a cluster, and what that costs one GPU: memory, transfers, time, by formula.

Model states are counted as DeepSpeed's ZeRO holds them (its estimators agree), activations as
autograd saves them in transformers' Llama layers (``test_plan_memory.py``). bf16 throughout: 2
bytes a weight, 2 a gradient, and for every trained weight an fp32 copy, two fp32 moments and, while
the optimizer steps, an fp32 gradient.

Collectives are counted as rings: gathering B bytes over n ranks brings every rank B (n-1)/n, a
reduction with scattering likewise, an all-reduce both. DeepSpeed's source differs from the usual
account in three places: ZeRO-1 and 2 reduce gradients by all-reduce
(``use_multi_rank_bucket_allreduce``); ZeRO-3 keeps the last weights of the forward for backward
(``stage3_max_reuse_distance``), all of them where a model is small; and with
``zero_hpz_partition_size`` only the first gather after an optimizer step leaves the node. Two ranks
really hold and send these bytes: ``tests/multirank/test_scale_measured.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ldistill.distill.attention import PACKED
from ldistill.models.flops import adapter_weights, decoder_layer_weights
from ldistill.models.shapes import PairShape
from ldistill.tools.bench.batch import RowCounts, count_rows
from ldistill.tools.plan.hardware import GIB, Cluster, Zero

WORLD, NODE, HOST = "all GPUs", "within nodes", "CPU memory"
LOGITS_BYTES = 384 * 2**20  # ldistill_kernels.distill_loss.chunked, on CUDA
# CUDA context, NCCL's channels, cuBLAS; and a share of the card lost to fragments.
RESERVED_BYTES, RESERVED_SHARE = int(1.5 * GIB), 0.04
# AdamW on the CPU reads gradient, weight and moments (16 bytes) and writes the last three and bf16.
ADAM_BYTES = 30


class Transfer(NamedTuple):
    """Bytes that enter one GPU (or leave it) for one purpose in one step, and their seconds."""

    what: str
    where: str  # WORLD, NODE or HOST
    bytes: float
    seconds: float


class Span(NamedTuple):
    """Where transfers hide behind compute as far as they can, and where none does."""

    hidden: float
    exposed: float


@dataclass(frozen=True)
class Layout:
    """One way to lay a pair over a cluster."""

    shape: PairShape
    cluster: Cluster
    zero: Zero
    teacher: str  # none, replicated, zero3 or deepspeed-inference
    micro_batch: int  # rows a card runs at once
    length: int  # tokens of a row
    accumulation: int = 1  # micro-batches of a step
    teacher_offload: bool = False  # partitions of a zero3 teacher stay in CPU memory
    checkpointing: bool = False  # activations of the decoder are recomputed in backward
    attention: str = "sdpa"  # of the student
    lora: int = 0  # rank of adapters on the decoder; 0 trains its weights
    mix: str = "paper"
    mfu: float = 0.4  # the compute is counted with

    @property
    def teacher_name(self) -> str:
        return f"{self.teacher}, offloaded" if self.teacher_offload else self.teacher

    @property
    def rows(self) -> RowCounts:
        return count_rows(self.shape.image_tokens, self.length, self.mix)

    @property
    def lora_weights(self) -> int:
        """Adapters on all seven matrices of every decoder layer."""
        return adapter_weights(self.shape.decoder, self.lora) * self.shape.decoder.num_hidden_layers

    @property
    def trained_weights(self) -> int:
        """Weights with gradients: projector and decoder, or projector and adapters."""
        shape = self.shape
        return shape.projector_weights + self.lora_weights if self.lora else shape.trained_weights

    # ---- memory ----

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes of one GPU by part."""
        loss, tower = self._loss(), self.shape.vision
        # of the frozen vision tower's fullest layer: residual, normed, q, k, v, MLP
        patch = 2 * (6 * tower.hidden_size + 2 * tower.intermediate_size)
        vision = self.micro_batch * self.rows.tiles * tower.tiles * tower.patches * patch
        return {
            **self._states(),
            "activations": self.activations() + max(0.0, vision - loss),  # done when it begins
            "kv_memory": self.kv_memory(),
            "logits": loss,
            "buffers": self._buffers(),
            "reserved": RESERVED_BYTES + RESERVED_SHARE * self.cluster.memory * GIB,
        }

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.cluster.memory * GIB

    @property
    def host_memory(self) -> float:
        """Bytes of CPU memory of a whole node."""
        shape, zero = self.shape, self.zero
        states = (12 + 4) * self.trained_weights * zero.offload_optimizer
        weights = 2 * shape.student_weights * zero.offload_param
        teacher = 2 * shape.teacher_weights * self.teacher_offload
        return (states + weights + teacher) * self.cluster.on_node / self.cluster.gpus

    def _states(self) -> dict[str, float]:
        shape, zero, gpus = self.shape, self.zero, self.cluster.gpus
        weights = 2 * (shape.student_weights + self.lora_weights)
        if zero.stage == 3:
            # hierarchical partitioning keeps a second copy, cut over the cards of a node alone
            second = weights / zero.node_partition if zero.node_partition > 1 else 0.0
            weights = 0.0 if zero.offload_param else weights / gpus + second
        part = 0.0 if zero.offload_optimizer else self.trained_weights / gpus
        gradients = 2 * part * (gpus if zero.stage == 1 else 1)
        # the optimizer's fp32 gradient: of its whole part, at stage 3 of a group of 1e9 at a time
        gradients += 4 * (min(part, 1e9) if zero.stage == 3 else part)
        teacher = 0.0 if self.teacher == "none" else 2 * shape.teacher_weights
        if self.teacher == "zero3":
            # a forward alone uses every weight once: nothing is kept but what is fetched ahead
            live = 2 * min(shape.teacher_weights, zero.prefetch + shape.largest_module)
            teacher = live if self.teacher_offload else teacher / gpus + live
        student = {"weights": weights, "gradients": gradients, "optimizer": 12 * part}
        return student | {"teacher": teacher}

    def _buffers(self) -> float:
        """Buckets of gradient reduction and, at stage 3, gathered weights."""
        zero, largest = self.zero, self.shape.largest_module
        if zero.stage < 3:
            return 2 * 2 * zero.reduce_bucket  # two, so that one is reduced while the other fills
        live = 2 * min(self.shape.student_weights, zero.kept + zero.prefetch + largest)
        # a weight and its gradient of the largest module are whole at the same time
        return 2 * zero.reduce_bucket + max(live, 4 * largest)

    def activations(self, element: int = 2) -> float:
        """Bytes autograd keeps of the student's forward at its fullest, ``element`` a number."""
        config, hidden = self.shape.decoder, self.shape.decoder.hidden_size
        # RMSNorm keeps its input in fp32 and the normalised input; its output enters projections
        norm = (4 + 2 * element) * hidden
        queries = config.num_attention_heads * self.shape.head_dim
        keys = queries if self._repeats_kv else self.shape.kv_width
        # queries, keys and values as attention read them, its output, its log-sum-exp
        layer = 2 * norm + element * 2 * (queries + keys) + 4 * config.num_attention_heads
        # the gate before and after its activation, the other branch, their product
        layer += 4 * element * config.intermediate_size
        if self.attention == "eager":  # keeps probabilities, in fp32 too
            fp32 = 4 if element < 4 else 0
            layer += config.num_attention_heads * self.length * (element + fp32)
        # embeddings and the mask that puts pictures into them; the final norm
        ends = hidden + norm
        if self.attention == "sdpa":
            ends += element * self.length  # the block-diagonal mask, one for all layers
        layers = config.num_hidden_layers * layer
        if self.checkpointing:
            layers = config.num_hidden_layers * element * hidden + layer
        return self.micro_batch * self.length * (layers + ends)

    @property
    def _repeats_kv(self) -> bool:
        """Whether attention copies keys and values to every query head of their group."""
        heads = self.shape.decoder.num_attention_heads
        compiled = self.attention == "flex_attention" and heads & (heads - 1) == 0
        grouped = heads != self.shape.decoder.num_key_value_heads
        return grouped and not compiled and self.attention not in PACKED

    def kv_memory(self, element: int = 2) -> float:
        """Bytes held only because the teacher will read them: none where attention itself saves
        keys and values unrepeated, for then they are views of what is there."""
        if self.teacher == "none" or not (self.checkpointing or self._repeats_kv):
            return 0.0
        tokens = self.micro_batch * self.length
        return 2 * element * self.shape.kv_width * self.shape.decoder.num_hidden_layers * tokens

    def _loss(self) -> float:
        """Bytes of a chunk of logits, of the gradients of head and states, of passing queries."""
        config, taught = self.shape.decoder, self.teacher != "none"
        targets = self.micro_batch * self.rows.targets
        vocabularies = config.vocab_size + self.shape.teacher_vocab * taught
        chunk = min(LOGITS_BYTES, 4 * vocabularies * max(targets, 64))
        # the head's gradient is summed in fp32 and once rounded to bf16 for the optimizer
        head = 0 if self.lora else (4 + 2) * self.shape.embedding_weights
        # of one layer of the teacher: residual, normed, queries, gate, up, product
        teacher = 2 * targets * (4 * config.hidden_size + 3 * config.intermediate_size) * taught
        return chunk + head + 2 * 2 * config.hidden_size * targets + teacher

    # ---- transfers of one optimizer step ----

    @cached_property
    def transfers(self) -> list[Transfer]:
        cluster, found, within = self.cluster, [], self.zero.node_partition
        # of what all ranks have together, how much passes one of them; GB/s
        rings = {
            WORLD: (cluster.gpus - 1, cluster.gpus, cluster.world_link),
            NODE: (within - 1, within, cluster.gpu_link),
            HOST: (1, cluster.gpus, cluster.host_link),
        }
        for what, where, whole, *rates in self._moved():
            passing, ranks, link = rings[where]
            size, rate = whole * passing / ranks, rates[0] if rates else link
            found.append(Transfer(what, where, size, size / (rate * 1e9)))
        return [transfer for transfer in found if transfer.bytes > 0]

    def _moved(self) -> Iterator[tuple]:
        """(purpose, link, bytes that all ranks have together), and GB/s if not the link's."""
        shape, zero, cluster, times = self.shape, self.zero, self.cluster, self.accumulation
        trained = 2 * self.trained_weights
        if zero.stage < 3:
            # stage 1 keeps whole gradients and reduces them once; stage 2 after every micro-batch
            yield "gradients, all-reduce", WORLD, 2 * trained * (1 if zero.stage == 1 else times)
            yield "updated weights, all-gather", WORLD, trained
        else:
            yield "gradients, reduce-scatter", WORLD, trained * times
            whole = 2 * (shape.student_weights + self.lora_weights)
            # the frozen vision tower has no backward
            decoder = whole - 2 * shape.vision_weights
            everything = (whole + max(0, decoder - 2 * zero.kept)) * times
            # the first forward fetches what the optimizer changed; the node has all else
            changed, rest = trained if self.lora else decoder, NODE
            if zero.node_partition == 1:
                changed, rest = 0, WORLD
            yield "updated weights, all-gather", WORLD, changed
            yield "weights, all-gather", rest, everything - changed
        if self.teacher == "zero3":
            yield "teacher's weights, all-gather", WORLD, 2 * shape.teacher_weights * times
        # between a card and CPU memory, and the optimizer's work there
        if zero.offload_optimizer:
            yield "gradients out, weights back", HOST, trained * (times + 1)
            rate = cluster.host_memory_rate / cluster.on_node
            yield "AdamW on the CPU", HOST, ADAM_BYTES * self.trained_weights, rate
        if zero.offload_param:
            backward = max(0, shape.trained_weights - zero.kept)
            yield "weights in", HOST, 2 * (shape.student_weights + backward) * times
        if self.teacher_offload:
            yield "teacher's weights in", HOST, 2 * shape.teacher_weights * times

    # ---- time ----

    @cached_property
    def compute(self) -> float:
        """Seconds one card computes in a step; recomputing takes extra time."""
        config, shape = self.shape.decoder, self.shape
        rows, taught = self.micro_batch * self.accumulation, self.teacher != "none"
        counts = self.rows.times(rows, self.length, teacher=taught)
        flops = shape.step_flops(counts, lora_rank=self.lora)
        if self.checkpointing:
            layer = 2 * decoder_layer_weights(config) * counts.positions
            layer += 4 * config.num_attention_heads * shape.head_dim * counts.pairs
            flops += config.num_hidden_layers * layer
        return flops / (self.mfu * self.cluster.flops)

    @property
    def network(self) -> float:
        """Seconds of all transfers, one after another."""
        return sum(transfer.seconds for transfer in self.transfers)

    @property
    def seconds(self) -> Span:
        return Span(max(self.compute, self.network), self.compute + self.network)

    @property
    def tokens_per_s(self) -> Span:
        """Real tokens, padding left out."""
        rows = self.micro_batch * self.accumulation * self.cluster.gpus
        return Span(*(self.rows.tokens * rows / seconds for seconds in self.seconds))

    def gpu_hours(self, steps: int) -> Span:
        return Span(*(seconds * steps * self.cluster.gpus / 3600 for seconds in self.seconds))
