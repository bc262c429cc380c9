"""Finding the sources in what a user names: a hub id, parquet, a `datasets` folder, JSON.

    inputs = open_inputs("HuggingFaceM4/the_cauldron", InputOptions(sources=("docvqa",)))

| input | source id |
|---|---|
| hub id, or a clone of one with a README that lists configs | the config's name |
| folder of folders of parquet files or saved data sets | the folder's name |
| parquet file(s) with columns `texts` and `source` (FineVision) | `source` |
| other parquet file, saved data set | the file's or folder's name |
| JSON, JSON lines, either of them gzipped | the record's `source`, else the file's name |
| WebDataset tars of others: a glob, a folder, a folder of folders | the name of the tars' folder |

Rows are streamed and pictures stay encoded. Names are normalised (`ldistill.sources.normalise`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pyarrow.parquet as parquet
from huggingface_hub import DatasetInfo, HfApi

from ldistill import sources as known_sources
from ldistill.common import readme
from ldistill.data.build.build_types import FORMATS, InputError, InputOptions, SourceInput
from ldistill.data.build.readers import PAIRS, RATINGS, Reader
from ldistill.data.build.tars import TarReader, tar_rows

EDGE = 1 << 16
JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Table:
    """Rows of one source: a streamed data set, and what is known of it beforehand.

    `only` keeps the rows whose column `source` has this (normalised) value.
    """

    open: Callable[[], Any]
    identity: dict[str, Any]
    length: int | None = None
    bytes: int = 0
    only: str | None = None
    origin: dict[str, str] = field(default_factory=dict)

    def rows(self, start: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(number, record) from row `start` on; pictures undecoded."""
        number = start
        try:
            stream = self.open().decode(False)
            for number, record in enumerate(stream.skip(start) if start else stream, start):
                if self.only is None or known_sources.normalise(str(record["source"])) == self.only:
                    yield number, record
        except Exception as error:  # of the network or the file format, each library with its own
            raise InputError(
                f"reading {self.identity} failed near row {number} ({error}): run the same command "
                "again to go on; finished shards are kept"
            ) from error

    def columns(self) -> list[str]:
        """Column names."""
        stream = self.open()
        return list(stream.features or next(iter(stream.decode(False)), {}))


def open_inputs(dataset: str, options: InputOptions) -> list[SourceInput]:
    """The sources of `dataset` that `options` asks for, ready to build.

    Raises FileNotFoundError for a missing path, ValueError for a missing or unknown source or a
    table of another format.
    """
    path = Path(dataset).expanduser()
    if tars := _tars(path):
        return _tar_inputs(dataset, tars, options)
    hub = not path.exists() and dataset.count("/") == 1 and dataset[0] not in "./~"
    if not path.exists() and (not hub or dataset.endswith((*JSON, ".parquet"))):
        _missing(dataset, "it is neither there nor a hub id")
    if dataset.endswith(JSON):
        return _json_inputs(path, options)
    tables = _tables(dataset, path, options)
    chosen = _choose(list(tables), dataset, options)
    return [_table_input(source, tables[source], options) for source in chosen]


def _choose(found: Sequence[str], dataset: str, options: InputOptions) -> list[str]:
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


def _kind(where: str, fields: Iterable[str], options: InputOptions) -> str:
    """The format, by the fields of the records. Raises ValueError for one that is not asked for."""
    names, kind = set(fields), "none"
    if "texts" in names:
        rated = any(f"{name}_ratings" in names for name in RATINGS)
        kind = "finevision" if rated else "cauldron"
    elif "conversations" in names:
        kind = "llava"
    elif "messages" in names or any(names.issuperset(pair) for pair in PAIRS):
        kind = "chat"
    unrated = {f"{name}_ratings" for name in options.min_ratings} - names
    asked = kind if options.format == "auto" else options.format
    if kind not in FORMATS or {asked, kind} not in ({kind}, {"cauldron", "finevision"}) or unrated:
        lacks = f"no {', '.join(unrated)}: leave --min-rating out"
        if not unrated:
            lacks = f"no conversations as --format {options.format} knows them"
        raise ValueError(
            f"{where} carries {lacks}. It has {', '.join(sorted(names))}; formats are "
            f"{', '.join(FORMATS)}"
        )
    return asked


def _table_input(source: str, table: Table, options: InputOptions) -> SourceInput:
    kind = _kind(source, table.columns(), options)
    minimum = dict(options.min_ratings)
    return SourceInput(
        source=source,
        category=known_sources.category_of(source, options.extra),
        rows=table.rows,
        convert=Reader(source, options.image_root or "", minimum),
        identity={"format": kind, "min_ratings": minimum, **table.identity},
        length=table.length,
        bytes=table.bytes,
        rows_end=table.length,
        origin=table.origin,
    )


