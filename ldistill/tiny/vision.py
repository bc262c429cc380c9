"""The tiny student around the tiny language model: three phases teach it to see.

1. *Vision pretraining* stands for the pretrained SigLIP of a real VLM: for each cell of a picture
   the tower's patches tell, through a linear head that is thrown away, which writing, which mark
   and which colour lies there.
2. *Projector pretraining*: an image token is to be the word for what lies in its cell. The
   projector starts from a ridge regression of the language model's own embeddings on the patches;
   then projector and tower learn to come closer to them. So alignment begins with something that
   the frozen model has words for. Blank cells become line breaks.
3. *Alignment*: tower and projector learn to speak to the frozen model in chats about pictures. Long
   on purpose: only when the language model itself reads the image tokens is it a teacher worth
   listening to.

The decoder stays the language model's, weight for weight, plus rows for the image tokens.
"""

from __future__ import annotations

import io
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, cycle

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from ldistill.common.locate import resolve
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.processor import Processor
from ldistill.tiny.pictures import COLUMNS, LINES, Placed
from ldistill.tiny.prepare import STUDENT
from ldistill.tiny.scenes import PICTURED, SOURCES, sample
from ldistill.tiny.training import Example, Phase, label_losses
from ldistill.tiny.world import COLOURS, MARKS, PIECES, World

VISION = Phase("vision tower", steps=1000, batch_size=48, rate=2e-3)
PROJECTOR = Phase("projector", steps=500, batch_size=48, rate=2e-3)
ALIGNMENT = Phase("alignment", steps=1200, batch_size=32, rate=5e-4)
Learn = Callable[[Phase, nn.Module, Iterator[Tensor]], float]
"""`ldistill.tiny.training.optimise`."""
WRITING = ("", *PIECES, *string.digits)
KINDS = (WRITING, ("", *MARKS), ("", *COLOURS))
REGRESSED = 1700  # pictures of the regression
RIDGE = 1e-4
SHARPNESS = 10.0


@torch.no_grad()
def new_student(lm: LlamaForCausalLM, seed: int) -> NanoVLM:
    """A student of the shipped shape: its decoder is `lm` plus image tokens, vision is random."""
    torch.manual_seed(seed)
    student = NanoVLM(NanoVLMConfig.load(resolve(STUDENT)))
    state = lm.state_dict()
    embeddings = state["model.embed_tokens.weight"]
    added = student.config.extra_token_amount
    extra = embeddings.mean(0) + 0.02 * torch.randn(added, embeddings.shape[1])
    grown = torch.cat([embeddings, extra])
    state |= {"model.embed_tokens.weight": grown, "lm_head.weight": grown}
    student.decoder.load_state_dict(state)
    # Light paper gives nothing and ink much: nanoVLM feeds pixels in [0, 1] as they are, and on
    # nearly white pictures their mean would drown what is drawn.
    patch = student.vision.embeddings.patch_embedding
    patch.weight.mul_(4)
    patch.bias.copy_(-0.94 * patch.weight.sum((1, 2, 3)))
    return student


