"""The 17 training sources, their categories, and the α and τ each one trains with.

A *source* is the data set a sample came from. Its category decides whether the teacher's word
counts: on language-heavy sources it does, on document sources it would mislead (the paper's
Table 5 and section 4.3). An unknown source is an error, never a silent default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ldistill.common.errors import did_you_mean, refuse

LANGUAGE = ("aokvqa", "figureqa", "iconqa", "robut_sqa", "scienceqa", "visual7w", "vqav2", "vsr")
DOCUMENT = (
    *("chart2text", "chartqa", "docvqa", "infographic_vqa", "ocrvqa"),
    *("textcaps", "textvqa", "vistext", "visualmrc"),
)
CATEGORIES: tuple[str, ...] = ("language", "document")
ALL = "all"
"""As a run's sources: whatever its shards hold."""
OTHERS = "others"
"""As a key: the sources that are not named."""
SUBSETS: dict[str, tuple[str, ...]] = {"full": CATEGORIES, "lang": ("language",)}
"""The categories of the paper's; :func:`resolve_sources` gives their sources."""


def normalise(name: str) -> str:
    """Source id of a display name: lower case; runs of blanks, ``-``, ``/``, ``.`` become ``_``."""
    return re.sub(r"[\s\-/.]+", "_", name.strip().lower())


def split_names(text: str) -> list[str]:
    """Names between commas; one inside parentheses, as in ``a(b,c)``, is part of its name."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def known_sources(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """``{source: category}`` of the 17 sources and of the caller's own."""
    known = dict.fromkeys(LANGUAGE, "language") | dict.fromkeys(DOCUMENT, "document")
    return known | dict(extra or {})


def category_of(name: str, extra: Mapping[str, str] | None = None) -> str:
    """``language`` or ``document``, of the 17 and those in ``extra``; else ValueError."""
    known = known_sources(extra)
    if name not in known:
        raise ValueError(
            f"unknown source {name!r}.{did_you_mean(name, known)} "
            f"Known sources: {', '.join(sorted(known))}. "
            f"Declare your own with --extra_sources {name}=language or {name}=document."
        )
    return known[name]


def resolve_sources(spec: str, extra: Mapping[str, str] | None = None) -> list[str]:
    """Source ids of a comma-separated list; of ``full`` or ``lang``, the paper's subsets together
    with the extra sources of the same categories."""
    if spec in SUBSETS:
        return [n for n, category in known_sources(extra).items() if category in SUBSETS[spec]]
    names = [normalise(part) for part in split_names(spec)]
    if not names:
        raise ValueError(
            f"no source in {spec!r}: give full, lang, all or names separated by commas."
        )
    for name in names:
        category_of(name, extra)
    return names


def parse_extra(specs: Iterable[str] | None) -> dict[str, str]:
    """``["receipts=document"]`` → ``{"receipts": "document"}``, or a ValueError."""
    extra: dict[str, str] = {}
    for spec in specs or ():
        name, _, category = spec.partition("=")
        name, category = normalise(name), category.strip().lower()
        cases = {
            f"extra source {spec!r}: write name=language or name=document (language: the teacher's "
            "word counts; document: labels alone).": not name or category not in CATEGORIES,
            f"extra source {name!r} is one of the 17 and has its category.": (
                name in known_sources()
            ),
        }
        refuse(cases)
        extra[name] = category
    return extra


def by_source(name: str, value: float | str, others: float) -> float | dict[str, float]:
    """α or τ of all sources, or by source: ``0.7`` is 0.7, ``0.7,vsr=0.9`` a dict.

    ``name`` is ``alpha`` or ``temperature``; ``others`` is what sources have that ``value`` says
    nothing of. Raises ValueError: it says something else, or what is out of bounds.
    """
    numbers: dict[str, float] = {}
    for part in split_names(str(value)) or [""]:
        source, _, text = part.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            raise ValueError(
                f"{name} {part!r}: write a number, source=number, or several between commas."
            ) from None
        cases = {
            f"alpha must lie in [0, 1], got {part}.": name == "alpha" and not 0 <= number <= 1,
            f"temperature must be above 0, got {part}.": (
                name == "temperature" and not 0 < number < math.inf
            ),
        }
        refuse(cases)
        numbers[normalise(source) or OTHERS] = number
    return numbers[OTHERS] if numbers.keys() == {OTHERS} else {OTHERS: others} | numbers


@dataclass(frozen=True)
class SourceWeights:
    """α and τ of every source a run trains on, in the order of ``names``.

    ``alpha[s] == 0`` means that source trains on labels alone and never meets the teacher.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    alpha: tuple[float, ...]
    temperature: tuple[float, ...]

    @classmethod
    def build(
        cls,
        names: Iterable[str],
        *,
        distil: str,
        alpha: float | Mapping[str, float],
        temperature: float | Mapping[str, float],
        extra: Mapping[str, str] | None = None,
    ) -> SourceWeights:
        """Weights of a run.

        Args:
            names: the sources in the run's shards.
            distil: ``none``, ``language``, ``all``, or source ids separated by commas.
            alpha: weight of the distillation term on distilling sources, in [0, 1], or by source
                (see :func:`by_source`); a source named there distils, except with ``none``.
            temperature: τ > 0, likewise.
            extra: categories of sources beyond the 17.

        Raises:
            ValueError: a source that is unknown, or named and not in the run.
        """
        names = tuple(names)
        categories = tuple(category_of(name, extra) for name in names)
        kinds = SUBSETS | {"none": (), "all": CATEGORIES} | {c: (c,) for c in CATEGORIES}
        if distil in kinds:
            chosen = {name for name, c in zip(names, categories) if c in kinds[distil]}
        else:
            chosen = set(resolve_sources(distil, extra))
            _check_named("distil", chosen, names)
        settled = []
        for field, value in (("alpha", alpha), ("temperature", temperature)):
            named = dict(value) if isinstance(value, Mapping) else {OTHERS: value}
            _check_named(field, named.keys() - {OTHERS}, names)
            if field == "alpha" and distil != "none":
                chosen |= named.keys()
            settled.append([float(named.get(name, named[OTHERS])) for name in names])
        alphas = (a if name in chosen else 0.0 for name, a in zip(names, settled[0]))
        return cls(names, categories, tuple(alphas), tuple(settled[1]))

    @property
    def distils(self) -> bool:
        """Whether any source meets the teacher."""
        return any(a > 0 for a in self.alpha)


def _check_named(field: str, named: Iterable[str], names: tuple[str, ...]) -> None:
    if absent := sorted(set(named) - set(names)):
        raise ValueError(
            f"{field} names {', '.join(absent)}, which this run does not train on: its sources are "
            f"{', '.join(names)}. Change --{field} or --sources."
        )
