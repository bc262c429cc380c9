"""How often the documents of each source come in an epoch: repeats, fractions, shares of tokens.

    mix = parse_mix("vqav2=2,docvqa=0.5,smoltalk=25%")
    repeats = repeats_of(mix, index.sources, documents=[...], tokens=[...])
    counts = epoch_counts(usable_documents, repeats[0], seed=0, epoch=3)

A source that is not named comes once. A fraction is dealt: a source's documents lie in a shuffled
circle, and every epoch goes on in it where the one before stopped. So an epoch has another subset
than the one before, and over all of them no document comes twice more often than another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ldistill.common.errors import did_you_mean
from ldistill.data.packing import scramble
from ldistill.sources import normalise, split_names


@dataclass(frozen=True)
class Amount:
    """What is asked of a source: `value` times its documents or, a `share`, of all tokens."""

    value: Fraction
    share: bool


def parse_mix(text: str | None) -> dict[str, Amount]:
    """Amounts by source of ``a=2,b=0.5,c=25%``. Raises ValueError."""
    mix: dict[str, Amount] = {}
    for part in split_names(text or ""):
        name, _, number = map(str.strip, part.rpartition("="))
        share = number.endswith("%")
        try:
            value = Fraction(number.removesuffix("%")) / (100 if share else 1)
        except (ValueError, ZeroDivisionError):
            value = Fraction(0)
        if not name or value <= 0:
            raise ValueError(
                f"mix {part!r}: write source=2 (times in an epoch, 0.5: half of it) or source=25% "
                "(of an epoch's tokens), above 0; a source is left out with --sources, and how CE "
                "and KD combine is --combine."
            )
        if normalise(name) in mix:
            raise ValueError(f"mix names {normalise(name)} twice.")
        mix[normalise(name)] = Amount(value, share)
    return mix


def repeats_of(
    mix: Mapping[str, Amount],
    sources: Sequence[str],
    documents: Sequence[int],
    tokens: Sequence[int],
) -> list[Fraction]:
    """How often the documents of each source come in an epoch, on average over them.

    Args:
        mix: as parsed.
        sources: of the run.
        documents, tokens: usable ones of each source.

    Raises:
        ValueError: a source that is not in the run, shares that cannot be met without repeating
            documents or that leave nothing to the others, less than one document.
    """
    for name in mix:
        if name not in sources:
            raise ValueError(
                f"mix names {name}, which this run does not read.{did_you_mean(name, sources)} "
                f"Its sources are {', '.join(sources)}."
            )
    amounts = [mix.get(name, Amount(Fraction(1), share=False)) for name in sources]
    total = _epoch_tokens(amounts, tokens)
    repeats = []
    for name, amount, count, size in zip(sources, amounts, documents, tokens, strict=True):
        repeats.append(amount.value * total / size if amount.share else amount.value)
        if amount.share and repeats[-1] > 1:
            raise ValueError(
                f"mix {name}={_percent(amount.value)} of an epoch's {round(total):,} tokens is "
                f"{float(repeats[-1]):.3g} times what it has: ask for less, or say that documents "
                f"repeat with {name}={float(repeats[-1]):.3g}."
            )
        if name in mix and repeats[-1] * count < 1:
            raise ValueError(f"mix {name} is less than one of its {count} documents an epoch.")
    return repeats


def _epoch_tokens(amounts: Sequence[Amount], tokens: Sequence[int]) -> Fraction:
    """Tokens of an epoch: as many as make what comes without a share fill what the shares leave.

    Where every source has a share, as many as the scarcest allows.
    """
    asked = sum(amount.value for amount in amounts if amount.share)
    pairs = list(zip(amounts, tokens, strict=True))
    rest = sum(amount.value * size for amount, size in pairs if not amount.share)
    if not rest and asked != 1:
        raise ValueError(f"mix gives every source a share, and they sum to {_percent(asked)}.")
    if rest and asked >= 1:
        raise ValueError(
            f"mix has shares of {_percent(asked)}, which leaves nothing to the other sources: they "
            "need repeats or a share, or to be left out of --sources."
        )
    return rest / (1 - asked) if rest else min(size / a.value for a, size in pairs)


def _percent(share: Fraction) -> str:
    return f"{float(100 * share):.4g}%"


def epoch_counts(documents: np.ndarray, repeats: Fraction, seed: int, epoch: int) -> np.ndarray:
    """How often each of a source's documents comes in an epoch, int64 of their shape.

    Args:
        documents: their numbers, int64.
        repeats: on average over them; an epoch has `repeats` times their number, rounded so that
            all epochs together have exactly that many.
        seed, epoch: of the order.
    """
    size = len(documents)
    if not size:
        return np.zeros(0, dtype=np.int64)
    first, last = (int(repeats * size * number) for number in (epoch, epoch + 1))
    whole, left = divmod(last - first, size)
    counts = np.full(size, whole, dtype=np.int64)
    if left:
        circle = np.argsort(scramble(documents, seed, 3), kind="stable")
        counts[circle[(first + np.arange(left)) % size]] += 1
    return counts
