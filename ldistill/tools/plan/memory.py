"""Memory of one GPU while a pair trains, part by part, in bytes, by formula.

Model states are counted as DeepSpeed's ZeRO holds them (its own estimators agree, and so does what
a run of two ranks really allocates: ``test_plan_memory.py``). Activations are what autograd
saves in transformers' Llama layers, operation by operation. The rest is workspace.

bf16 throughout: 2 bytes a weight, 2 a gradient, and for every trained weight an fp32 copy, two fp32
moments and, while the optimizer steps, an fp32 gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldistill.models.flops import adapter_weights
from ldistill.models.shapes import PairShape
from ldistill.tools.plan.hardware import GIB, Cluster, Strategy

LOGITS_BYTES = 384 * 2**20  # ldistill_kernels.distill_loss.chunked, on CUDA
# CUDA context, NCCL's channels, cuBLAS; and a share of the card lost to fragments.
RESERVED_BYTES, RESERVED_SHARE = int(1.5 * GIB), 0.04


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part; ``host`` is CPU memory of a whole node."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    kv_memory: float
    logits: float
    buffers: float
    reserved: float
    host: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """What lies on the GPU."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values.pop("host")
        return values

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def trained_weights(shape: PairShape, lora: int = 0) -> int:
    """Weights with gradients: projector and decoder, or projector and the decoder's adapters."""
    return shape.projector_weights + lora_weights(shape, lora) if lora else shape.trained_weights


def lora_weights(shape: PairShape, rank: int) -> int:
    """Adapters of the given rank on all seven matrices of every decoder layer."""
    return adapter_weights(shape.decoder, rank) * shape.decoder.num_hidden_layers


def memory(
    shape: PairShape,
    cluster: Cluster,
    strategy: Strategy,
    length: int,
    *,
    supervised: float = 0.2,
    tiles: float = 8.0,
) -> Memory:
    """Bytes of one GPU.

    Args:
        shape: of the pair.
        cluster: gives the ranks; its memory is not looked at.
        strategy: ZeRO, teacher engine, micro-batch.
        length: tokens of a packed row.
        supervised: share of positions that carry a label.
        tiles: pictures in a packed row.
    """
    tokens = strategy.micro_batch * length
    rows = supervised * tokens
    return Memory(
        weights=_weights(shape, cluster, strategy),
        gradients=_gradients(shape, cluster, strategy),
        optimizer=_optimizer(shape, cluster, strategy),
        teacher=_teacher(shape, cluster, strategy),
        activations=activations(shape, strategy, length)
        + max(0.0, _vision(shape, strategy.micro_batch * tiles) - logits(shape, rows, strategy)),
        kv_memory=kv_memory(shape, strategy, tokens),
        logits=logits(shape, rows, strategy),
        buffers=_buffers(shape, strategy),
        reserved=RESERVED_BYTES + RESERVED_SHARE * cluster.memory * GIB,
        host=_host(shape, cluster, strategy),
    )


# ---- model states ----


def _weights(shape: PairShape, cluster: Cluster, strategy: Strategy) -> float:
    zero, weights = strategy.zero, shape.student_weights + lora_weights(shape, strategy.lora)
    if zero.stage < 3:
        return 2 * weights
    if zero.offload_param:
        return 0.0
    # hierarchical partitioning keeps a second copy, cut over the cards of a node alone
    second = 2 * weights / zero.node_partition if zero.node_partition > 1 else 0.0
    return 2 * weights / cluster.gpus + second


def _gradients(shape: PairShape, cluster: Cluster, strategy: Strategy) -> float:
    trained, zero = trained_weights(shape, strategy.lora), strategy.zero
    if zero.offload_optimizer:
        return 0.0
    whole = 2 * trained if zero.stage == 1 else 2 * trained / cluster.gpus
    part = trained / cluster.gpus
    # the optimizer's fp32 gradient: of the whole partition, at stage 3 of a group of 1e9 at a time
    return whole + 4 * (min(part, 1e9) if zero.stage == 3 else part)


def _optimizer(shape: PairShape, cluster: Cluster, strategy: Strategy) -> float:
    if strategy.zero.offload_optimizer:
        return 0.0
    return 12 * trained_weights(shape, strategy.lora) / cluster.gpus


def _teacher(shape: PairShape, cluster: Cluster, strategy: Strategy) -> float:
    if strategy.teacher == "none":
        return 0.0
    whole = 2 * shape.teacher_weights
    if strategy.teacher != "zero3":
        return whole
    # A forward alone uses every weight once: nothing is kept but what is fetched ahead.
    live = 2 * min(shape.teacher_weights, strategy.zero.prefetch + shape.largest_module)
    return live if strategy.teacher_offload else whole / cluster.gpus + live


def _buffers(shape: PairShape, strategy: Strategy) -> float:
    """Buckets of gradient reduction and, at stage 3, gathered weights."""
    zero = strategy.zero
    if zero.stage < 3:
        return 2 * 2 * zero.reduce_bucket  # two, so that one is reduced while the other fills
    live = 2 * min(shape.student_weights, zero.kept + zero.prefetch + shape.largest_module)
    # a weight and its gradient of the largest module are whole at the same time
    return 2 * zero.reduce_bucket + max(live, 4 * shape.largest_module)


