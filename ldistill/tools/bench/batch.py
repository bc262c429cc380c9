"""A batch that looks like the paper's training data, made of random tokens and noise.

Document lengths follow the paper's Table 5 (log-normal by median and 95th percentile), one picture
each, packed side by side. A fifth of the tokens are answers, and half of those belong to sources
that distil: the mix the cost of a training step depends on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldistill.distill.targets import IGNORE
from ldistill.models.flops import StepCounts
from ldistill.sources import SourceWeights, category_of

# Text tokens by source: median, 95th percentile, longest (the paper's Table 5).
LENGTHS: dict[str, tuple[int, int, int]] = {
    "aokvqa": (60, 100, 116),
    "figureqa": (187, 307, 321),
    "iconqa": (35, 56, 664),
    "robut_sqa": (102, 425, 1974),
    "scienceqa": (118, 549, 15171),
    "visual7w": (197, 705, 972),
    "vqav2": (58, 192, 673),
    "vsr": (26, 80, 98),
    "chart2text": (88, 225, 329),
    "chartqa": (35, 92, 134),
    "docvqa": (90, 265, 357),
    "infographic_vqa": (97, 234, 310),
    "ocrvqa": (102, 124, 162),
    "textcaps": (21, 30, 35),
    "textvqa": (34, 48, 56),
    "vistext": (126, 182, 217),
    "visualmrc": (70, 241, 292),
}
MIXES = {"paper": "language", "uniform": "all"}
ANSWER_SHARE = 0.2
_HEAD = 2  # tokens before the picture
_SHORTEST_TEXT = 12


@dataclass(frozen=True)
class BatchShape:
    """What a batch depends on of a student.

    Args:
        image_tokens: positions of one picture.
        image_size: its side in pixels.
        image_token_id: the token that stands there.
        vocabulary: tokens of the LM; ids of text are drawn from it.
    """

    image_tokens: int
    image_size: int
    image_token_id: int
    vocabulary: int


@dataclass(frozen=True)
class RowCounts:
    """What one packed row holds on average, over many."""

    tokens: float
    tiles: float
    pairs: float
    supervised: float
    teacher_rows: float
    teacher_pairs: float

    def times(self, rows: float, length: int, *, teacher: bool = True) -> StepCounts:
        """Counts of so many rows, with or without a teacher."""
        taught = rows if teacher else 0
        return StepCounts(
            positions=round(rows * length),
            pairs=round(rows * self.pairs),
            tiles=round(rows * self.tiles),
            rows=round(rows * self.supervised),
            teacher_rows=round(taught * self.teacher_rows),
            teacher_pairs=round(taught * self.teacher_pairs),
            kd_rows=round(taught * self.teacher_rows),
        )


class _Place(NamedTuple):
    """A document in the batch: row, first position, length, answer tokens, source."""

    row: int
    start: int
    length: int
    answer: int
    source: int


def mix_weights(mix: str, alpha: float, temperature: float) -> SourceWeights:
    """α and τ of the 17 sources.

    Args:
        mix: ``paper`` (language sources distil), ``uniform`` (all do).
        alpha, temperature: of the distilling sources.

    Raises:
        ValueError: unknown mix.
    """
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {mix!r}.")
    return SourceWeights.build(LENGTHS, distil=MIXES[mix], alpha=alpha, temperature=temperature)


def count_rows(image_tokens: int, limit: int, mix: str = "paper", *, rows: int = 64) -> RowCounts:
    """Averages over packed rows of the mix, without making them.

    Args:
        image_tokens: positions of one picture.
        limit: tokens in a row.
        mix: ``paper`` or ``uniform``.
        rows: how many are averaged over.

    Raises:
        ValueError: a row has no room for one document.
    """
    alphas = mix_weights(mix, 1.0, 1.0).alpha
    places = _places(image_tokens, rows, limit, 0)
    taught = [place for place in places if alphas[place.source] > 0]

    def seen(place: _Place) -> int:
        """Positions the answer's rows see: one more from row to row, the last sees length - 1."""
        last = place.length - 1
        return place.answer * last - place.answer * (place.answer - 1) // 2

    return RowCounts(
        tokens=sum(place.length for place in places) / rows,
        tiles=len(places) / rows,
        pairs=sum(place.length * (place.length + 1) // 2 for place in places) / rows,
        supervised=sum(place.answer for place in places) / rows,
        teacher_rows=sum(place.answer for place in taught) / rows,
        teacher_pairs=sum(map(seen, taught)) / rows,
    )


def paper_batch(shape: BatchShape, rows: int, limit: int, *, seed: int = 0) -> dict[str, Tensor]:
    """A packed batch with the keys, shapes and dtypes of ``ldistill.data.collate``.

    Args:
        shape: of the student.
        rows: batch rows.
        limit: tokens in a row.
        seed: the same one gives the same batch.

    Raises:
        ValueError: a row has no room for one document.
    """
    places = _places(shape.image_tokens, rows, limit, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, shape.vocabulary, (rows, limit), generator=generator)
    batch = {
        "input_ids": ids,
        "position_ids": torch.zeros_like(ids),
        "labels": torch.full_like(ids, IGNORE),
        "document_ids": torch.full_like(ids, -1),
    }
    for place in places:
        _write(batch, place, shape)
    _pad(batch)
    columns = {
        "batch": [p.row for p in places],
        "start": [p.start for p in places],
        "length": [p.length for p in places],
        "source": [p.source for p in places],
        "sample": list(range(len(places))),
    }
    batch |= {f"doc_{name}": torch.tensor(values) for name, values in columns.items()}
    side = shape.image_size
    batch["pixel_values"] = torch.rand(len(places), 3, side, side, generator=generator)
    return batch


def _places(image_tokens: int, rows: int, limit: int, seed: int) -> list[_Place]:
    """Documents of a batch, row after row."""
    shortest = _HEAD + image_tokens + _SHORTEST_TEXT
    if rows < 1 or limit < shortest:
        raise ValueError(
            f"a batch needs at least 1 row of {shortest} tokens, got {rows} of {limit}."
        )
    return list(_fill(image_tokens, rows, limit, shortest, np.random.default_rng(seed)))


def _fill(
    image_tokens: int, rows: int, limit: int, shortest: int, rng: np.random.Generator
) -> Iterator[_Place]:
    """Fill row after row; the category with fewer answer tokens so far comes next."""
    names = list(LENGTHS)
    by_category = {
        category: [i for i, name in enumerate(names) if category_of(name) == category]
        for category in ("language", "document")
    }
    answered = dict.fromkeys(by_category, 0)
    for row in range(rows):
        start = 0
        while limit - start >= shortest:
            category = min(answered, key=answered.__getitem__)
            source = int(rng.choice(by_category[category]))
            text = _draw_length(names[source], rng)
            length = _HEAD + image_tokens + max(text, _SHORTEST_TEXT)
            length = min(length, limit - start)
            answer = min(round(ANSWER_SHARE * length), length - shortest + _SHORTEST_TEXT - 1)
            answered[category] += answer
            yield _Place(row, start, length, answer, source)
            start += length


def _draw_length(name: str, rng: np.random.Generator) -> int:
    median, p95, longest = LENGTHS[name]
    spread = math.log(p95 / median) / 1.645  # the standard normal's 95th percentile
    return int(min(median * math.exp(spread * rng.standard_normal()), longest))


def _write(batch: dict[str, Tensor], place: _Place, shape: BatchShape) -> None:
    """Positions, picture and labels of one document: picture first, answer last."""
    row, end = place.row, place.start + place.length
    first = 0 if place.start == 0 else int(batch["document_ids"][row, place.start - 1]) + 1
    batch["document_ids"][row, place.start : end] = first
    batch["position_ids"][row, place.start : end] = torch.arange(place.length)
    picture = place.start + _HEAD
    batch["input_ids"][row, picture : picture + shape.image_tokens] = shape.image_token_id
    answer = slice(end - place.answer - 1, end - 1)  # labels are shifted by one
    batch["labels"][row, answer] = batch["input_ids"][row, end - place.answer : end]


def _pad(batch: dict[str, Tensor]) -> None:
    """Rows' tails: the end token and positions from 0, as the collator leaves them."""
    for row, documents in enumerate(batch["document_ids"]):
        used = int((documents >= 0).sum())
        batch["input_ids"][row, used:] = 2
        batch["position_ids"][row, used:] = torch.arange(documents.numel() - used)
