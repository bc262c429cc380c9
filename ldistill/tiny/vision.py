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
import itertools
import string
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from ldistill.common.locate import resolve
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.processor import Processor
from ldistill.tiny.pictures import COLUMNS, LINES, Canvas, Placed
from ldistill.tiny.prepare import STUDENT
from ldistill.tiny.scenes import PICTURED, SOURCES, captioned
from ldistill.tiny.training import Example, Phase, batches, label_loss, optimise, pad
from ldistill.tiny.world import COLOURS, MARKS, PIECES, World

VISION = Phase("vision tower", steps=1000, batch_size=48, rate=2e-3)
PROJECTOR = Phase("projector", steps=500, batch_size=48, rate=2e-3)
ALIGNMENT = Phase("alignment", steps=1200, batch_size=32, rate=5e-4)
WRITING = ("", *PIECES, *string.digits)
KINDS = (WRITING, ("", *MARKS), ("", *COLOURS))
CELLS = LINES * COLUMNS
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


def _canvases(world: World, name: str, indices: Iterable[int]) -> list[Canvas]:
    """Pictures of all sources in turn."""
    sources = tuple(SOURCES.values())
    return [
        sources[i % len(sources)](world, world.stream(name, i), PICTURED).canvas for i in indices
    ]


def _batches(world: World, name: str, phase: Phase) -> Iterator[list[Canvas]]:
    for first in range(0, phase.steps * phase.batch_size, phase.batch_size):
        yield _canvases(world, name, range(first, first + phase.batch_size))


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """[pictures, 3, side, side] in [0, 1]."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def _patches(student: NanoVLM, canvases: Sequence[Canvas]) -> Tensor:
    """[pictures, patches, width]."""
    return student.vision(_pixels([canvas.image for canvas in canvases])).last_hidden_state


def cell_labels(placed: Sequence[Placed]) -> Tensor:
    """Class of every kind in every cell, int64 [kinds, cells]; 0 where there is nothing."""
    labels = torch.zeros(len(KINDS), CELLS, dtype=torch.long)
    for thing in placed:
        for kind, value in enumerate((thing.piece, thing.mark, thing.colour)):
            if value is not None:
                labels[kind, thing.cell] = KINDS[kind].index(value)
    return labels


def pretrain_vision(student: NanoVLM, world: World, phase: Phase, progress: Progress) -> None:
    """Train the vision tower."""
    student.vision.requires_grad_(True)
    width = student.config.vit_hidden_dim
    heads = nn.ModuleList(nn.Linear(4 * width, len(kind)) for kind in KINDS)

    def losses() -> Iterator[Tensor]:
        for canvases in _batches(world, "sight", phase):
            labels = torch.stack([cell_labels(canvas.placed) for canvas in canvases], dim=1)
            # A cell is two by two patches, as large as an image token.
            patches = _patches(student, canvases).view(-1, LINES, 2, COLUMNS, 2, width)
            cells = patches.transpose(2, 3).reshape(-1, 4 * width)  # [pictures x cells, ...]
            yield sum(
                _balanced(head(cells), label.flatten())
                for head, label in zip(heads, labels, strict=True)
            )

    optimise(phase, nn.ModuleList([student.vision, heads]), losses(), progress)


def _balanced(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in which the many empty cells weigh as much as the few filled ones."""
    loss = F.cross_entropy(logits, labels, reduction="none")
    filled = labels > 0
    return loss[filled].mean() + loss[~filled].mean()


def pretrain_projector(
    student: NanoVLM, processor: Processor, world: World, phase: Phase, progress: Progress
) -> None:
    """Set the projector by regression, then train it and the vision tower."""
    table, tokenizer = student.decoder.get_input_embeddings().weight, processor.tokenizer
    with torch.no_grad():  # of every class of every kind, [classes, hidden]; nothing: a line break
        words = [
            torch.stack([table[tokenizer(word or "\n")["input_ids"]].mean(0) for word in kind])
            for kind in KINDS
        ]
    _regress(student, words, _canvases(world, "words", range(-1, -1 - REGRESSED, -1)))
    learning = nn.ModuleList([student.vision, student.projector]).requires_grad_(True)

    def losses() -> Iterator[Tensor]:
        for canvases in _batches(world, "words", phase):
            tokens = student.projector(_patches(student, canvases)).flatten(0, 1)
            labels = _all_labels(canvases)
            distance = (tokens - _wanted(labels, words)).square().sum(-1).mean()
            yield distance + _confusion(tokens, labels, words)

    optimise(phase, learning, losses(), progress)


@torch.no_grad()
def _regress(student: NanoVLM, words: list[Tensor], canvases: Sequence[Canvas]) -> None:
    """Set the projector to the ridge regression of the words' embeddings on the patches."""
    seen: list[Tensor] = []
    hook = student.projector.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for start in range(0, len(canvases), 100):
        student.projector(_patches(student, canvases[start : start + 100]))
    hook.remove()
    features = torch.cat(seen).flatten(0, 1).double()
    targets = _wanted(_all_labels(canvases), words).double()
    penalty = RIDGE * len(features) * torch.eye(features.shape[1], dtype=torch.double)
    solved = torch.linalg.solve(features.T @ features + penalty, features.T @ targets)
    student.projector.proj.weight.copy_(solved.T.float())


def _all_labels(canvases: Sequence[Canvas]) -> Tensor:
    """Classes of all cells, int64 [canvases x cells, kinds]."""
    labels = torch.stack([cell_labels(canvas.placed) for canvas in canvases])
    return labels.transpose(1, 2).flatten(0, 1)


def _wanted(labels: Tensor, words: list[Tensor]) -> Tensor:
    """Embeddings that the image tokens are to have, [cells, hidden]: the sum of what is there."""
    present = labels > 0
    total = sum(words[k][labels[:, k]] * present[:, k, None] for k in range(len(words)))
    return torch.where(present.any(1, keepdim=True), total, words[0][:1])


def _confusion(tokens: Tensor, labels: Tensor, words: list[Tensor]) -> Tensor:
    """Cross-entropy of telling the right word from others by its product with the token."""
    losses = []
    for kind, table in enumerate(words):
        there = labels[:, kind] > 0
        if there.any():
            logits = SHARPNESS * tokens[there] @ (table - table.mean(0)).T
            losses.append(F.cross_entropy(logits, labels[there, kind]))
    return torch.stack(losses).mean()


def align(
    student: NanoVLM, processor: Processor, world: World, phase: Phase, progress: Progress
) -> float:
    """Train vision tower and projector on chats about pictures; returns the final loss."""
    student.requires_grad_(False)
    learning = nn.ModuleList([student.vision, student.projector]).requires_grad_(True)

    def examples() -> Iterator[Example]:
        for index, source in zip(itertools.count(), itertools.cycle(SOURCES)):
            sample = captioned(world, source, index // len(SOURCES))
            yield processor.encode(sample.turns, [(1, 1)]), sample.images[0]

    def losses() -> Iterator[Tensor]:
        for batch in batches(examples(), phase.batch_size):
            ids, labels = pad(batch, processor.pad_token_id)
            pictures = [Image.open(io.BytesIO(picture)) for _, picture in batch]
            embeds = student.embed(ids, {"pixel_values": _pixels(pictures)})
            yield label_loss(student.decoder, labels, inputs_embeds=embeds)

    return optimise(phase, learning, losses(), progress)
