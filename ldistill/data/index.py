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
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ldistill.common.samples import Processor, Sample
from ldistill.data.archive import (
    INDEX_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    BadSample,
    Shard,
    ShardFile,
    check_sample,
    sample_key,
)
from ldistill.data.remote.store import RemoteStore
from ldistill.data.store import LocalStore, Reading, open_store

FORMAT = 1


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
                f"has {', '.join(found)}. Train on what is there with --sources "
                f"{','.join(found)}, or build the others with `ldistill shards build`"
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
                _refuse(path, f"cannot be read ({error})")

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
    def image_settings(self) -> dict[str, Any]:
        """The settings that the shards were counted with."""
        return self.meta[self.sources[0]]["image_settings"]

    def check(self, processor: Processor) -> None:
        """Raise ValueError unless every source was counted with this processor."""
        parts = processor.parts
        for source, entry in self.meta.items():
            if entry["processor"] == processor.fingerprint():
                continue
            theirs, settings = entry["processor_parts"], entry["image_settings"]
            if "pictures" not in theirs and settings["tiling"] == processor.images.tiling:
                # Older shards of transformers' students name tokens and tiles apart; each
                # document's length, which reading it checks, says whether they still agree.
                theirs = theirs | {k: v for k, v in parts.items() if k == "pictures"}
            differ = [k for k, v in parts.items() if theirs.get(k) != v]
            if not differ:
                continue
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
        for shard, size in zip(self.shards, self.store.sizes(self.shards), strict=True):
            if size not in (None, shard.bytes):
                raise ValueError(
                    f"shard {shard.path} has {size} bytes instead of {shard.bytes}: it is "
                    "truncated or was replaced; build or copy it again"
                )

    def _check_samples(self, number: int) -> None:
        source, samples = self.sources[number], self.source_samples(number)
        counts = [shard["samples"] for shard in self.meta[source]["shards"]]
        if not sum(counts):
            _refuse(self.store.url(source, INDEX_NAME), "has no sample", "leave the source out")
        expected = np.repeat(np.arange(len(counts)), counts)
        if samples.dtype != SAMPLE_DTYPE or not np.array_equal(samples["shard"], expected):
            _refuse(self.store.url(source, SAMPLES_NAME), f"does not fit {INDEX_NAME} beside it")


def _read_meta(store: LocalStore | RemoteStore, source: str) -> dict[str, Any]:
    path, damage = store.url(source, INDEX_NAME), ""
    needed = {"format", "category", "shards", "processor", "processor_parts", "image_settings"}
    needed |= {"samples_sha256"} if store.remote else set()
    try:
        meta = dict(json.loads(store.read_index(source)))
    except (ValueError, TypeError, OSError) as error:
        if store.remote and isinstance(error, OSError):
            raise
        meta, damage = {}, repr(error)
    if meta.get("format", FORMAT) != FORMAT:
        _refuse(path, f"has format {meta['format']}, this version reads {FORMAT}")
    if absent := needed - set(meta):
        damage = damage or f"missing {sorted(absent)}"
    elif meta.get("source") != source:
        damage = "of another source"
    if damage:
        _refuse(path, f"is damaged ({damage})")
    return meta


def _refuse(path: str | Path, problem: str, remedy: str = "build the source again") -> NoReturn:
    raise ValueError(f"{path} {problem}: {remedy}")