# JSON --------------------------------------------------------------------------------------------


def _json_inputs(path: Path, options: InputOptions) -> list[SourceInput]:
    """A record's own `source` names its source, else the file's name does."""
    text = path.read_bytes()
    records, about = _records(path, text)
    fields = {name for record in records if isinstance(record, dict) for name in record}
    kind = _kind(str(path), fields, options)
    identity = {"format": kind, "file": path.name, "sha256": hashlib.sha256(text).hexdigest()}
    minimum = dict(options.min_ratings)
    stem = path.name.partition(".json")[0]
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        named = record.get("source") if isinstance(record, dict) else None
        groups.setdefault(known_sources.normalise(str(named or stem)), []).append(row)
    return [
        SourceInput(
            source=source,
            category=known_sources.category_of(source, options.extra),
            rows=lambda start, rows=groups[source]: (
                (row, records[row]) for row in rows if row >= start
            ),
            convert=Reader(source, options.image_root or str(path.parent), minimum),
            identity=identity | ({"min_ratings": minimum} if minimum else {}),
            length=len(groups[source]),
            rows_end=len(records),
            origin=readme.origin(readme.head(path.parent) | about),
        )
        for source in _choose(list(groups), str(path), options)
    ]


def _records(path: Path, text: bytes) -> tuple[list[Any], dict[str, Any]]:
    """Records of a list, of an object's `data`, or one a line; a line that is none stays text.

    And what else such an object says, its licence perhaps.
    """
    found: Any = None
    about: dict[str, Any] = {}
    try:
        text = gzip.decompress(text) if path.suffix == ".gz" else text
        found = json.loads(text)
    except ValueError:
        found = [_line(line) for line in text.splitlines() if line.strip()]
        found = found if any(isinstance(record, dict) for record in found) else None
    except (OSError, EOFError, zlib.error):
        pass
    if isinstance(found, dict) and "data" in found:
        about, found = found, found["data"]
    elif isinstance(found, dict):
        found = [found] if found else None
    if not found or not isinstance(found, list):
        raise ValueError(
            f"{path} is not JSON of records: it must hold a list of them, an object with the list "
            "as `data`, or a record in each line"
        )
    return found, {name: value for name, value in about.items() if name != "data"}


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line.decode(errors="replace")


# tars --------------------------------------------------------------------------------------------


def _tars(path: Path) -> list[Path]:
    """Tars that a path, a glob or a folder (or one of folders) stands for, in order."""
    if path.is_dir():
        return sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
    return sorted(path.parent.glob(path.name)) if path.suffix == ".tar" else []


def _tar_inputs(dataset: str, tars: list[Path], options: InputOptions) -> list[SourceInput]:
    if options.format != "auto" or options.min_ratings:
        raise ValueError(f"{dataset} is of tars: leave --format and --min-rating out")
    groups: dict[str, list[Path]] = {}
    for file in tars:
        groups.setdefault(known_sources.normalise(file.resolve().parent.name), []).append(file)
    return [
        SourceInput(
            source=source,
            category=known_sources.category_of(source, options.extra),
            rows=partial(tar_rows, groups[source]),
            convert=TarReader(source),
            identity={"format": "tar", "files": [_file_identity(f) for f in groups[source]]},
            bytes=sum(file.stat().st_size for file in groups[source]),
        )
        for source in _choose(list(groups), dataset, options)
    ]


# tables ------------------------------------------------------------------------------------------


def _tables(dataset: str, path: Path, options: InputOptions) -> dict[str, Table]:
    if path.is_file() and path.suffix == ".parquet":
        return _parquet({_group_name(path.parent, path, options.split): [path]})
    if path.is_dir():
        return _folder(path, options)
    return _repository(dataset, options)


def _folder(path: Path, options: InputOptions) -> dict[str, Table]:
    if _lists_configs(path):
        return _repository(str(path), options)
    split = options.split
    origin = readme.origin(readme.head(path))
    folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    saved = {folder.name: folder for folder in folders if _is_saved(folder)}
    if saved:
        found = {n: _saved(folder, split) for n, folder in saved.items()}
        return {
            known_sources.normalise(n): replace(table, origin=origin | table.origin)
            for n, table in found.items()
        }
    groups: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        if _of_split(file, split):
            groups.setdefault(_group_name(path, file, split), []).append(file)
    if not groups:
        raise FileNotFoundError(
            f"{path} holds neither parquet files of the split {split} nor a saved data set"
        )
    return {n: replace(table, origin=origin) for n, table in _parquet(groups).items()}


