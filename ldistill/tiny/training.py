"""What all phases of the tiny pair's training share: batches, losses, schedule, optimizers."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

from ldistill.models.processor import IGNORE, Document, Processor

Example = tuple[Document, bytes | None]
"""A tokenised document and its picture as PNG bytes."""


@dataclass(frozen=True)
class Phase:
    """Length and rate of a phase of training."""

    name: str
    steps: int
    batch_size: int
    rate: float

    def scaled(self, scale: float) -> Phase:
        """The phase with `scale` times its steps, at least two."""
        return replace(self, steps=max(2, round(self.steps * scale)))

    def rate_at(self, step: int) -> float:
        """Linear warm-up over 100 steps, then cosine to 3% of the rate."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * cosine)


def batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Endless examples in batches of similar length, 16 at a time in random order."""
    rng, examples = random.Random(0), iter(examples)
    while len(window := list(islice(examples, 16 * size))) == 16 * size:
        window.sort(key=lambda example: len(example[0].input_ids))
        cut = [window[start : start + size] for start in range(0, len(window), size)]
        rng.shuffle(cut)
        yield from cut


def label_losses(
    phase: Phase,
    lm: LlamaForCausalLM,
    processor: Processor,
    examples: Iterable[Example],
    embed: Callable[[Tensor, list[bytes | None]], Tensor],
) -> Iterator[Tensor]:
    """Cross-entropy where there are labels, batch by batch.

    `embed` makes [batch, longest, hidden] of ids, int64 [batch, longest], and pictures.
    """
    for batch in batches(examples, phase.batch_size):
        ids = [torch.from_numpy(document.input_ids).long() for document, _ in batch]
        labels = [torch.from_numpy(document.labels).long() for document, _ in batch]
        ids = pad_sequence(ids, True, processor.pad_token_id)
        labels = pad_sequence(labels, True, IGNORE)
        embeds = embed(ids, [picture for _, picture in batch])
        hidden = lm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        target = labels >= 0
        yield F.cross_entropy(lm.lm_head(hidden[target]), labels[target])


def optimise(
    phase: Phase, module: nn.Module, losses: Iterator[Tensor], scale: float, progress: Progress
) -> float:
    """Run a phase on the trainable parameters of `module`, a loss a step; shows it in a bar.

    Hidden matrices learn by Muon, at twice AdamW's rate; everything else by AdamW. That halves the
    steps a small model needs before it copies from its context.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    phase, rate = phase.scaled(scale), phase.rate
    weights = {
        kind: [layer.weight for layer in module.modules() if isinstance(layer, kind)]
        for kind in (nn.Linear, nn.Embedding)
    }
    tied = set(weights[nn.Embedding])
    matrices = [p for p in weights[nn.Linear] if p.requires_grad and p not in tied]
    others = [p for p in module.parameters() if p.requires_grad and p not in set(matrices)]
    muon = {"lr": 2 * rate, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [
        torch.optim.Muon(matrices, **muon),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [LambdaLR(o, lambda step: phase.rate_at(step) / rate) for o in optimizers]
    bar, values = progress.add_task(phase.name, total=phase.steps), []
    for loss in islice(losses, phase.steps):
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        values.append(loss.item())
        progress.update(bar, advance=1, description=f"{phase.name}, loss {values[-1]:.2f}")
    return statistics.fmean(values[-max(1, phase.steps // 10) :])
