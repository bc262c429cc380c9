"""A batch that looks like the paper's training data, made of random tokens and noise.

Document lengths follow the paper's Table 5 (log-normal by median and 95th percentile), one picture
each, packed side by side. A fifth of the tokens are answers, and half of those belong to sources
that distil: the mix the cost of a training step depends on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldistill.rows import IGNORE
from ldistill.sources import SourceWeights, category_of
from ldistill.students.nanovlm_config import NanoVLMConfig

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


def paper_batch(
    config: NanoVLMConfig, rows: int, limit: int, *, seed: int = 0
) -> dict[str, Tensor]:
    """A packed batch with the keys, shapes and dtypes of ``ldistill.data.collate``.

    Args:
        config: of the student; gives vocabulary, picture size and tokens a picture.
        rows: batch rows.
        limit: tokens in a row.
        seed: the same one gives the same batch.

    Raises:
        ValueError: a row has no room for one document.
    """
    shortest = _HEAD + config.mp_image_token_length + _SHORTEST_TEXT
    if rows < 1 or limit < shortest:
        raise ValueError(
            f"a batch needs at least 1 row of {shortest} tokens, got {rows} of {limit}."
        )
    places = list(_places(config, rows, limit, shortest, np.random.default_rng(seed)))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.lm_base_vocab_size, (rows, limit), generator=generator)
    batch = {
        "input_ids": ids,
        "position_ids": torch.zeros_like(ids),
        "labels": torch.full_like(ids, IGNORE),
        "document_ids": torch.full_like(ids, -1),
    }
    for place in places:
        _write(batch, place, config)
    _pad(batch)
    columns = {
        "batch": [p.row for p in places],
        "start": [p.start for p in places],
        "length": [p.length for p in places],
        "source": [p.source for p in places],
        "sample": list(range(len(places))),
    }
    batch |= {f"doc_{name}": torch.tensor(values) for name, values in columns.items()}
    side = config.vit_img_size
    batch["pixel_values"] = torch.rand(len(places), 3, side, side, generator=generator)
    return batch


def _places(
    config: NanoVLMConfig, rows: int, limit: int, shortest: int, rng: np.random.Generator
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
            length = _HEAD + config.mp_image_token_length + max(text, _SHORTEST_TEXT)
            length = min(length, limit - start)
            answer = min(round(ANSWER_SHARE * length), length - shortest + _SHORTEST_TEXT - 1)
            answered[category] += answer
            yield _Place(row, start, length, answer, source)
            start += length


def _draw_length(name: str, rng: np.random.Generator) -> int:
    median, p95, longest = LENGTHS[name]
    spread = math.log(p95 / median) / 1.645  # the standard normal's 95th percentile
    return int(min(median * math.exp(spread * rng.standard_normal()), longest))


def _write(batch: dict[str, Tensor], place: _Place, config: NanoVLMConfig) -> None:
    """Positions, picture and labels of one document: picture first, answer last."""
    row, end = place.row, place.start + place.length
    first = 0 if place.start == 0 else int(batch["document_ids"][row, place.start - 1]) + 1
    batch["document_ids"][row, place.start : end] = first
    batch["position_ids"][row, place.start : end] = torch.arange(place.length)
    picture = place.start + _HEAD
    batch["input_ids"][row, picture : picture + config.mp_image_token_length] = (
        config.image_token_id
    )
    answer = slice(end - place.answer - 1, end - 1)  # labels are shifted by one
    batch["labels"][row, answer] = batch["input_ids"][row, end - place.answer : end]


def _pad(batch: dict[str, Tensor]) -> None:
    """Rows' tails: the end token and positions from 0, as the collator leaves them."""
    for row, documents in enumerate(batch["document_ids"]):
        used = int((documents >= 0).sum())
        batch["input_ids"][row, used:] = 2
        batch["position_ids"][row, used:] = torch.arange(documents.numel() - used)
