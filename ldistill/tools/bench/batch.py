"""A batch that looks like the paper's training data, made of random tokens and noise.

Document lengths follow the paper's Table 5 (log-normal by median and 95th percentile), one picture
each, packed side by side. A fifth of the tokens are answers, and half of those belong to sources
that distil: the mix the cost of a training step depends on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldistill.common.samples import IGNORE, Document, Pictures
from ldistill.data.collate import Collate, LoadedDocument, LoadedPack
from ldistill.models.flops import StepCounts
from ldistill.models.named_pairs import base_vocabulary
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.towers import one_picture, picture_tokens
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


class BatchShape(NamedTuple):
    """What a batch depends on of a student."""

    image_tokens: int  # positions of one picture
    picture: Pictures  # tensors of one, blank
    image_token_id: int  # stands there
    vocabulary: int  # tokens of the LM; ids of text are drawn from it


def batch_shape(config: Any) -> BatchShape:
    """Of a student's configuration."""
    if isinstance(config, NanoVLMConfig):
        tokens, side = config.mp_image_token_length, config.vit_img_size
        picture = {"pixel_values": torch.ones(1, 3, side, side)}
    else:
        tokens, picture = picture_tokens(config), one_picture(config)
    return BatchShape(tokens, picture, config.image_token_id, base_vocabulary(config))


class RowCounts(NamedTuple):
    """What one packed row holds on average, over many."""

    tokens: float
    pairs: float
    tiles: float
    targets: float
    queries: float
    query_pairs: float

    def times(self, rows: float, length: int, *, teacher: bool = True) -> StepCounts:
        """Counts of so many rows, with or without a teacher."""
        student = (rows * each for each in (length, self.pairs, self.tiles, self.targets))
        taught = (rows * teacher * each for each in (self.queries, self.query_pairs, self.queries))
        return StepCounts(*map(round, student), *map(round, taught))


class _Document(NamedTuple):
    """A document in the batch: row, length, answer tokens, source."""

    row: int
    length: int
    answer: int
    source: int


def mix_weights(mix: str, alpha: float, temperature: float) -> SourceWeights:
    """α and τ of the 17 sources; ``paper``: the language sources distil, ``uniform``: all do."""
    return SourceWeights.build(LENGTHS, distil=MIXES[mix], alpha=alpha, temperature=temperature)


@cache
def count_rows(image_tokens: int, limit: int, mix: str = "paper", *, rows: int = 64) -> RowCounts:
    """Averages over so many packed rows of the mix, ``limit`` tokens each, without making them.

    Raises ValueError: a row has no room for one document.
    """
    alphas = mix_weights(mix, 1.0, 1.0).alpha
    documents = list(_documents(image_tokens, rows, limit, 0))
    taught = [document for document in documents if alphas[document.source] > 0]

    return RowCounts(
        tokens=sum(d.length for d in documents) / rows,
        pairs=sum(d.length * (d.length + 1) // 2 for d in documents) / rows,
        tiles=len(documents) / rows,
        targets=sum(d.answer for d in documents) / rows,
        queries=sum(d.answer for d in taught) / rows,
        # one more position from token to token of the answer; the last sees length - 1
        query_pairs=sum(d.answer * (2 * d.length - d.answer - 1) // 2 for d in taught) / rows,
    )


def paper_batch(shape: BatchShape, rows: int, limit: int, *, seed: int = 0) -> dict[str, Tensor]:
    """A packed batch as the collator makes it: rows of ``limit`` tokens, drawn from the seed.

    Raises ValueError: a row has no room for one document.
    """
    rng, blank = np.random.default_rng(seed), shape.picture["pixel_values"]
    packs = [LoadedPack() for _ in range(rows)]
    for number, drawn in enumerate(_documents(shape.image_tokens, rows, limit, seed)):
        pixels = torch.from_numpy(rng.random(blank.shape, dtype=np.float32))
        made = _random_document(shape, drawn, rng)
        pictures = shape.picture | {"pixel_values": pixels}
        document = LoadedDocument(number, drawn.source, made, pictures)
        packs[drawn.row].documents.append(document)
    batch = Collate(pad_token_id=2, length=limit)(packs)
    del batch["drops"]
    return batch


def _random_document(shape: BatchShape, drawn: _Document, rng: np.random.Generator) -> Document:
    """Random text; the picture comes first, the answer last."""
    ids = rng.integers(3, shape.vocabulary, drawn.length, dtype=np.int32)
    ids[ids == shape.image_token_id] = 2  # where that lies among the tokens of the text
    ids[_HEAD : _HEAD + shape.image_tokens] = shape.image_token_id
    labels = np.full(drawn.length, IGNORE, dtype=np.int32)
    labels[-drawn.answer - 1 : -1] = ids[-drawn.answer :]  # shifted by one
    return Document(ids, labels)


def _documents(image_tokens: int, rows: int, limit: int, seed: int) -> Iterator[_Document]:
    """Fill row after row; the category with fewer answer tokens so far comes next."""
    shortest, rng = _HEAD + image_tokens + _SHORTEST_TEXT, np.random.default_rng(seed)
    if limit < shortest:
        raise ValueError(f"a row needs room for a document of {shortest} tokens, got {limit}.")
    by_category = {"language": [], "document": []}
    for source, name in enumerate(LENGTHS):
        by_category[category_of(name)].append(source)
    answered, lengths = dict.fromkeys(by_category, 0), list(LENGTHS.values())
    for row in range(rows):
        start = 0
        while limit - start >= shortest:
            category = min(answered, key=answered.__getitem__)
            source = int(rng.choice(by_category[category]))
            median, p95, longest = lengths[source]
            spread = math.log(p95 / median) / 1.645  # the standard normal's 95th percentile
            text = int(min(median * math.exp(spread * rng.standard_normal()), longest))
            length = min(_HEAD + image_tokens + max(text, _SHORTEST_TEXT), limit - start)
            answer = min(round(ANSWER_SHARE * length), length - shortest + _SHORTEST_TEXT - 1)
            answered[category] += answer
            yield _Document(row, length, answer, source)
            start += length
