"""The projector's first lesson: an image token is to be the word for what lies there.

The projector starts from a ridge regression of the language model's own embeddings on the vision
tower's patches; then both learn to come closer to them. So alignment begins with something that
the frozen model has words for. Blank places become line breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ldistill.models.nanovlm import NanoVLM
from ldistill.tiny.pictures import Canvas
from ldistill.tiny.scenes import SOURCES
from ldistill.tiny.sight import KINDS, slot_labels
from ldistill.tiny.training import Phase, optimise, pixels
from ldistill.tiny.world import PICTURED, World, stream

WORDS = Phase(steps=500, batch_size=48, rate=2e-3)
PICTURES = 1700  # for the regression
RIDGE = 1e-4
SHARPNESS = 10.0


def learn_words(
    student: NanoVLM,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    phase: Phase = WORDS,
    advance: Callable[[float], None] = lambda loss: None,
) -> float:
    """Train projector and vision tower; returns the final loss."""
    words = class_embeddings(student, tokenizer)
    regress(student, words, [_canvas(world, -1 - index) for index in range(PICTURES)])
    learning = nn.ModuleList([student.vision, student.projector]).requires_grad_(True)
    return optimise(phase, learning, _losses(student, words, world, phase), advance)


def _canvas(world: World, index: int) -> Canvas:
    source = tuple(SOURCES)[index % len(SOURCES)]
    return SOURCES[source](world, stream(world.seed, "words", index), PICTURED).canvas


def _losses(
    student: NanoVLM, words: list[Tensor], world: World, phase: Phase
) -> Iterator[Callable[[], Tensor]]:
    for step in range(phase.steps):
        start = step * phase.batch_size
        canvases = [_canvas(world, start + place) for place in range(phase.batch_size)]

        def loss(canvases=canvases) -> Tensor:
            patches = student.vision(pixels([c.image for c in canvases])).last_hidden_state
            tokens = student.projector(patches).flatten(0, 1)
            distance = (tokens - wanted(canvases, words)).square().sum(-1).mean()
            return distance + _confusion(tokens, slots(canvases), words)

        yield loss


@torch.no_grad()
def regress(student: NanoVLM, words: list[Tensor], canvases: Sequence[Canvas]) -> None:
    """Set the projector to the ridge regression of the words' embeddings on the patches."""
    seen: list[Tensor] = []
    hook = student.projector.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for start in range(0, len(canvases), 100):
        images = [canvas.image for canvas in canvases[start : start + 100]]
        student.projector(student.vision(pixels(images)).last_hidden_state)
    hook.remove()
    features = torch.cat(seen).flatten(0, 1).double()
    targets = wanted(canvases, words).double()
    penalty = RIDGE * len(features) * torch.eye(features.shape[1], dtype=torch.double)
    solved = torch.linalg.solve(features.T @ features + penalty, features.T @ targets)
    student.projector.proj.weight.copy_(solved.T.float())


@torch.no_grad()
def class_embeddings(student: NanoVLM, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Embedding of every class of every kind, each [classes, hidden]; nothing is a line break."""
    table = student.decoder.get_input_embeddings().weight
    return [
        torch.stack([table[tokenizer(word or "\n")["input_ids"]].mean(0) for word in kind])
        for kind in KINDS
    ]


def _confusion(tokens: Tensor, labels: Tensor, words: list[Tensor]) -> Tensor:
    """Cross-entropy of telling the right word from others by its product with the token."""
    losses = []
    for kind, table in enumerate(words):
        there = labels[:, kind] > 0
        if there.any():
            logits = SHARPNESS * tokens[there] @ (table - table.mean(0)).T
            losses.append(F.cross_entropy(logits, labels[there, kind]))
    return torch.stack(losses).mean()


def slots(canvases: Sequence[Canvas]) -> Tensor:
    """Classes of all slots, int64 [canvases x slots, kinds]."""
    labels = torch.stack([slot_labels(canvas.placed) for canvas in canvases])
    return labels.transpose(1, 2).flatten(0, 1)


def wanted(canvases: Sequence[Canvas], words: list[Tensor]) -> Tensor:
    """Target embeddings [canvases x slots, hidden]: the sum over what is there."""
    labels = slots(canvases)
    present = labels > 0
    total = sum(words[k][labels[:, k]] * present[:, k, None] for k in range(len(words)))
    return torch.where(present.any(1, keepdim=True), total, words[0][:1])
