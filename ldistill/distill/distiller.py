"""Student, teacher and objective in one module: a batch in, the scalar loss out.

The shape that DeepSpeed likes best: the engine wraps one module whose forward returns the loss.
The teacher hangs beside the module tree, so it is neither trained, broadcast, saved nor counted.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldistill.common.errors import refuse
from ldistill.distill.attention import (
    PACKED,
    SharedKV,
    attach,
    document_boundaries,
    fitting_attention,
    recording,
)
from ldistill.distill.objective import Objective
from ldistill.distill.targets import Queries, Scope, Supervision, queries_for, supervise
from ldistill.distill.teacher import Teacher
from ldistill.models.logits import LogitScaling
from ldistill.models.student import Student
from ldistill.sources import SourceWeights
from ldistill_kernels import plan_tiles


class Distiller(nn.Module):
    """What is trained.

    Args:
        student: of any family.
        teacher: None for a run on labels alone.
        weights: α and τ by source.
        objective: how CE and KL are mixed.
        kv_scope: ``full``, ``prompt``, ``visual`` or ``own`` (nothing of the student's).
        kv_grad: ``detached`` (Algorithm 1 of the paper) or ``through``.
        attention: the student's backend, of :func:`ldistill.distill.attention.choose_attention`.
        device: the type of device that the student will compute on; default: where it lies.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weights: SourceWeights,
        objective: Objective | None = None,
        *,
        kv_scope: Scope = "full",
        kv_grad: Literal["detached", "through"] = "detached",
        attention: str = "sdpa",
        device: str | None = None,
    ) -> None:
        super().__init__()
        cases = {
            "the recipe distils, but no teacher was given (--teacher).": teacher is None,
            "kv_scope visual: this student reads its prompt both ways, its LM does not, so the "
            "LM's own keys and values there are others; use kv_scope full or prompt.": (
                kv_scope == "visual" and student.sees == "prefix"
            ),
        }
        refuse(cases if weights.distils else {})
        self.student = student
        # Past nn.Module's own, which would make the teacher's weights a part of this module.
        object.__setattr__(self, "teacher", teacher)
        self.weights = weights
        self.objective = objective or Objective()
        self.kv_scope, self.kv_grad = kv_scope, kv_grad
        self._device = device or next(student.backbone.parameters()).device.type
        self.use_attention(attention)

    def use_attention(self, backend: str) -> None:
        """Run the student's attention through another backend from now on, if it can do that."""
        decoder, sees = self.student.backbone, bool(self.student.sees)
        self.attention = fitting_attention(backend, decoder, sees, self._device)
        self.slots = attach(decoder, self.attention)

    def known(self, ids: Tensor) -> Tensor:
        """Of token ids, whether the teacher has their embeddings: bool, in their shape.

        Pictures stand at ids of their own, behind the LM's or (Qwen's, Mistral's) among them.
        """
        pictures = torch.tensor(self.student.picture_token_ids, device=ids.device)
        mine = ~torch.isin(ids, pictures)
        return mine & (ids < self.teacher.vocab_size) if self.teacher else mine

    def supervise(self, batch: dict[str, Tensor]) -> Supervision:
        """Targets and queries of a batch that still lies on the CPU."""
        supervision = supervise(batch, self.weights, self.kv_scope, self.known)
        if self.teacher is not None:
            # Query heads that read the same key head are computed together, tile by tile.
            queries, config = supervision.queries, self.teacher.lm.config
            group = config.num_attention_heads // config.num_key_value_heads
            memory = tuple(batch["input_ids"].shape)
            where = queries.batch, queries.start, queries.index
            queries.tiles = plan_tiles(*where, group=group, memory=memory)
        return supervision

    def forward(
        self, batch: dict[str, Tensor], supervision: Supervision, total: float, run_teacher: bool
    ) -> dict[str, Tensor]:
        """Loss of a micro-batch as its share of the global batch.

        Args:
            batch: of ``ldistill.data.collate``, on the device.
            supervision: of :meth:`supervise`, on the device.
            total: targets of the global batch, at least 1.
            run_teacher: whether any rank has queries in this micro-batch; all ranks must agree
                where the teacher is sharded.

        Returns:
            ``loss`` (scalar) and ``metrics`` (float32 [sources, len(COLUMNS)], detached sums).
        """
        targets, queries = supervision.targets, supervision.queries
        teaches = run_teacher and (len(queries) > 0 or self.teacher.collective)
        hidden, shared = self._student(batch, teaches)
        # [batch, seq, hidden] → [targets, hidden]: the head runs on no other position.
        hidden = hidden.flatten(0, 1)[targets.flat]
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # which does not reach inside the fused loss
            hidden = hidden.to(torch.get_autocast_dtype(device))
        judge = partial(
            self.objective,
            targets=targets,
            total=total,
            sources=len(self.weights.names),
            scaling=LogitScaling.of(self.student.backbone.config),
            teacher_scaling=self.teacher.scaling if self.teacher else LogitScaling(),
        )

        # Under ZeRO-3 a head's weight is whole only while the head is being called with the states
        # (its hooks gather and release, in backward too), so the loss is computed within: the
        # teacher's head is entered within the student's, and both weights are whole there.
        def against_teacher() -> tuple[Tensor, Tensor]:
            taught = self._teach(queries, shared, self.kv_scope, self.kv_grad == "through")
            return self.student.lm_head(
                hidden,
                lambda *student: self.teacher.head(
                    taught, lambda *teacher: judge(student, teacher)
                ),
            )

        if shared is None:
            # Nothing is taught here, so the teacher's head is not gathered either.
            loss, metrics = self.student.lm_head(hidden, lambda *student: judge(student, None))
        else:
            loss, metrics = self.teacher.as_one_forward(against_teacher)
        return {"loss": loss, "metrics": metrics}

    def _student(self, batch: dict[str, Tensor], record: bool) -> tuple[Tensor, SharedKV | None]:
        """States [batch, seq, hidden], and the K/V of every layer if they are asked for."""
        packed = document_boundaries(batch["position_ids"]) if self.attention in PACKED else {}
        arguments = student_inputs(batch)
        if not record:
            return self.student(**arguments, **packed), None
        with recording(self.slots) as recorded:
            hidden = self.student(**arguments, **packed)
            shared = recorded()
        return hidden, shared if self.kv_grad == "through" else shared.detach()

    def _teach(
        self, queries: Queries, shared: SharedKV, scope: str, through: bool = False
    ) -> Tensor:
        """Teacher states of the taught targets, [taught, hidden of the teacher]."""
        if len(queries):
            return self.teacher.hidden(queries, shared, through)
        # Only other ranks distil. A sharded teacher gathers its weights on all ranks together: take
        # part with one query, at the very first position, that counts nothing.
        zero = torch.zeros(1, dtype=torch.long, device=shared.keys[0].device)
        idle = Queries(zero, zero, zero, zero, zero)
        if scope != "full":  # it sees itself alone
            idle.own, idle.start2, idle.end2, idle.wanted = zero, zero, zero + 1, zero
        return self.teacher.hidden(idle, shared, through)[:0]

    @torch.no_grad()
    def teacher_alone(
        self, batch: dict[str, Tensor], supervision: Supervision, own: Queries
    ) -> Tensor:
        """Targets whose label the teacher predicts with no K/V but its own; and how many.

        Args:
            batch: on the device; gives the student's dtype and shapes.
            supervision: whose taught targets are judged.
            own: of :meth:`own_queries` for the same batch.

        Returns:
            float32 [2]: targets predicted, targets.
        """
        label = supervision.targets.label[supervision.targets.taught]  # [taught]
        hidden = self._teach(own, self._blank_kv(batch), "own")
        right = (self.teacher.head(hidden, _argmax) == label).float().sum()
        return torch.stack([right, torch.full_like(right, label.numel())])

    def own_queries(self, batch: dict[str, Tensor], supervision: Supervision) -> Queries:
        """Queries for :meth:`teacher_alone`, of a batch that still lies on the CPU."""
        targets = supervision.targets
        return queries_for(batch, targets.flat[targets.taught], "own", self.known)

    def _blank_kv(self, batch: dict[str, Tensor]) -> SharedKV:
        """Shared K/V of the student's shape that nothing sees."""
        backbone = self.student.backbone
        attention, config = backbone.layers[0].self_attn, backbone.config
        key = getattr(attention, "qk_head_dim", None) or attention.head_dim
        value = getattr(attention, "v_head_dim", key)  # DeepSeek's are narrower
        (size, seq), device = batch["input_ids"].shape, batch["input_ids"].device
        # [batch, kv_heads, seq, head_dim], one for all layers.
        keys, values = (
            torch.zeros(
                size, config.num_key_value_heads, seq, width, dtype=backbone.dtype, device=device
            )
            for width in (key, value)
        )
        return SharedKV([keys] * config.num_hidden_layers, [values] * config.num_hidden_layers)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Trade memory for time in the decoder; called by the Trainer.

        Raises:
            ValueError: with ``kv_grad: through``, which needs the graph that this drops.
        """
        if self.kv_grad == "through":
            raise ValueError(
                "gradient checkpointing drops the graph that kv_grad through needs: use "
                "--kv_grad detached, or train without --gradient_checkpointing."
            )
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        self.student.backbone.activation_checkpointing_enable(kwargs, **options)

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` every decoder block, with its options: one graph serves all layers."""
        for layer in self.student.backbone.layers:
            layer.compile(**options)


def student_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the student takes of a batch."""
    names = ("input_ids", "position_ids", "pictures", "rotary", "answers")
    return {name: batch[name] for name in names if name in batch}


def _argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """Most probable token of every state, a thousand positions' logits at a time."""
    return torch.cat([(part @ weight.T).argmax(-1) for part in hidden.split(1024)])
