"""What a model or a data set says of itself: the head of its README.md, as the hub has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

NAME = "README.md"


def head(folder: Path) -> dict[str, Any]:
    """YAML between the first lines of a folder's README.md; empty where there is none."""
    path = folder / NAME
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    found = REGEX_YAML_BLOCK.match(text)
    try:
        values = yaml.safe_load(found[2]) if found else {}
    except yaml.YAMLError:  # somebody else's file, of which nothing depends
        values = {}
    return values if isinstance(values, dict) else {}


def origin(values: Mapping[str, Any]) -> dict[str, str]:
    """``licence`` and ``homepage`` of such values, those that they have: ``license`` is a name,
    several, or ``other`` beside a ``license_name``."""
    licence = values.get("license")
    if licence == "other":
        licence = values.get("license_name") or licence
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    found = {"licence": licence, "homepage": values.get("homepage")}
    return {name: value for name, value in found.items() if value and isinstance(value, str)}
