"""The index of a folder of shards: everything that planning needs, without opening a tar.

    index = ShardIndex.load("shards/", sources=["docvqa", "vqav2"])   # or "s3://bucket/shards"
    index.check(processor); index.check_files()

Each source has a folder with `index.json` and `samples.npy` (one `SAMPLE_DTYPE` row per sample).
Samples are numbered globally in the order source, shard, position; the arrays stay on disk and
are mapped, so a worker holds next to nothing. Where they lie is the business of `store`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldistill.common.images import ImageSettings
from ldistill.common.samples import Sample
from ldistill.data.archive import SAMPLE_DTYPE, BadSample, ShardFile, check_sample, sample_key
from ldistill.data.store import INDEX_NAME, SAMPLES_NAME, LocalStore, Reading, open_store
from ldistill.models.processor import Processor

if TYPE_CHECKING:
    from ldistill.data.remote.store import RemoteStore

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A shard of the index: path or URL, its source's number, its first sample's global number."""

    path: str
    source: int
    start: int
    samples: int
    bytes: int
    sha256: str


class ShardIndex:
    """Shards of one or more sources. Build it with `load`."""

    def __init__(self, store: LocalStore | RemoteStore, meta: dict[str, dict[str, Any]]) -> None:
        self.store = store
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
                path = self.store.url(source, file.url)
                shards.append(Shard(path, number, start, file.samples, file.bytes, file.sha256))
                start += file.samples
        return shards

    @classmethod
    def load(
        cls,
        root: str | Path,
        sources: Sequence[str] | None = None,
        reading: Reading | None = None,
        also: Iterable[str] = (),
    ) -> ShardIndex:
        """Read the indices under a folder or URL, sources in the order asked (default: by name).

        `reading` says how remote shards are read; `also` names sources beyond the 17 to look for
        at a server that cannot list any. Raises FileNotFoundError when there are no shards,
        ValueError when a source is missing or empty, or an index is damaged, OSError when a store
        cannot be read.
        """
        store = open_store(root, reading)
        found = store.sources([*(sources or ()), *also])
        if not found:
            raise FileNotFoundError(store.describe_empty())
        wanted = list(dict.fromkeys(sources)) if sources is not None else found
        missing = [name for name in wanted if name not in found]
        if missing or not wanted:
            raise ValueError(
                f"no finished shards of {', '.join(missing) or 'any source'} in {store.root}; it "
                f"has {', '.join(found)}. Build them with `ldistill shards build`, or leave them "
                "out"
            )
        index = cls(store, {name: _read_meta(store, name) for name in wanted})
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
            mapped = self._maps[number] = self._map(self.sources[number])
        return mapped

    def _map(self, source: str) -> np.ndarray:
        while True:
            path = self.store.table(source, self.meta[source])
            try:
                return np.load(path, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                if self.store.remote and isinstance(error, FileNotFoundError):
                    continue  # another process has just made room in the cache: fetch it again
                raise ValueError(
                    f"{path} cannot be read ({error}): build the source again"
                ) from error

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
        """Read one sample from its shard.

        Raises BadSample, and OSError when a remote store fails: that says nothing about the
        sample, so it must not be dropped for it.
        """
        shard, record, key = self.locate(sample)
        try:
            raw = self.store.read(shard, record)
        except OSError as error:
            if self.store.remote:
                raise
            raise BadSample("unreadable shard", shard.path, key, str(error)) from error
        return check_sample(raw, shard.path, record, key)

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
                f"the shards of {source} in {self.store.root} were built for another student: "
                f"different {', '.join(differ)}. {self._settings_difference(entry, processor)}"
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
        self.store.check(self.shards)

    def _check_samples(self, number: int) -> None:
        source, samples = self.sources[number], self.source_samples(number)
        counts = [shard["samples"] for shard in self.meta[source]["shards"]]
        if not sum(counts):
            raise ValueError(
                f"the shards of {source} in {self.store.root} are empty: leave {source} out"
            )
        expected = np.repeat(np.arange(len(counts)), counts)
        if samples.dtype != SAMPLE_DTYPE or not np.array_equal(samples["shard"], expected):
            raise ValueError(
                f"{self.store.url(source, SAMPLES_NAME)} does not fit {INDEX_NAME} beside it: "
                "build the source again"
            )


def _read_meta(store: LocalStore | RemoteStore, source: str) -> dict[str, Any]:
    path = store.url(source, INDEX_NAME)
    try:
        data = store.read_index(source)
    except OSError as error:
        if store.remote:
            raise
        raise ValueError(f"{path} is damaged ({error!r}): build the source again") from error
    try:
        meta = json.loads(data)
        version = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): build the source again") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version reads {FORMAT}: build it again"
        )
    needed = {"category", "shards", "processor", "processor_parts", "image_settings"}
    if store.remote:
        needed.add("samples_sha256")
    absent = needed - set(meta)
    if absent or meta.get("source") != source:
        raise ValueError(f"{path} is damaged (missing {sorted(absent)} or of another source)")
    return meta
