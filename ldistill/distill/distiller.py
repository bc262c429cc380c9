"""Student, teacher and objective in one module: a batch in, the scalar loss out.

The shape that DeepSpeed likes best: the engine wraps one module whose forward returns the loss.
The teacher hangs beside the module tree, so it is neither trained, broadcast, saved nor counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldistill.distill.attention import (
    KVMemory,
    attach,
    choose_attention,
    packed_flash_kwargs,
    recording,
)
from ldistill.distill.objective import Objective
from ldistill.distill.targets import RowPlan, TeacherRows, plan_rows, teacher_rows
from ldistill.distill.teacher import Teacher
from ldistill.models.student import Student
from ldistill.sources import SourceWeights

KV_GRADS = ("detached", "through")


class Distiller(nn.Module):
    """What is trained.

    Args:
        student: of any family.
        teacher: None for a run on labels alone.
        weights: α and τ by source.
        objective: how CE and KL are mixed.
        kv_scope: ``full``, ``prompt`` or ``visual``.
        kv_grad: ``detached`` (Algorithm 1 of the paper) or ``through``.
        attention: the student's backend, one of ``memory.BACKENDS``.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weights: SourceWeights,
        objective: Objective | None = None,
        *,
        kv_scope: str = "full",
        kv_grad: str = "detached",
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        if kv_grad not in KV_GRADS:
            raise ValueError(f"kv_grad must be one of {', '.join(KV_GRADS)}, got {kv_grad!r}.")
        if weights.distils and teacher is None:
            raise ValueError("the recipe distils, but no teacher was given (--teacher).")
        self.student = student
        object.__setattr__(self, "teacher", teacher)
        self.weights = weights
        self.objective = objective or Objective()
        self.kv_scope, self.kv_grad = kv_scope, kv_grad
        self.use_attention(attention)

    def use_attention(self, backend: str) -> None:
        """Run the student's attention through another backend from now on."""
        self.attention = choose_attention(backend)
        self.slots = attach(self.student.backbone, self.attention)

    @property
    def teacher_vocab(self) -> int:
        """Token ids the teacher knows; those beyond stand for the picture.

        An LM may have more embeddings than tokens; the student's image token can be one of them.
        """
        image = self.student.image_token_id
        return min(self.teacher.vocab_size, image) if self.teacher else image

    def plan(self, batch: dict[str, Tensor]) -> RowPlan:
        """Rows of a batch that still lies on the CPU."""
        return plan_rows(batch, self.weights, self.kv_scope, self.teacher_vocab)

    def forward(
        self,
        batch: dict[str, Tensor],
        plan: RowPlan,
        total_rows: float,
        run_teacher: bool,
    ) -> dict[str, Tensor]:
        """Loss of a micro-batch as its share of the global batch.

        Args:
            batch: of ``ldistill.data.collate``, on the device.
            plan: of :meth:`plan`, on the device.
            total_rows: supervised rows of the global batch, at least 1.
            run_teacher: whether any rank has teacher rows in this micro-batch; all ranks must
                agree where the teacher is sharded.

        Returns:
            ``loss`` (scalar) and ``metrics`` (float32 [sources, len(COLUMNS)], detached sums).
        """
        hidden, memory = self._student(batch, run_teacher)
        hidden = _autocast(hidden.flatten(0, 1)[plan.supervised.flat])

        def judge() -> tuple[Tensor, Tensor]:
            return self.objective(
                hidden,
                self.student.lm_head,
                plan.supervised,
                teacher_hidden=None if memory is None else self._teach(plan.teacher, memory),
                teacher=self.teacher,
                total_rows=total_rows,
                sources=len(self.weights.names),
            )

        loss, metrics = judge() if memory is None else self.teacher.as_one_forward(judge)
        return {"loss": loss, "metrics": metrics}

    def _student(
        self, batch: dict[str, Tensor], run_teacher: bool
    ) -> tuple[Tensor, KVMemory | None]:
        kwargs: dict[str, Any] = {}
        if self.attention == "flash_attention_2":
            kwargs = packed_flash_kwargs(batch["position_ids"])
        arguments = (batch["input_ids"], batch["position_ids"], batch["pixel_values"])
        if not (run_teacher and self.teacher is not None):
            return self.student(*arguments, **kwargs), None
        with recording(self.slots) as recorded:
            hidden = self.student(*arguments, **kwargs)
            memory = recorded()
        return hidden, memory if self.kv_grad == "through" else memory.detach()

    def _teach(self, rows: TeacherRows, memory: KVMemory) -> Tensor | None:
        """Teacher states of the distilling rows; an empty tensor where only other ranks distil."""
        through = self.kv_grad == "through"
        if len(rows):
            return self.teacher.hidden(rows, memory, through)
        if not self.teacher.collective:
            return None
        # A sharded teacher gathers its weights together: take part with a row that counts nothing.
        idle = _idle_row(memory, self.kv_scope)
        return self.teacher.hidden(idle, memory, through)[:0]

    @torch.no_grad()
    def teacher_alone(self, batch: dict[str, Tensor], plan: RowPlan, own: TeacherRows) -> Tensor:
        """Rows where the teacher, with no memory but its own, predicts the label; and how many.

        Args:
            batch: on the device; gives the student's dtype and shapes.
            plan: whose distilling rows are judged.
            own: of ``teacher_rows(..., scope="own")`` for the same rows.

        Returns:
            float32 [2]: right rows, rows.
        """
        rows = plan.supervised
        label = rows.label[rows.kd_rows]
        blank = self._blank_memory(batch)
        hidden = (
            self.teacher.hidden(own, blank)
            if len(own)
            else self.teacher.hidden(_idle_row(blank, "own"), blank)[:0]
        )
        best = self.teacher.head(hidden, _argmax)
        right = (best == label).float().sum()
        return torch.stack([right, torch.tensor(float(label.numel()), device=right.device)])

    def own_rows(self, batch: dict[str, Tensor], plan: RowPlan) -> TeacherRows:
        """Teacher rows for :meth:`teacher_alone`, of a batch that still lies on the CPU."""
        wanted = plan.supervised.flat[plan.supervised.kd_rows]
        return teacher_rows(batch, wanted, "own", self.teacher_vocab)

    def _blank_memory(self, batch: dict[str, Tensor]) -> KVMemory:
        """Memory that nothing sees, of one zero expanded to the student's shape."""
        backbone = self.student.backbone
        config, head_dim = backbone.config, backbone.layers[0].self_attn.head_dim
        shape = (batch["input_ids"].shape[0], config.num_key_value_heads)
        dtype = backbone.dtype
        zero = torch.zeros(*shape, batch["input_ids"].shape[1], head_dim, dtype=dtype)
        zero = zero.to(batch["input_ids"].device)
        return KVMemory([zero] * config.num_hidden_layers, [zero] * config.num_hidden_layers)

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
        decoder, kwargs = self.student.backbone, activation_checkpointing_kwargs or {}
        # transformers renamed the method between 5.17 and 5.23.
        name = "activation_checkpointing_enable"
        enable = getattr(decoder, name, decoder.gradient_checkpointing_enable)
        enable({"use_reentrant": False} | kwargs, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """:meth:`activation_checkpointing_enable` by the name older transformers call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` every decoder block, with its options: one graph serves all layers."""
        for layer in self.student.backbone.layers:
            layer.compile(**options)


def _idle_row(memory: KVMemory, scope: str) -> TeacherRows:
    device = memory.keys[0].device
    zero = torch.zeros(1, dtype=torch.long, device=device)
    row = TeacherRows(zero, zero, zero, zero, zero)
    if scope != "full":
        row.own, row.start2, row.end2, row.logits = zero, zero, zero + 1, zero
    return row


def _argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """Most probable token of every row, a thousand rows of logits at a time."""
    parts = [(part @ weight.T).argmax(-1) for part in hidden.split(1024)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.long)


def _autocast(hidden: Tensor) -> Tensor:
    """The dtype the head would compute in: autocast does not reach inside the fused loss."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))
