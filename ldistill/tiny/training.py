"""What both learning phases of the tiny pair share: documents, batches, schedule, one step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from ldistill.common.samples import Turn

IGNORE = -100
T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """Length and rate of a learning phase."""

    steps: int
    batch_size: int
    rate: float
    warmup: int = 100

    def scaled(self, scale: float) -> Phase:
        """The phase with `scale` times its steps, at least two."""
        return Phase(max(2, round(self.steps * scale)), self.batch_size, self.rate, self.warmup)

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then cosine to 3% of the rate."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warmup) * (0.03 + 0.97 * cosine)


@dataclass(frozen=True)
class Coded:
    """A tokenised document; `labels[i]` is the token after i where that one is learnt."""

    ids: Tensor
    labels: Tensor
    picture: bytes | None = None


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], image_text: str = ""
) -> tuple[Tensor, Tensor]:
    """Ids and shifted labels of a chat, the same as `Processor.encode` gives, only faster."""
    ids: list[int] = []
    learnt: list[bool] = []
    for number, turn in enumerate(turns):
        picture = image_text if number == 0 else ""
        asked = f"<|im_start|>user\n{picture}{turn.user}<|im_end|>\n<|im_start|>assistant\n"
        for text, learn in ((asked, False), (f"{turn.assistant}<|im_end|>\n", True)):
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            learnt += [learn] * len(part)
    return shifted(torch.tensor(ids), torch.tensor(learnt))


def shifted(ids: Tensor, learnt: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and labels: the next token where it is learnt, IGNORE elsewhere."""
    labels = torch.full_like(ids, IGNORE)
    labels[:-1] = torch.where(learnt[1:], ids[1:], IGNORE)
    return ids, labels


def pad(documents: Sequence[Coded], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, int64 [batch, longest], padded at the right."""
    ids = nn.utils.rnn.pad_sequence([d.ids for d in documents], True, pad_id)
    return ids, nn.utils.rnn.pad_sequence([d.labels for d in documents], True, IGNORE)


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as float32 [n, 3, height, width] in [0, 1]."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def batches(documents: Iterable[T], size: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Endless documents in batches of similar length, 16 at a time in random order."""
    window: list[T] = []
    rng = random.Random(0)
    for document in documents:
        window.append(document)
        if len(window) == 16 * size:
            window.sort(key=length)
            cut = [window[start : start + size] for start in range(0, len(window), size)]
            rng.shuffle(cut)
            yield from cut
            window = []


def optimise(
    phase: Phase,
    module: nn.Module,
    loss_of_step: Iterator[Callable[[], Tensor]],
    advance: Callable[[float], None],
) -> float:
    """Run a phase on what `module` has to train.

    Hidden matrices learn by Muon, at twice AdamW's rate; everything else by AdamW. That halves the
    steps a small model needs before it copies from its context.

    Args:
        phase: length and rate.
        module: whose trainable parameters learn.
        loss_of_step: yields a function per step that gives its loss.
        advance: called with the loss of every step.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    optimizers = _optimizers(module, phase.rate)
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    schedules = [LambdaLR(o, lambda step: phase.rate_at(step) / phase.rate) for o in optimizers]
    losses = []
    for _ in range(phase.steps):
        loss = next(loss_of_step)()
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        advance(losses[-1])
    tail = losses[-max(1, phase.steps // 10) :]
    return sum(tail) / len(tail)


def _optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    matrices = {
        id(layer.weight): layer.weight
        for layer in module.modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    }
    for layer in module.modules():  # a tied head is an embedding
        if isinstance(layer, nn.Embedding):
            matrices.pop(id(layer.weight), None)
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in matrices]
    muon = torch.optim.Muon(
        matrices.values(), lr=2 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)]
