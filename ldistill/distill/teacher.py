"""The frozen LM over the student's keys and values: transformers' own forward, other attention.

No layer of an LM is written here. The positions that the teacher must compute, its *queries*, go
through the LM's backbone as if they were a sequence, each with its own rotary position; a
registered attention function drops the LM's keys and values and reads the student's (the paper's
section 3.1). Norms of q and k, scaled queries, experts, layers without RoPE: all that is
transformers' business. With scope ``full`` the LM's k and v projections are not run.

The teacher is no ``nn.Module`` of the student's: whatever holds it must keep it out of the trained
module's tree, or it would be saved, broadcast and counted with the student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ldistill.distill.attention import SharedKV
from ldistill.distill.targets import Queries
from ldistill.models.logits import LogitScaling
from ldistill.models.student import LMHead, keep_rotary_float32
from ldistill_kernels import shared_kv_attention

Engine = Literal["auto", "replicated", "zero3", "deepspeed-inference"]
ATTENTION = "ldistill_teacher"

_reading: ContextVar[tuple[Queries, SharedKV, str] | None] = ContextVar("_reading", default=None)
"""What the forward under way reads: its queries, the shared K/V, the choice of kernels."""


def _read_shared(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [1, heads, queries, head_dim], rotated.

    Window, soft cap and sinks (``s_aux``) are the layer's, as its model hands them over.
    """
    queries, shared, kernels = _reading.get()
    k, v = shared.keys[module.layer_idx], shared.values[module.layer_idx]
    own: dict[str, Tensor | None] = {}
    if queries.own is not None:
        # [1, kv_heads, queries, head_dim] → [own, kv_heads, head_dim]: those that others see, too
        key, value = (t[0].transpose(0, 1)[queries.own].to(k.dtype) for t in (key, value))
        start2 = queries.start2  # [queries]: where a query's document begins among the own ones
        if sliding_window:
            start2 = queries.first_own_within(sliding_window, k.shape[2])
        own = {"k2": key, "v2": value, "start2": start2, "end2": queries.end2}
    out = shared_kv_attention(
        query[0].transpose(0, 1).to(k.dtype),  # a view: [queries, heads, head_dim]
        k,
        v,
        queries.batch,
        queries.start,
        queries.index,
        visible=queries.visible,
        tiles=queries.tiles,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        scale=scaling,
        kernels=kernels,
        # All layers ask with the same arrays, so the first one's look at them is enough.
        check=None if module.layer_idx == 0 else False,
        **own,
    )
    return out.to(query.dtype)[None], None  # [1, queries, heads, head_dim]


# Without a mask function of that name transformers makes no mask: the kernel knows who sees whom.
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _read_shared)


