"""A vision tower learns what is where, before it meets any words.

It stands for the pre-trained SigLIP of a real VLM. For each cell of a picture the tower's patches
tell, through a throw-away linear head, which writing, which mark and which colour lies there.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldistill.models.nanovlm import NanoVLM
from ldistill.tiny.pictures import COLUMNS, LINES, Placed
from ldistill.tiny.scenes import SOURCES
from ldistill.tiny.training import Phase, optimise, pixels
from ldistill.tiny.world import COLOURS, MARKS, PICTURED, PIECES, World, stream

SIGHT = Phase(steps=1000, batch_size=48, rate=2e-3)
WRITING = ("", *PIECES, *string.digits)
KINDS = (WRITING, ("", *MARKS), ("", *COLOURS))
SLOTS = LINES * COLUMNS


class Labeller(nn.Module):
    """[pictures, patches, width] to logits per kind, each [pictures, slots, classes].

    A slot is a cell of two by two patches, as large as an image token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4 * width, len(kind)) for kind in KINDS)

    def forward(self, patches: Tensor) -> list[Tensor]:
        count, _, width = patches.shape
        grid = patches.view(count, LINES, 2, COLUMNS, 2, width).transpose(2, 3)
        slots = grid.reshape(count, SLOTS, 4 * width)
        return [head(slots) for head in self.heads]


def slot_labels(placed: Sequence[Placed]) -> Tensor:
    """Class of every kind in every slot, int64 [kinds, slots]; 0 where there is nothing."""
    labels = torch.zeros(len(KINDS), SLOTS, dtype=torch.long)
    for thing in placed:
        for row, value in enumerate((thing.piece, thing.mark, thing.colour)):
            if value is not None:
                labels[row, thing.cell] = KINDS[row].index(value)
    return labels


def learn_to_see(
    student: NanoVLM,
    world: World,
    phase: Phase = SIGHT,
    advance: Callable[[float], None] = lambda loss: None,
) -> float:
    """Train the student's vision tower; returns the final loss."""
    student.vision.requires_grad_(True)
    labeller = Labeller(student.config.vit_hidden_dim)
    learning = nn.ModuleList([student.vision, labeller])
    return optimise(phase, learning, _losses(student, labeller, world, phase), advance)


def _losses(
    student: NanoVLM, labeller: Labeller, world: World, phase: Phase
) -> Iterator[Callable[[], Tensor]]:
    for step in range(phase.steps):
        pictures, labels = [], []
        for place in range(phase.batch_size):
            index = step * phase.batch_size + place
            source = tuple(SOURCES)[index % len(SOURCES)]
            canvas = SOURCES[source](world, stream(world.seed, "sight", index), PICTURED).canvas
            pictures.append(canvas.image)
            labels.append(slot_labels(canvas.placed))

        def loss(pictures=pictures, labels=labels) -> Tensor:
            logits = labeller(student.vision(pixels(pictures)).last_hidden_state)
            targets = torch.stack(labels, dim=1)
            return sum(
                _balanced(guess.flatten(0, 1), target.flatten())
                for guess, target in zip(logits, targets, strict=True)
            )

        yield loss


def _balanced(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in which the many empty slots weigh as much as the few filled ones."""
    loss = F.cross_entropy(logits, targets, reduction="none")
    filled = targets > 0
    return loss[filled].mean() + loss[~filled].mean()
