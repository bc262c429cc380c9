"""The index of a folder of shards: everything that planning needs, without opening a tar.

    index = ShardIndex.load("shards/", sources=["docvqa", "vqav2"])
    index.check(processor); index.check_files()

Each source has a folder with `index.json` and `samples.npy` (one `SAMPLE_DTYPE` row per sample).
Samples are numbered globally in the order source, shard, position; the arrays stay on disk and
are mapped, so a worker holds next to nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldistill.data.archive import SAMPLE_DTYPE, ShardFile, load_sample, sample_key
from ldistill.data.images import ImageSettings
from ldistill.data.processor import Processor
from ldistill.data.samples import Sample

FORMAT = 1
INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.npy"
SLICES_NAME = ".slices"


@dataclass(frozen=True)
class Shard:
    """A shard of the index: its path, its source's number, its first sample's global number."""

    path: str
    source: int
    start: int
    samples: int
    bytes: int
    sha256: str


class ShardIndex:
    """Shards of one or more sources. Build it with `load`."""

    def __init__(self, root: Path, meta: dict[str, dict[str, Any]]) -> None:
        self.root = root
        self.meta = meta
        self.sources = list(meta)
        self.categories = [entry["category"] for entry in meta.values()]
        self.shards = self._list_shards()
        sizes = [sum(s["samples"] for s in entry["shards"]) for entry in meta.values()]
        self.source_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._maps: list[np.ndarray | None] = [None] * len(self.sources)

    def _list_shards(self) -> list[Shard]:
        shards, start = [], 0
        for number, (source, entry) in enumerate(self.meta.items()):
            for file in (ShardFile(**values) for values in entry["shards"]):
                path = str(self.root / source / file.url)
                shards.append(Shard(path, number, start, file.samples, file.bytes, file.sha256))
                start += file.samples
        return shards

    @classmethod
    def load(cls, root: str | Path, sources: Sequence[str] | None = None) -> ShardIndex:
        """Read the indices under `root`, sources in the order asked (default: by name).

        Raises FileNotFoundError when there are no shards, ValueError when a source is missing or
        empty, or an index is damaged.
        """
        root = Path(root)
        found = sorted(path.parent.name for path in root.glob(f"*/{INDEX_NAME}"))
        if not found:
            raise FileNotFoundError(_no_shards(root))
        wanted = list(dict.fromkeys(sources)) if sources is not None else found
        missing = [name for name in wanted if name not in found]
        if missing or not wanted:
            raise ValueError(
                f"no finished shards of {', '.join(missing) or 'any source'} in {root}; it has "
                f"{', '.join(found)}. Build them with `ldistill shards build`, or leave them out"
            )
        index = cls(root, {name: _read_meta(root / name) for name in wanted})
        for number in range(len(wanted)):
            index._check_samples(number)
        return index

    # samples ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.source_starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the arrays themselves instead of receiving copies."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("samples", "lengths")}
        return {**state, "_maps": [None] * len(self.sources)}

    def source_samples(self, number: int) -> np.ndarray:
        """Mapped `SAMPLE_DTYPE` array of one source."""
        mapped = self._maps[number]
        if mapped is None:
            path = self.root / self.sources[number] / SAMPLES_NAME
            try:
                mapped = np.load(path, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): build the source again"
                ) from error
            self._maps[number] = mapped
        return mapped

    @cached_property
    def samples(self) -> np.ndarray:
        """`SAMPLE_DTYPE` rows of all samples; `shard` counts within the source."""
        return np.concatenate([self.source_samples(n) for n in range(len(self.sources))])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample, int64."""
        parts = [self.source_samples(n)["tokens"] for n in range(len(self.sources))]
        return np.concatenate(parts).astype(np.int64)

    def column(self, name: str) -> np.ndarray:
        """One field of every sample."""
        return np.concatenate([self.source_samples(n)[name] for n in range(len(self.sources))])

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples of every shard, int64, in the order of the global numbers."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    def source_of(self, samples: np.ndarray) -> np.ndarray:
        """Source numbers of global sample numbers."""
        return np.searchsorted(self.source_starts, samples, side="right") - 1

    def locate(self, sample: int) -> tuple[Shard, np.void, str]:
        """The shard, the index row and the key of a global sample number."""
        source = int(self.source_of(np.asarray(sample)))
        record = self.source_samples(source)[sample - int(self.source_starts[source])]
        shard = self.shards[self._first_shard[source] + int(record["shard"])]
        return shard, record, sample_key(self.sources[source], int(record["row"]))

    @cached_property
    def _first_shard(self) -> list[int]:
        counts = [len(entry["shards"]) for entry in self.meta.values()]
        return np.concatenate([[0], np.cumsum(counts)]).tolist()

    def read(self, sample: int) -> Sample:
        """Read one sample from its shard. Raises BadSample."""
        shard, record, key = self.locate(sample)
        return load_sample(shard.path, record, key)

    # checks ----------------------------------------------------------------------------------

    @property
    def image_settings(self) -> ImageSettings:
        """The settings that the shards were counted with."""
        return ImageSettings(**self.meta[self.sources[0]]["image_settings"])

    def check(self, processor: Processor) -> None:
        """Raise ValueError unless every source was counted with this processor."""
        parts = processor.parts
        for source, entry in self.meta.items():
            if entry["processor"] == processor.fingerprint():
                continue
            differ = [k for k, v in parts.items() if entry["processor_parts"].get(k) != v]
            raise ValueError(
                f"the shards of {source} in {self.root} were built for another student: different "
                f"{', '.join(differ)}. {self._settings_difference(entry, processor)}"
                "Build them again with this student's settings"
            )

    @staticmethod
    def _settings_difference(entry: dict[str, Any], processor: Processor) -> str:
        mine, theirs = asdict(processor.images), entry["image_settings"]
        keys = [k for k in mine if k != "max_images" and mine[k] != theirs.get(k)]
        text = ", ".join(f"{k} {theirs.get(k)} in the shards, {mine[k]} here" for k in keys)
        return f"({text}.) " if text else ""

    def check_files(self) -> None:
        """Raise FileNotFoundError or ValueError for a shard that is missing or cut short."""
        for shard in self.shards:
            path = Path(shard.path)
            if not path.is_file():
                raise FileNotFoundError(f"shard {path} is missing: build or copy it again")
            if path.stat().st_size != shard.bytes:
                raise ValueError(
                    f"shard {path} has {path.stat().st_size} bytes instead of {shard.bytes}: it is "
                    "truncated or was replaced; build or copy it again"
                )

    def _check_samples(self, number: int) -> None:
        source, samples = self.sources[number], self.source_samples(number)
        counts = [shard["samples"] for shard in self.meta[source]["shards"]]
        if not sum(counts):
            raise ValueError(f"the shards of {source} in {self.root} are empty: leave {source} out")
        expected = np.repeat(np.arange(len(counts)), counts)
        if samples.dtype != SAMPLE_DTYPE or not np.array_equal(samples["shard"], expected):
            raise ValueError(
                f"{self.root / source / SAMPLES_NAME} does not fit {INDEX_NAME} beside it: build "
                "the source again"
            )


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    try:
        meta = json.loads(path.read_text())
        version = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): build the source again") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version reads {FORMAT}: build it again"
        )
    absent = {"category", "shards", "processor", "processor_parts", "image_settings"} - set(meta)
    if absent or meta.get("source") != folder.name:
        raise ValueError(f"{path} is damaged (missing {sorted(absent)} or of another source)")
    return meta


def _no_shards(root: Path) -> str:
    if not root.is_dir():
        return f"no shards: the folder {root} does not exist. Build it with `ldistill shards build`"
    if (root / SLICES_NAME).is_dir():
        return f"{root} is built in slices: join them with `ldistill shards merge {root}`"
    if any(root.glob("*/.build")):
        return f"the build of {root} is unfinished: run the same `ldistill shards build` again"
    return f"no shards in {root} (expected SOURCE/{INDEX_NAME}): see `ldistill shards build --help`"
