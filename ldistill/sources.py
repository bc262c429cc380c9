"""The 17 training sources, their categories, and the α and τ each one trains with.

A *source* is the data set a sample came from. Its category decides whether the teacher's word
counts: on language-heavy sources it does, on document sources it would mislead (the paper's
Table 5 and section 4.3). An unknown source is an error, never a silent default.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LANGUAGE: tuple[str, ...] = (
    "aokvqa",
    "figureqa",
    "iconqa",
    "robut_sqa",
    "scienceqa",
    "visual7w",
    "vqav2",
    "vsr",
)
DOCUMENT: tuple[str, ...] = (
    "chart2text",
    "chartqa",
    "docvqa",
    "infographic_vqa",
    "ocrvqa",
    "textcaps",
    "textvqa",
    "vistext",
    "visualmrc",
)
CATEGORIES: tuple[str, ...] = ("language", "document")
ALL = "all"
"""As a run's sources: whatever its shards hold."""
SUBSETS: dict[str, tuple[str, ...]] = {"full": LANGUAGE + DOCUMENT, "lang": LANGUAGE}


def normalise(name: str) -> str:
    """Source id of a display name: lower case; runs of blanks, ``-`` and ``/`` become ``_``."""
    return re.sub(r"[\s\-/]+", "_", name.strip().lower())


def split_names(text: str) -> list[str]:
    """Names between commas; one inside parentheses, as in ``a(b,c)``, is part of its name."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def known_sources(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """``{source: category}`` of the 17 sources and of the caller's own."""
    known = dict.fromkeys(LANGUAGE, "language") | dict.fromkeys(DOCUMENT, "document")
    return known | dict(extra or {})


def category_of(name: str, extra: Mapping[str, str] | None = None) -> str:
    """``"language"`` or ``"document"``.

    Raises:
        ValueError: the source is neither one of the 17 nor declared in ``extra``.
    """
    known = known_sources(extra)
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"unknown source {name!r}.{hint} Known sources: {', '.join(sorted(known))}. "
        f"Declare your own with --extra_sources {name}=language or {name}=document."
    )


def resolve_sources(spec: str, extra: Mapping[str, str] | None = None) -> list[str]:
    """Source ids of ``full``, ``lang`` or a comma-separated list.

    ``full`` and ``lang`` stand for the paper's subsets together with the declared extra sources
    of the same categories.
    """
    if spec in SUBSETS:
        wanted = set(CATEGORIES) if spec == "full" else {"language"}
        return list(SUBSETS[spec]) + [n for n, c in (extra or {}).items() if c in wanted]
    names = [normalise(part) for part in split_names(spec)]
    if not names:
        raise ValueError(
            f"no source in {spec!r}: give full, lang, all or names separated by commas."
        )
    for name in names:
        category_of(name, extra)
    return names


def parse_extra(specs: Iterable[str] | None) -> dict[str, str]:
    """``["receipts=document"]`` → ``{"receipts": "document"}``.

    Raises:
        ValueError: not of the form name=category, or a category other than the two.
    """
    extra: dict[str, str] = {}
    for spec in specs or ():
        name, _, category = spec.partition("=")
        name, category = normalise(name), category.strip().lower()
        if not name or category not in CATEGORIES:
            raise ValueError(
                f"extra source {spec!r}: write name=language or name=document "
                "(language: the teacher's word counts; document: labels alone)."
            )
        if name in known_sources():
            raise ValueError(f"extra source {name!r} is one of the 17 and has its category.")
        extra[name] = category
    return extra


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
        alpha: float,
        temperature: float,
        extra: Mapping[str, str] | None = None,
    ) -> SourceWeights:
        """Weights of a run.

        Args:
            names: the sources in the run's shards.
            distil: ``none``, ``language``, ``all``, or source ids separated by commas.
            alpha: weight of the distillation term on distilling sources, in [0, 1].
            temperature: τ > 0.
            extra: categories of sources beyond the 17.

        Raises:
            ValueError: a source that is unknown, or named to distil and not in the run.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        names = tuple(names)
        categories = tuple(category_of(name, extra) for name in names)
        chosen = _distilling(distil, names, extra)
        return cls(
            names,
            categories,
            tuple(alpha if n in chosen else 0.0 for n in names),
            (float(temperature),) * len(names),
        )

    @property
    def distils(self) -> bool:
        """Whether any source meets the teacher."""
        return any(a > 0 for a in self.alpha)


def _distilling(distil: str, names: tuple[str, ...], extra: Mapping[str, str] | None) -> set[str]:
    known = known_sources(extra)
    if distil == "none":
        return set()
    if distil == "all":
        return set(known)
    if distil in CATEGORIES:
        return {name for name, category in known.items() if category == distil}
    chosen = resolve_sources(distil, extra)
    absent = [] if distil in SUBSETS else [name for name in chosen if name not in names]
    if absent:
        raise ValueError(
            f"distil names {', '.join(absent)}, which this run does not train on: its sources are "
            f"{', '.join(names)}. Change --distil or --sources."
        )
    return set(chosen)