def teach(student: NanoVLM, processor: Processor, world: World, learn: Learn) -> float:
    """All three phases; returns the loss that the last one ended with."""
    student.requires_grad_(False)
    student.vision.requires_grad_(True)
    heads = nn.ModuleList(nn.Linear(4 * student.config.vit_hidden_dim, len(k)) for k in KINDS)
    learn(VISION, nn.ModuleList([student.vision, heads]), _sight(student, world, heads))
    table, tokenizer = student.decoder.get_input_embeddings().weight, processor.tokenizer
    with torch.no_grad():  # of every class of every kind, [classes, hidden]; nothing: a line break
        words = [
            torch.stack([table[tokenizer(word or "\n")["input_ids"]].mean(0) for word in kind])
            for kind in KINDS
        ]
        _regress(student, world, words)
    learning = nn.ModuleList([student.vision, student.projector]).requires_grad_(True)
    learn(PROJECTOR, learning, _nearness(student, world, words))

    def examples() -> Iterator[Example]:
        for index, source in zip(count(), cycle(SOURCES)):
            made = sample(world, source, index // len(SOURCES), aligning=True)
            yield processor.encode(made.turns, [(1, 1)]), made.images[0]

    def embed(ids: Tensor, pictures: Iterable[bytes]) -> Tensor:
        pixels = _pixels([Image.open(io.BytesIO(picture)) for picture in pictures])
        return student.embed(ids, {"pixel_values": pixels})

    losses = label_losses(ALIGNMENT, student.decoder, processor, examples(), embed)
    return learn(ALIGNMENT, learning, losses)


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """[pictures, 3, side, side] in [0, 1]."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def _seen(
    student: NanoVLM, world: World, name: str, indices: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """Cells of pictures of all sources in turn, and what is in them.

    A cell is two by two patches, as large as an image token: [pictures x cells, 4 x width] and
    int64 [kinds, pictures x cells].
    """
    sources = tuple(SOURCES.values())
    canvases = [
        sources[i % len(sources)](world, world.stream(name, i), PICTURED).canvas for i in indices
    ]
    patches = student.vision(_pixels([canvas.image for canvas in canvases])).last_hidden_state
    cells = patches.view(-1, LINES, 2, COLUMNS, 2, patches.shape[-1]).transpose(2, 3)
    labels = torch.cat([cell_labels(canvas.placed) for canvas in canvases], dim=1)
    return cells.flatten(3).flatten(0, 2), labels


def cell_labels(placed: Sequence[Placed]) -> Tensor:
    """Class of every kind in every cell, int64 [kinds, cells]; 0 where there is nothing."""
    labels = torch.zeros(len(KINDS), LINES * COLUMNS, dtype=torch.long)
    for thing in placed:
        for kind, value in enumerate((thing.piece, thing.mark, thing.colour)):
            if value is not None:
                labels[kind, thing.cell] = KINDS[kind].index(value)
    return labels


def _sight(student: NanoVLM, world: World, heads: nn.ModuleList) -> Iterator[Tensor]:
    """Cross-entropies in which the many empty cells weigh as much as the few filled ones."""
    size = VISION.batch_size
    for first in count(0, size):
        cells, labels = _seen(student, world, "sight", range(first, first + size))
        total = 0
        for head, label in zip(heads, labels, strict=True):
            loss, filled = F.cross_entropy(head(cells), label, reduction="none"), label > 0
            total += loss[filled].mean() + loss[~filled].mean()
        yield total


def _regress(student: NanoVLM, world: World, words: list[Tensor]) -> None:
    """Set the projector to the ridge regression of the words' embeddings on the patches."""
    parts = [
        _seen(student, world, "words", range(first, first - 100, -1))
        for first in range(-1, -1 - REGRESSED, -100)
    ]
    cells, labels = zip(*parts)
    features = torch.cat(cells).double()
    targets = _wanted(torch.cat(labels, dim=1), words).double()
    penalty = RIDGE * len(features) * torch.eye(features.shape[1], dtype=torch.double)
    solved = torch.linalg.solve(features.T @ features + penalty, features.T @ targets)
    student.projector.proj.weight.copy_(solved.T.float())


def _wanted(labels: Tensor, words: list[Tensor]) -> Tensor:
    """Embeddings that the image tokens are to have, [cells, hidden]: the sum of what is there."""
    present = labels > 0
    total = sum(words[k][labels[k]] * present[k, :, None] for k in range(len(words)))
    return torch.where(present.any(0)[:, None], total, words[0][:1])


def _nearness(student: NanoVLM, world: World, words: list[Tensor]) -> Iterator[Tensor]:
    """Squared distances to what is wanted, and the cross-entropy of telling the right word from
    others by its product with the token."""
    size = PROJECTOR.batch_size
    for first in count(0, size):
        cells, labels = _seen(student, world, "words", range(first, first + size))
        tokens, confusion = student.projector.proj(cells), []
        distance = (tokens - _wanted(labels, words)).square().sum(-1).mean()
        for table, label in zip(words, labels, strict=True):
            there = label > 0
            if there.any():
                logits = SHARPNESS * tokens[there] @ (table - table.mean(0)).T
                confusion.append(F.cross_entropy(logits, label[there]))
        yield distance + torch.stack(confusion).mean()
