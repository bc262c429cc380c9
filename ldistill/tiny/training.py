"""What all phases of the tiny pair's training share: batches, losses, schedule, optimizers."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

from ldistill.models.processor import IGNORE, Document

Example = tuple[Document, bytes | None]
"""A tokenised document and its picture as PNG bytes."""


@dataclass(frozen=True)
class Phase:
    """Length and rate of a phase of training."""

    name: str
    steps: int
    batch_size: int
    rate: float
    warmup: int = 100

    def scaled(self, scale: float) -> Phase:
        """The phase with `scale` times its steps, at least two."""
        return replace(self, steps=max(2, round(self.steps * scale)))

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then cosine to 3% of the rate."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warmup) * (0.03 + 0.97 * cosine)


def batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Endless examples in batches of similar length, 16 at a time in random order."""
    rng, examples = random.Random(0), iter(examples)
    while len(window := list(islice(examples, 16 * size))) == 16 * size:
        window.sort(key=lambda example: len(example[0].input_ids))
        cut = [window[start : start + size] for start in range(0, len(window), size)]
        rng.shuffle(cut)
        yield from cut


def pad(batch: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, int64 [batch, longest], padded at the right."""
    ids = [torch.from_numpy(document.input_ids).long() for document, _ in batch]
    labels = [torch.from_numpy(document.labels).long() for document, _ in batch]
    padded = nn.utils.rnn.pad_sequence
    return padded(ids, True, pad_id), padded(labels, True, IGNORE)


def label_loss(lm: LlamaForCausalLM, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Cross-entropy where there are labels; `inputs` are ids or embeddings of [batch, length]."""
    hidden = lm.model(**inputs, use_cache=False).last_hidden_state
    target = labels >= 0
    return F.cross_entropy(lm.lm_head(hidden[target]), labels[target])


def optimise(
    phase: Phase, module: nn.Module, losses: Iterator[Tensor], progress: Progress
) -> float:
    """Run a phase on the trainable parameters of `module`, a loss a step; shows it in a bar.

    Hidden matrices learn by Muon, at twice AdamW's rate; everything else by AdamW. That halves the
    steps a small model needs before it copies from its context.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    layers, rate = list(module.modules()), phase.rate
    tied = {id(layer.weight) for layer in layers if isinstance(layer, nn.Embedding)}
    linear = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    matrices = [p for p in linear if p.requires_grad and id(p) not in tied]
    known = {id(p) for p in matrices}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    muon = {"lr": 2 * rate, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [
        torch.optim.Muon(matrices, **muon),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [LambdaLR(o, lambda step: phase.rate_at(step) / rate) for o in optimizers]
    bar = progress.add_task(phase.name, total=phase.steps)
    values = []
    for _ in range(phase.steps):
        loss = next(losses)
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        values.append(loss.item())
        progress.update(bar, advance=1, description=f"{phase.name}, loss {values[-1]:.2f}")
    return statistics.fmean(values[-max(1, phase.steps // 10) :])