class _OwnProjection(nn.Module):
    """A k or v projection, run only where some query sees the LM's own keys and values."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """[1, queries, hidden] → [1, queries, kv_heads × head_dim], or as many views of one 0."""
        reading = _reading.get()
        if reading is not None and reading[0].own is None:
            # The linear layer is not called, so ZeRO-3 does not gather its weight either.
            return x.new_zeros(()).expand(*x.shape[:-1], self.linear.out_features)
        return self.linear(x)


class Teacher:
    """A frozen decoder that answers queries over a :class:`SharedKV`.

    Args:
        lm: one of transformers' causal LMs whose attention goes through its attention interface.
        kernels: ``auto``, ``triton`` or ``reference``, for the attention.
    """

    def __init__(self, lm: PreTrainedModel, kernels: str = "auto") -> None:
        # Without dropout or gradients of its own, whatever mode the trained module is in.
        self.lm = lm.eval().requires_grad_(False)
        LMHead.wrap(lm.get_output_embeddings())
        keep_rotary_float32(lm)
        # A snapshot of the modules: the loop puts others in their places.
        for module in list(lm.modules()):
            for name in ("k_proj", "v_proj"):
                if isinstance(linear := getattr(module, name, None), nn.Linear):
                    setattr(module, name, _OwnProjection(linear))
        self.kernels = kernels
        self.vocab_size, self.scaling = lm.config.vocab_size, LogitScaling.of(lm.config)
        self.collective = False  # set by `shard`: every rank must run it together
        self.engine: Any = None
        self._root: _Root | None = None

    def hidden(self, queries: Queries, shared: SharedKV, through: bool = False) -> Tensor:
        """Hidden states after the final norm of the queries whose logits are wanted.

        Args:
            queries: of ``ldistill.distill.targets``; at least one.
            shared: the student's keys and values.
            through: let gradients flow into them (``kv_grad: through``); the LM's weights stay
                frozen either way.

        Returns:
            [taught, hidden] in the LM's dtype.
        """
        with nullcontext() if through else torch.no_grad(), self._reads(queries, shared):
            output = self.lm.base_model(
                input_ids=queries.token[None],  # [1, queries]
                position_ids=queries.rotary[None],
                use_cache=False,
            )
        states = output.last_hidden_state[0]  # [queries, hidden]
        return states if queries.wanted is None else states[queries.wanted]

    @contextmanager
    def _reads(self, queries: Queries, shared: SharedKV) -> Iterator[None]:
        """Within, the LM's attention is ours; outside, the LM is as transformers made it."""
        config = self.lm.base_model.config
        # The configuration decides, layer by layer, which attention a forward looks up.
        stock, config._attn_implementation = config._attn_implementation, ATTENTION
        token = _reading.set((queries, shared, self.kernels))
        try:
            yield
        finally:
            _reading.reset(token)
            config._attn_implementation = stock

    def head(self, hidden: Tensor, op: Callable[[Tensor, Tensor], Any]) -> Any:
        """``op(hidden, weight)`` with the head's weight whole, also under ZeRO-3."""
        return self.lm.get_output_embeddings()(hidden, op)

    def as_one_forward(self, make: Callable[[], Any]) -> Any:
        """``make()``, which runs the teacher up to its head, as one forward for its engine.

        DeepSpeed learns from one forward of the module it was given which weights the next one
        will ask for, and gathers them ahead; called part by part alone it gathers each when its
        part begins, and waits.
        """
        if self._root is None:
            return make()
        made = []
        self._root.make = lambda: made.append(make())
        try:
            self._root()
        finally:
            self._root.make = None  # which holds the graph
        return made[0]

    def shard(self, engine: str, dtype: torch.dtype, offload: bool = False) -> None:
        """Hand the LM to a DeepSpeed engine.

        Args:
            engine: ``zero3`` (parameters partitioned over the ranks, gathered layer by layer, no
                optimizer) or ``deepspeed-inference`` (``init_inference``, a whole copy per rank).
            dtype: compute dtype, the student's.
            offload: keep the partitions in CPU memory (``zero3``).
        """
        import deepspeed

        if engine == "zero3":
            # No optimizer: DeepSpeed partitions the weights and gathers each layer's on its way.
            self._root = _Root(self.lm).eval()
            config = zero3_config(dtype, offload)
            self.engine, *_ = deepspeed.initialize(model=self._root, config=config)
            self.collective = True
        else:
            self.engine = deepspeed.init_inference(
                self.lm, dtype=dtype, replace_with_kernel_inject=False
            )
            self.lm = self.engine.module


class _Root(nn.Module):
    """The LM as an engine's module, whose forward is whatever is done with the LM's parts.

    Nothing goes in or comes out: DeepSpeed would gather weights again in backward for the tensors
    it finds there.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self.make: Callable[[], None] | None = None

    def forward(self) -> None:
        self.make()


def zero3_config(dtype: torch.dtype, offload: bool) -> dict[str, Any]:
    """DeepSpeed configuration of a frozen, partitioned teacher."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_reuse_distance": 0,  # else weights stay whole until a backward needs them again
    }
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def choose_engine(asked: Engine, zero_stage: int) -> str:
    """``auto`` is ``zero3`` where the student is at stage 3, else ``replicated``.

    Raises:
        ValueError: ``zero3`` without DeepSpeed (stage -1).
    """
    if asked == "zero3" and zero_stage < 0:
        raise ValueError("teacher engine zero3 needs --deepspeed: it is DeepSpeed's partitioning.")
    automatic = "zero3" if zero_stage == 3 else "replicated"
    return automatic if asked == "auto" else asked
