"""What a user asks of an input: which sources, in which format, at which quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ldistill import sources as known_sources
from ldistill.data.build.readers import check_ratings

FORMATS = ("auto", "cauldron", "finevision", "llava")


@dataclass(frozen=True)
class InputOptions:
    """What to take from an input and how to read it."""

    sources: tuple[str, ...] | None = None
    """Source ids to build, all of which must be there; None takes every source of the input."""
    format: str = "auto"
    split: str = "train"
    extra: Mapping[str, str] = field(default_factory=dict)
    """Categories of sources beyond the 17."""
    min_ratings: Mapping[str, int] = field(default_factory=dict)
    image_root: str | None = None
    """LLaVA JSON: the folder that image paths start from (default: the file's)."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: known are {', '.join(FORMATS)}")
        check_ratings(self.min_ratings)


def choose_sources(found: Sequence[str], dataset: str, options: InputOptions) -> list[str]:
    """The sources to build; every one must be there and have a category."""
    wanted = list(options.sources) if options.sources is not None else list(found)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{dataset} has no source {', '.join(missing)}; it has {', '.join(sorted(found))}"
        )
    for name in wanted:
        known_sources.category_of(name, options.extra)
    return wanted
