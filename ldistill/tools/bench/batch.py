"""A batch that looks like the paper's training data, made of random tokens and noise.

Document lengths follow the paper's Table 5 (log-normal by median and 95th percentile), one picture
each, packed side by side. A fifth of the tokens are answers, half of those of sources that distil.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldistill.common.samples import IGNORE, Document
from ldistill.data.collate import Collate, LoadedDocument, LoadedPack
from ldistill.models.flops import StepCounts
from ldistill.models.named_pairs import base_vocabulary
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.towers import one_picture, picture_tokens
from ldistill.sources import DOCUMENT, LANGUAGE, SourceWeights

# Text tokens by source: median, 95th percentile, longest (the paper's Table 5).
LENGTHS: dict[str, tuple[int, int, int]] = {
    "aokvqa": (60, 100, 116), "figureqa": (187, 307, 321), "iconqa": (35, 56, 664),
    "robut_sqa": (102, 425, 1974), "scienceqa": (118, 549, 15171), "visual7w": (197, 705, 972),
    "vqav2": (58, 192, 673), "vsr": (26, 80, 98), "chart2text": (88, 225, 329),
    "chartqa": (35, 92, 134), "docvqa": (90, 265, 357), "infographic_vqa": (97, 234, 310),
    "ocrvqa": (102, 124, 162), "textcaps": (21, 30, 35), "textvqa": (34, 48, 56),
    "vistext": (126, 182, 217), "visualmrc": (70, 241, 292),
}  # fmt: skip
ANSWER_SHARE = 0.2
_HEAD = 2  # tokens before the picture
_SHORTEST_TEXT = 12


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


def mix_weights(mix: str, alpha: float, temperature: float) -> SourceWeights:
    """α and τ of the 17 sources; ``paper``: the language sources distil, ``uniform``: all do."""
    distil = "all" if mix == "uniform" else "language"
    return SourceWeights.build(LENGTHS, distil=distil, alpha=alpha, temperature=temperature)


@cache
def count_rows(image_tokens: int, limit: int, mix: str = "paper", *, rows: int = 64) -> RowCounts:
    """Averages over so many packed rows of the mix, ``limit`` tokens each, without making them.

    Raises ValueError: a row has no room for one document.
    """
    _, length, answer, source = np.array(list(_documents(image_tokens, rows, limit))).T
    taught = answer * (np.array(mix_weights(mix, 1.0, 1.0).alpha)[source] > 0)
    sums = {
        "tokens": length,
        "pairs": length * (length + 1) // 2,
        "tiles": np.ones_like(length),
        "targets": answer,
        "queries": taught,
        # one more position from token to token of the answer; the last sees length - 1
        "query_pairs": taught * (2 * length - answer - 1) // 2,
    }
    return RowCounts(**{name: int(each.sum()) / rows for name, each in sums.items()})


def paper_batch(config: Any, rows: int, limit: int) -> dict[str, Tensor]:
    """A packed batch as the collator makes it for a student's configuration, always the same.

    Rows have ``limit`` tokens. Raises ValueError: a row has no room for one document.
    """
    if isinstance(config, NanoVLMConfig):
        image_tokens, side = config.mp_image_token_length, config.vit_img_size
        picture = {"pixel_values": torch.ones(1, 3, side, side)}
    else:
        image_tokens, picture = picture_tokens(config), one_picture(config)
    rng, vocabulary = np.random.default_rng(0), base_vocabulary(config)
    packs = [LoadedPack() for _ in range(rows)]
    for number, (row, length, answer, source) in enumerate(_documents(image_tokens, rows, limit)):
        pixels = rng.random(picture["pixel_values"].shape, dtype=np.float32)
        ids = rng.integers(3, vocabulary, length, dtype=np.int32)
        ids[ids == config.image_token_id] = 2  # where that lies among the tokens of the text
        ids[_HEAD : _HEAD + image_tokens] = config.image_token_id
        labels = np.full(length, IGNORE, dtype=np.int32)
        labels[-answer - 1 : -1] = ids[-answer:]  # shifted by one
        pictures = picture | {"pixel_values": torch.from_numpy(pixels)}
        document = LoadedDocument(number, source, Document(ids, labels), pictures)
        packs[row].documents.append(document)
    batch = Collate(pad_token_id=2, length=limit)(packs)
    del batch["drops"]
    return batch


def _documents(image_tokens: int, rows: int, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Row, length, answer tokens and source of documents that fill row after row; the category with
    fewer answer tokens so far comes next."""
    shortest, rng = _HEAD + image_tokens + _SHORTEST_TEXT, np.random.default_rng(0)
    if limit < shortest:
        raise ValueError(f"a row needs room for a document of {shortest} tokens, got {limit}.")
    answered, names = {LANGUAGE: 0, DOCUMENT: 0}, list(LENGTHS)
    for row in range(rows):
        start = 0
        while limit - start >= shortest:
            category = min(answered, key=answered.__getitem__)
            source = names.index(rng.choice(category))
            median, p95, longest = LENGTHS[names[source]]
            spread = math.log(p95 / median) / 1.645  # the standard normal's 95th percentile
            text = int(min(median * math.exp(spread * rng.standard_normal()), longest))
            length = min(_HEAD + image_tokens + max(text, _SHORTEST_TEXT), limit - start)
            answer = min(round(ANSWER_SHARE * length), length - shortest + _SHORTEST_TEXT - 1)
            answered[category] += answer
            yield row, length, answer, source
            start += length
