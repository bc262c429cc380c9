"""The frozen LM run over the student's memory: its queries, the student's keys and values.

A teacher row starts from the LM's own embedding of its token; in every layer it forms a query with
the LM's weights, rotates it at its multimodal position, attends over the memory and goes on through
the LM's output projection, norms and MLP (the paper's section 3.1). With scope ``full`` the LM's
k/v projections are never run, and only supervised rows of distilling sources are computed.

The teacher is no ``nn.Module`` of the student's: whatever holds it must keep it out of the trained
module's tree, or it would be saved, broadcast and counted with the student.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from ldistill.common.partition import partitioned_by
from ldistill.distill.attention import KVMemory
from ldistill.distill.targets import TeacherRows
from ldistill.models.head import LMHead
from ldistill.models.rotary import keep_float32
from ldistill.models.weights import read_model, refuse_misfit
from ldistill_kernels import shared_kv_attention

T = TypeVar("T")
ENGINES = ("auto", "replicated", "zero3", "deepspeed-inference")


class Teacher:
    """A frozen decoder read row by row over a :class:`KVMemory`.

    Args:
        lm: ``LlamaForCausalLM`` or a decoder with the same sub-modules.
        kernels: ``auto``, ``triton`` or ``reference``, for the attention.
    """

    def __init__(self, lm: PreTrainedModel, kernels: str = "auto") -> None:
        self.lm = lm.eval().requires_grad_(False)
        self.lm.lm_head = LMHead.wrap(lm.lm_head)
        keep_float32(lm.model.rotary_emb)
        self.kernels = kernels
        self.collective = False  # set by `shard`: every rank must run it together
        self.engine: Any = None
        self._root: _Root | None = None

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

    def hidden(self, rows: TeacherRows, memory: KVMemory, through: bool = False) -> Tensor:
        """Hidden states after the final norm of the rows whose logits are wanted.

        Args:
            rows: of ``ldistill.distill.targets``; at least one.
            memory: the student's keys and values.
            through: let gradients flow into the memory (``kv_grad: through``); the LM's weights
                stay frozen either way.

        Returns:
            [kd rows, hidden] in the LM's dtype.
        """
        with nullcontext() if through else torch.no_grad():
            return self._hidden(rows, memory)

    def _hidden(self, rows: TeacherRows, memory: KVMemory) -> Tensor:
        model = self.lm.model
        x = model.embed_tokens(rows.token)
        cos, sin = (t[0] for t in model.rotary_emb(x, rows.rotary[None]))
        for layer, k, v in zip(model.layers, memory.keys, memory.values, strict=True):
            x = x + self._attend(layer, x, k, v, rows, cos, sin)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        x = model.norm(x)
        return x if rows.logits is None else x[rows.logits]

    def _attend(
        self, layer: nn.Module, x: Tensor, k: Tensor, v: Tensor, rows: TeacherRows, cos, sin
    ) -> Tensor:
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        q = _rotate(_heads(attention.q_proj(normed), attention.head_dim), cos, sin)
        own: dict[str, Tensor | None] = {}
        if rows.own is not None:
            kept = normed[rows.own]
            k2 = _heads(attention.k_proj(kept), attention.head_dim)
            own = {
                "k2": _rotate(k2, cos[rows.own], sin[rows.own]).to(k.dtype),
                "v2": _heads(attention.v_proj(kept), attention.head_dim).to(v.dtype),
                "start2": rows.start2,
                "end2": rows.end2,
            }
        out = shared_kv_attention(
            q.to(k.dtype),
            k,
            v,
            rows.batch,
            rows.start,
            rows.index,
            visible=rows.visible,
            scale=attention.scaling,
            kernels=self.kernels,
            **own,
        )
        return attention.o_proj(out.flatten(1).to(x.dtype))

    def head(self, hidden: Tensor, op: Callable[[Tensor, Tensor], Any]) -> Any:
        """``op(hidden, weight)`` with the head's weight whole, also under ZeRO-3."""
        return self.lm.lm_head(hidden, op)

    def as_one_forward(self, make: Callable[[], T]) -> T:
        """``make()``, which runs the teacher up to its head, as one forward for its engine.

        DeepSpeed learns from one forward of the module it was given which weights the next one
        will ask for, and gathers them ahead; called layer by layer alone it gathers each when its
        layer begins, and waits.
        """
        return make() if self._root is None else self._root.run(make)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move a replicated teacher to its device and the student's dtype."""
        if self.engine is None:
            self.lm.to(device=device, dtype=dtype)


class _Root(nn.Module):
    """The LM as an engine's module, whose forward is whatever is done with the LM's layers.

    Nothing goes in or comes out: DeepSpeed would gather weights again in backward for the tensors
    it finds there.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        self._make: Callable[[], Any] | None = None
        self._made: Any = None

    def forward(self) -> None:
        self._made = self._make()

    def run(self, make: Callable[[], T]) -> T:
        self._make = make
        try:
            self()
            return self._made
        finally:
            self._make = self._made = None


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[rows, heads × head_dim] → [rows, heads, head_dim]."""
    return x.view(x.shape[0], -1, head_dim)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, rotate-half, of [rows, heads, head_dim] at the rows' own positions."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def load_lm(folder: Path, zero_init: dict[str, Any] | None = None) -> PreTrainedModel:
    """The original LM from a transformers folder.

    Args:
        folder: with ``config.json`` and weights.
        zero_init: DeepSpeed configuration under whose ZeRO-3 the weights are partitioned while
            loading; None keeps them whole even where the student is being partitioned.

    Raises:
        OSError: a weight file is missing.
        ValueError: weights that cannot be read, or are not those of the configuration.
    """
    with partitioned_by(zero_init):
        lm, problems, unused = read_model(AutoModelForCausalLM, folder, dtype="auto")
    refuse_misfit(folder, problems + [f"unknown {name}" for name in unused])
    return lm


def shard(teacher: Teacher, engine: str, dtype: torch.dtype, offload: bool = False) -> None:
    """Hand the teacher to a DeepSpeed engine.

    Args:
        teacher: with its weights on the CPU or already partitioned.
        engine: ``zero3`` (parameters partitioned over the ranks, gathered layer by layer, no
            optimizer) or ``deepspeed-inference`` (``init_inference``, one whole copy per rank).
        dtype: compute dtype, the student's.
        offload: keep the partitions in CPU memory (``zero3``).
    """
    import deepspeed

    if engine == "zero3":
        config = zero3_config(dtype, offload)
        teacher._root = _Root(teacher.lm).eval()
        teacher.engine, *_ = deepspeed.initialize(model=teacher._root, config=config)
        teacher.collective = True
    elif engine == "deepspeed-inference":
        teacher.engine = deepspeed.init_inference(
            teacher.lm, dtype=dtype, replace_with_kernel_inject=False
        )
        teacher.lm = teacher.engine.module
    else:
        raise ValueError(f"teacher engine must be one of {', '.join(ENGINES)}, got {engine!r}.")


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


def choose_engine(asked: str, zero_stage: int) -> str:
    """``auto`` is ``zero3`` where the student is at stage 3, else ``replicated``."""
    if asked not in ENGINES:
        raise ValueError(f"teacher engine must be one of {', '.join(ENGINES)}, got {asked!r}.")
    if asked == "zero3" and zero_stage < 0:
        raise ValueError("teacher engine zero3 needs --deepspeed: it is DeepSpeed's partitioning.")
    if asked != "auto":
        return asked
    return "zero3" if zero_stage == 3 else "replicated"