def _group_name(root: Path, file: Path, split: str) -> str:
    """The source of a parquet file by its place: its top folder, else its own name."""
    parts = file.relative_to(root).parts
    if len(parts) > 1 and parts[0] not in ("data", split):
        return parts[0]
    return root.name if file.stem.split("-")[0] == split or len(parts) > 1 else file.stem


def _of_split(file: Path, split: str) -> bool:
    """Whether a file belongs to a split, where names tell: `train-00000-of-00002.parquet`."""
    return "-of-" not in file.stem or file.stem.split("-")[0] == split


def _parquet(groups: dict[str, list[Path]]) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    for name, files in groups.items():
        length = sum(parquet.read_metadata(file).num_rows for file in files)
        size = sum(file.stat().st_size for file in files)
        values = _source_values(files)
        for only in values or [None]:
            source = known_sources.normalise(only or name)
            tables[source] = Table(
                open=lambda files=files: _stream("parquet", data_files=[str(f) for f in files]),
                identity={"files": [_file_identity(file) for file in files], "only": only},
                length=length,
                bytes=size // max(1, len(values)),
                only=source if only else None,
            )
    return tables


def _source_values(files: list[Path]) -> list[str]:
    """Distinct values of FineVision's column `source`; that of a chat set names no source here."""
    values: dict[str, None] = {}
    for file in files:
        if {"texts", "source"} <= set(parquet.read_schema(file).names):
            column = parquet.read_table(file, columns=["source"])["source"]
            values.update(dict.fromkeys(map(str, column.unique().to_pylist())))
    return list(values)


def _stream(*names: str, **options: Any) -> Any:
    return datasets.load_dataset(
        *names, split=options.pop("split", "train"), streaming=True, **options
    )


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _saved(folder: Path, split: str) -> Table:
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{folder} has no split {split}; it has {', '.join(data)}")
        data = data[split]
    files = [Path(entry["filename"]) for entry in data.cache_files]
    return Table(
        open=data.to_iterable_dataset,
        identity={"files": [_file_identity(file) for file in files]},
        length=len(data),
        bytes=sum(file.stat().st_size for file in files),
        origin=readme.origin(vars(data.info)),
    )


def _lists_configs(path: Path) -> bool:
    readme = path / "README.md"
    return readme.is_file() and "\nconfigs:" in readme.read_text(errors="replace")[:EDGE]


def _repository(name: str, options: InputOptions) -> dict[str, Table]:
    """Configs of a hub data set, or of a clone of one; only those wanted are looked into."""
    local = Path(name).is_dir()
    info = None if local else _hub_info(name)
    revision = None if info is None else str(info.sha)
    about = readme.head(Path(name)) if info is None else (info.card_data or {})
    origin = readme.origin(about)
    if info is not None:
        origin |= {"dataset": name}
    try:
        configs = datasets.get_dataset_config_names(name, revision=revision)
    except RuntimeError as error:  # it comes as a script, which would have to be run
        raise ValueError(f"{name}: {error}") from error
    named = {known_sources.normalise(config): config for config in configs}
    wanted = options.sources if options.sources is not None else tuple(named)
    if not local and options.sources is None and len(named) > 1:
        raise ValueError(f"{name} has {len(named)} sources: say which, for instance --sources full")
    return {
        source: replace(_config_table(name, config, revision, options.split), origin=origin)
        if source in wanted
        else Table(dict, {})
        for source, config in named.items()
    }


def _config_table(name: str, config: str, revision: str | None, split: str) -> Table:
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    info = (builder.info.splits or {}).get(split)
    identity: dict[str, Any] = {"dataset": name, "config": config, "revision": revision}
    if revision is None:
        files = [Path(file) for file in (builder.config.data_files or {}).get(split, [])]
        identity = {"config": config, "files": [_file_identity(file) for file in files]}
    return Table(
        open=lambda: _stream(name, config, split=split, revision=revision),
        identity=identity,
        length=info.num_examples if info else None,
        bytes=(info.num_bytes or 0) if info else 0,
    )


def _hub_info(name: str) -> DatasetInfo:
    """A hub data set at its present commit: a build that goes on later reads the same rows."""
    try:
        return HfApi().dataset_info(name)
    except Exception as error:  # network libraries raise their own, not all of them OSError
        _missing(name, f"it is no local path, and the hub does not give it ({error})")


def _missing(dataset: str, why: str) -> NoReturn:
    raise FileNotFoundError(f"no data set at {dataset}: {why}")


def _file_identity(file: Path) -> list[Any]:
    """Name, size and a hash of both ends: tells versions apart without reading gigabytes."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(EDGE)
        handle.seek(max(0, size - EDGE))
        return [file.name, size, hashlib.sha256(head + handle.read()).hexdigest()]
