"""What is compared: the adapted student, the paper's seven recipes, and gates beyond the paper.

A variant is what one recipe differs in from the shared settings, so that the same seven differences
apply to the paper's pair and to the tiny one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldistill.recipe import recipe_differences

ORIGINAL = "adapted"
"""The student that all variants start from."""
BASELINE = "nanovlm-full"
"""Labels alone on all sources: what forgets."""
MAIN = "lingudistill"
RECIPES = (
    "nanovlm-full",
    "nanovlm-lang",
    "distill-full",
    "distill-lang",
    "lingudistill",
    "lingudistill-highkd",
    "lingudistill-lowkd",
)
GATED = {f"{MAIN}-{gate}": {"gate": gate} for gate in ("agreement", "confidence")}


@dataclass(frozen=True)
class Variant:
    """One way to train the same student."""

    name: str
    base: str
    """The shipped recipe it is, or is built on."""
    beyond: Mapping[str, Any] = field(default_factory=dict)
    """Fields in which it differs from that recipe."""

    def flags(self) -> list[str]:
        """All that it differs in from the shared settings, as flags of ``train.py``."""
        return _flags({**recipe_differences(self.base), **self.beyond})

    def flags_beyond_base(self) -> list[str]:
        """What it differs in from its recipe."""
        return _flags(self.beyond)


def _flags(fields: Mapping[str, Any]) -> list[str]:
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def variants(names: tuple[str, ...] = ()) -> tuple[Variant, ...]:
    """The variants of these names; all of them without any.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = {name: Variant(name, name) for name in RECIPES}
    known |= {name: Variant(name, MAIN, fields) for name, fields in GATED.items()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no variant {unknown[0]!r}; there are: {', '.join(known)}.")
    return tuple(known[name] for name in names or known)