def _host(shape: PairShape, cluster: Cluster, strategy: Strategy) -> float:
    zero, trained = strategy.zero, trained_weights(shape, strategy.lora)
    share = cluster.on_node / cluster.gpus
    host = (12 + 4) * trained * share if zero.offload_optimizer else 0.0
    if zero.offload_param:
        host += 2 * shape.student_weights * share
    if strategy.teacher_offload:
        host += 2 * shape.teacher_weights * share
    return host


# ---- activations ----


def activations(shape: PairShape, strategy: Strategy, length: int, element: int = 2) -> float:
    """Bytes autograd keeps of the student's forward at its fullest.

    Args:
        shape: of the pair.
        strategy: micro-batch, checkpointing, attention backend.
        length: tokens of a packed row.
        element: bytes of the compute dtype, 2 or 4.
    """
    tokens, hidden = strategy.micro_batch * length, shape.decoder.hidden_size
    layers = shape.decoder.num_hidden_layers
    layer = layer_bytes(shape, strategy, length, element) * tokens
    # embeddings and the mask that puts pictures into them; the final norm
    ends = tokens * (hidden + _norm_bytes(hidden, element) + element * hidden)
    if strategy.attention == "sdpa":
        ends += element * length * tokens  # the block-diagonal mask
    if strategy.checkpointing:
        return layers * tokens * element * hidden + layer + ends
    return layers * layer + ends


def layer_bytes(shape: PairShape, strategy: Strategy, length: int, element: int) -> float:
    """Bytes a token leaves in one decoder layer of transformers' Llama, no checkpointing."""
    config, hidden = shape.decoder, shape.decoder.hidden_size
    queries = config.num_attention_heads * shape.head_dim
    # the norm's output is the input of the projections behind it
    norms = 2 * (_norm_bytes(hidden, element) + element * hidden)
    keys = queries if repeats_kv(shape, strategy.attention) else shape.kv_width
    # queries, keys and values as attention read them, its output, its log-sum-exp
    attention = element * (2 * queries + 2 * keys) + 4 * config.num_attention_heads
    # the gate before and after its activation, the other branch, their product
    mlp = 4 * element * config.intermediate_size
    return norms + attention + mlp + score_bytes(shape, strategy.attention, length, element)


def _norm_bytes(hidden: int, element: int) -> int:
    """RMSNorm keeps its input in fp32 and the normalised input in the compute dtype."""
    return 4 * hidden + element * hidden


def score_bytes(shape: PairShape, attention: str, length: int, element: int) -> float:
    """Bytes per token and layer that grow with the row: ``eager`` keeps probabilities, in fp32 too.

    The others keep none; SDPA's mask is one for all layers (``memory.shared_sdpa_mask``).
    """
    if attention != "eager":
        return 0.0
    return shape.decoder.num_attention_heads * length * (4 + (element if element < 4 else 0))


def repeats_kv(shape: PairShape, attention: str) -> bool:
    """Whether the backend copies keys and values to every query head of their group."""
    heads, groups = shape.decoder.num_attention_heads, shape.decoder.num_key_value_heads
    if attention == "flash_attention_2" or heads == groups:
        return False
    return not (attention == "flex_attention" and heads & (heads - 1) == 0)


def kv_memory(shape: PairShape, strategy: Strategy, tokens: float, element: int = 2) -> float:
    """Bytes that are held only because the teacher will read them.

    Where attention itself saves keys and values unrepeated, the memory is views of what is there.
    """
    if strategy.teacher == "none":
        return 0.0
    if not strategy.checkpointing and not repeats_kv(shape, strategy.attention):
        return 0.0
    return 2 * element * shape.kv_width * shape.decoder.num_hidden_layers * tokens


def logits(shape: PairShape, rows: float, strategy: Strategy) -> float:
    """Bytes of the loss: a chunk of logits, gradients of head and rows, teacher rows in passing."""
    vocabularies = shape.decoder.vocab_size
    vocabularies += 0 if strategy.teacher == "none" else shape.teacher_vocab
    chunk = min(LOGITS_BYTES, 4 * vocabularies * max(rows, 64))
    # the head's gradient is summed in fp32 and once rounded to bf16 for the optimizer
    head = 0 if strategy.lora else (4 + 2) * shape.embedding_weights
    hidden = 2 * 2 * shape.decoder.hidden_size * rows
    teacher = 0.0
    if strategy.teacher != "none":
        # one layer's rows: residual, normed, queries, gate, up, product
        config = shape.decoder
        teacher = 2 * rows * (4 * config.hidden_size + 3 * config.intermediate_size)
    return chunk + head + hidden + teacher


def _vision(shape: PairShape, tiles: float) -> float:
    """Bytes of the frozen vision tower's fullest layer: residual, normed, q, k, v, MLP."""
    config = shape.vision
    patches = (config.image_size // config.patch_size) ** 2
    return 2 * tiles * patches * (6 * config.hidden_size + 2 * config.intermediate_size)
