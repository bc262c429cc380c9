"""Documents that are not trained on: a share of every source, by a hash of what a document is.

held = held_out(index, parse_share("1%")); Order(index, chosen=~held, ...)
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np

from ldistill.data.index import ShardIndex
from ldistill.data.packing import scramble


def parse_share(text: str) -> Fraction:
    """A share such as ``1%`` or ``0.01``, between 0 and 1. Raises ValueError."""
    try:
        share = Fraction(text.strip().removesuffix("%")) / (100 if text.strip()[-1:] == "%" else 1)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        raise ValueError(f"validation {text!r}: write a share of the documents, 1% or 0.01.")
    return share


def held_out(index: ShardIndex, share: Fraction) -> np.ndarray:
    """Mask [samples] of the documents held out.

    A function of a document's source and its number in the input: the same for every seed, epoch
    and run, and however the shards were cut.

    Raises:
        ValueError: no document is held out, or none of a source is left to train on.
    """
    masks = []
    for number, source in enumerate(index.sources):
        salt = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")
        rows = scramble(index.source_samples(number)["row"], salt)
        masks.append(rows < np.uint64(int(share * 2**64)))
        if masks[-1].all():
            raise ValueError(
                f"validation {float(share):.3g} holds out all {len(rows)} documents of {source}: "
                "choose a smaller share, or leave the source out of --sources."
            )
    if not any(mask.any() for mask in masks):
        raise ValueError(
            f"validation {float(share):.3g} of {len(index)} documents is none: choose a larger "
            "share, or give shards of their own with --eval_shards."
        )
    return np.concatenate(masks)
