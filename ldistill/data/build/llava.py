"""LLaVA JSON files as inputs of a build: the records of each source, and their image folder.

inputs = open_llava(Path("receipts.json"), InputOptions(extra={"receipts": "document"}))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldistill import sources as known_sources
from ldistill.data.build.build_types import SourceInput
from ldistill.data.build.options import InputOptions, choose_sources
from ldistill.data.build.readers import LlavaJson


def open_llava(path: Path, options: InputOptions) -> list[SourceInput]:
    """The sources of a LLaVA JSON file that `options` asks for.

    A record's own `source` names its source, else the file's stem does. Raises FileNotFoundError,
    and ValueError for a file of another shape, options that need a table, or an unknown source.
    """
    _check_options(path, options)
    text, records = _load(path)
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        named = record.get("source") if isinstance(record, dict) else None
        groups.setdefault(known_sources.normalise(str(named or path.stem)), []).append(row)
    identity = {"format": "llava", "file": path.name, "sha256": hashlib.sha256(text).hexdigest()}
    root = options.image_root or str(path.parent)
    return [
        SourceInput(
            source=source,
            category=known_sources.category_of(source, options.extra),
            rows=Records(records, groups[source]),
            convert=LlavaJson(source, root),
            identity=identity,
            length=len(groups[source]),
            rows_end=len(records),
        )
        for source in choose_sources(list(groups), str(path), options)
    ]


def _check_options(path: Path, options: InputOptions) -> None:
    if options.format not in ("auto", "llava"):
        raise ValueError(f"{path} is JSON: --format {options.format} reads tables")
    if options.min_ratings:
        raise ValueError(f"{path} carries no ratings: leave --min-rating out")


def _load(path: Path) -> tuple[bytes, list[Any]]:
    try:
        text = path.read_bytes()
        records = json.loads(text)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no data set at {path}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a list of records, as LLaVA's files do")
    return text, records


@dataclass(frozen=True)
class Records:
    """The given rows of a list of records, as `SourceInput.rows` wants them."""

    records: list[Any]
    numbers: list[int]

    def __call__(self, start: int) -> Iterator[tuple[int, Any]]:
        return ((row, self.records[row]) for row in self.numbers if row >= start)
