"""Finding the sources in what a user names: a hub id, parquet, a `datasets` folder, LLaVA JSON.

    inputs = open_inputs("HuggingFaceM4/the_cauldron", InputOptions(sources=("docvqa",)))

| input | source id |
|---|---|
| hub id, or a clone of one with a README that lists configs | the config's name |
| folder of folders of parquet files or saved data sets | the folder's name |
| parquet file(s) with a column `source` (FineVision) | that column |
| other parquet file, saved data set | the file's or folder's name |
| LLaVA JSON | the record's `source`, else the file's name |

Rows are streamed and pictures stay encoded. Names are normalised (`ldistill.sources.normalise`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldistill import sources as known_sources
from ldistill.data.build.build_types import SourceInput
from ldistill.data.build.llava import open_llava
from ldistill.data.build.options import InputOptions, choose_sources
from ldistill.data.build.readers import Cauldron, FineVision, detect_format

EDGE = 1 << 16


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

    def rows(self, start: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(number, record) from row `start` on; pictures undecoded."""
        number = start
        try:
            stream = self.open().decode(False)
            for number, record in enumerate(stream.skip(start) if start else stream, start):
                if self.only is None or known_sources.normalise(str(record["source"])) == self.only:
                    yield number, record
        except Exception as error:  # of the network or the file format, each library with its own
            raise OSError(
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
    if path.suffix == ".json":
        return open_llava(path, options)
    if options.format == "llava":
        raise ValueError(f"{dataset} is not a LLaVA JSON file (*.json)")
    tables = _tables(dataset, path, options)
    chosen = choose_sources(list(tables), dataset, options)
    return [_table_input(source, tables[source], options) for source in chosen]


def _table_input(source: str, table: Table, options: InputOptions) -> SourceInput:
    columns = table.columns()
    kind = options.format if options.format != "auto" else detect_format(columns)
    if options.min_ratings:
        absent = {f"{name}_ratings" for name in options.min_ratings} - set(columns)
        if kind != "finevision" or absent:
            raise ValueError(f"{source} carries no {', '.join(absent)}: leave --min-rating out")
    reader = Cauldron(source)
    if kind == "finevision":
        reader = FineVision(source, dict(options.min_ratings))
    return SourceInput(
        source=source,
        category=known_sources.category_of(source, options.extra),
        rows=table.rows,
        convert=reader,
        identity={"format": kind, "min_ratings": dict(options.min_ratings), **table.identity},
        length=table.length,
        bytes=table.bytes,
        rows_end=table.length,
    )


# tables ------------------------------------------------------------------------------------------


def _tables(dataset: str, path: Path, options: InputOptions) -> dict[str, Table]:
    if path.is_file() and path.suffix == ".parquet":
        return _parquet({_group_name(path.parent, path, options.split): [path]})
    if path.is_dir():
        return _folder(path, options)
    if path.exists() or dataset.count("/") != 1 or dataset[0] in "./~":
        raise FileNotFoundError(
            f"no data set at {dataset}: give a hub id, a parquet file or folder, a saved data set "
            "or a LLaVA JSON file"
        )
    return _repository(dataset, options)


def _folder(path: Path, options: InputOptions) -> dict[str, Table]:
    if _lists_configs(path):
        return _repository(str(path), options)
    split = options.split
    folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    saved = {folder.name: folder for folder in folders if _is_saved(folder)}
    if saved:
        return {known_sources.normalise(n): _saved(folder, split) for n, folder in saved.items()}
    groups: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        if _of_split(file, split):
            groups.setdefault(_group_name(path, file, split), []).append(file)
    if not groups:
        raise FileNotFoundError(
            f"{path} holds neither parquet files of the split {split} nor a saved data set"
        )
    return _parquet(groups)


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
    import pyarrow.parquet as parquet

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
    """Distinct values of the column `source`, which FineVision has and The Cauldron has not."""
    import pyarrow.parquet as parquet

    values: dict[str, None] = {}
    for file in files:
        if "source" in parquet.read_schema(file).names:
            column = parquet.read_table(file, columns=["source"])["source"]
            values.update(dict.fromkeys(map(str, column.unique().to_pylist())))
    return list(values)


def _stream(*names: str, **options: Any) -> Any:
    import datasets

    return datasets.load_dataset(
        *names, split=options.pop("split", "train"), streaming=True, **options
    )


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _saved(folder: Path, split: str) -> Table:
    import datasets

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
    )


def _lists_configs(path: Path) -> bool:
    readme = path / "README.md"
    return readme.is_file() and "\nconfigs:" in readme.read_text(errors="replace")[:EDGE]


def _repository(name: str, options: InputOptions) -> dict[str, Table]:
    """Configs of a hub data set, or of a clone of one; only those wanted are looked into."""
    import datasets

    local = Path(name).is_dir()
    revision = None if local else _hub_revision(name)
    configs = datasets.get_dataset_config_names(name, revision=revision)
    named = {known_sources.normalise(config): config for config in configs}
    wanted = options.sources if options.sources is not None else tuple(named)
    if not local and options.sources is None and len(named) > 1:
        raise ValueError(f"{name} has {len(named)} sources: say which, for instance --sources full")
    return {
        source: _config_table(name, config, revision, options.split)
        if source in wanted
        else Table(dict, {})
        for source, config in named.items()
    }


def _config_table(name: str, config: str, revision: str | None, split: str) -> Table:
    import datasets

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


def _hub_revision(name: str) -> str:
    """The commit a hub data set is at: a build that goes on later reads the same rows."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:  # network libraries raise their own, not all of them OSError
        raise FileNotFoundError(
            f"no data set at {name}: it is no local path, and the hub does not give it ({error})"
        ) from error


def _file_identity(file: Path) -> list[Any]:
    """Name, size and a hash of both ends: tells versions apart without reading gigabytes."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(EDGE)
        handle.seek(max(0, size - EDGE))
        return [file.name, size, hashlib.sha256(head + handle.read()).hexdigest()]
