"""A store behind a URL: samples as ranges, or from whole shards in a cache on this machine.

The tables of the index lie in the shard cache too, from where they are mapped. Which of the two
ways samples are read is for `read_ahead` to choose. Either way a sample's bytes are those of its
CRC-32 in the index, and a whole shard's those of its SHA-256; bytes that are not are fetched once
more, in case they were damaged on the way, before anybody is told.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import numpy as np

from ldistill.common.locate import default_cache
from ldistill.data.archive import INDEX_NAME, SAMPLES_NAME, Shard, hash_file, pread_all
from ldistill.data.remote.cache import ShardCache, WrongContent
from ldistill.data.remote.reader import ObjectChanged, Refused, RemoteReader, Retry
from ldistill.sources import known_sources

Reads = Literal["auto", "whole", "ranged"]


@dataclass(frozen=True)
class Reading:
    """How remote shards are read; folders on this machine need none of it."""

    cache: str | None = None
    """Folder of the shard cache; None: `shards` in `$LDISTILL_CACHE` or the user's cache folder."""
    cache_gb: float = 64.0
    """The most that the cache may take, in GB; less where the disk has less left."""
    reads: Reads = "auto"
    """whole: fetch shards into the cache; ranged: samples alone; auto: see `read_ahead`."""
    retry: Retry = field(default_factory=Retry)


class RemoteStore:
    """A store behind a URL, with its cache on this machine; every method raises OSError.

    `whole` says whether samples are read from whole shards in the cache. Workers get a copy:
    requests under way stay behind.
    """

    remote = True

    def __init__(self, root: str, reading: Reading) -> None:
        self.root, self.reading = root, reading
        folder = Path(reading.cache) if reading.cache else default_cache() / "shards"
        self.cache = ShardCache(folder, int(reading.cache_gb * 1e9))
        self.reader = RemoteReader(reading.retry)
        self.whole = reading.reads == "whole"
        self._tags: dict[str, str | None] = {}
        self._ahead: dict[tuple[str, int], Future[bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": {}}

    # the index -------------------------------------------------------------------------------

    def sources(self, also: Iterable[str] = ()) -> list[str]:
        """Sources with an index: what the store lists, else the known names and `also`, tried."""
        listed = self.reader.names(self.root)
        names = sorted(name for name in listed if "." not in name and "?" not in name)
        names = names or sorted({*known_sources(), *also})
        answers = self.reader.each(names, self._has_index)
        found = [name for name, answer in zip(names, answers, strict=True) if answer is True]
        refusals = [answer for answer in answers if isinstance(answer, Refused)]
        if refusals and not found:
            raise refusals[0]
        return found

    def _has_index(self, source: str) -> bool | Refused:
        try:
            self.reader.info(self.url(source, INDEX_NAME))
        except FileNotFoundError:
            return False
        except Refused as refusal:  # S3's answer to a missing object when listing is not allowed
            return refusal
        return True

    def describe_empty(self) -> str:
        """Why `sources` is empty and what to do."""
        return (
            f"no shards at {self.root} (expected {self.root}/SOURCE/{INDEX_NAME}): check the "
            "address, or upload the folder that `ldistill shards build` made; a server that lists "
            "nothing needs --sources for names beyond the 17"
        )

    def url(self, source: str, name: str) -> str:
        """URL of a source's object."""
        return f"{self.root}/{source}/{name}"

    def read_index(self, source: str) -> bytes:
        """Content of a source's index.json, always from the store."""
        return self.reader.get(self.url(source, INDEX_NAME))

    def table(self, source: str, meta: dict[str, Any]) -> Path:
        """The source's samples.npy in the cache, fetched if it is not there."""
        url, sha256 = self.url(source, SAMPLES_NAME), meta["samples_sha256"]
        path = self.cache.folder / sha256
        if self.cache.holds(sha256) and hash_file(path) != sha256:
            self.cache.drop(sha256)
        if not self.cache.holds(sha256):
            size, _ = self.reader.info(url)
            self._open(url, sha256, len(self.reader.get(url)) if size is None else size).close()
        return path

    # samples ---------------------------------------------------------------------------------

    def read(self, shard: Shard, record: np.void) -> bytes:
        """A sample's bytes, from the cache or the store."""
        data = self._read(shard, record)
        if zlib.crc32(data) == record["crc32"]:
            return data
        if self.whole:
            self.cache.drop(shard.sha256)
        data = self._read(shard, record)
        if zlib.crc32(data) != record["crc32"]:
            self._check_same(shard)
        return data

    def _read(self, shard: Shard, record: np.void) -> bytes:
        offset, size = int(record["offset"]), int(record["size"])
        if self.whole:
            with self._open(shard.path, shard.sha256, shard.bytes) as file:
                return pread_all(file.fileno(), size, offset)
        if future := self._ahead.pop((shard.path, offset), None):
            return future.result()
        return self.reader.fetch(shard.path, offset, offset + size, shard.bytes)

    def expect(self, places: Iterable[tuple[Shard, np.void]]) -> None:
        """Start fetching the samples that this process reads next, several at a time.

        What was announced before and not read since is forgotten.
        """
        self._ahead = {}
        for shard, record in () if self.whole else places:
            start, end = int(record["offset"]), int(record["offset"]) + int(record["size"])
            request = self.reader.submit(self.reader.fetch, shard.path, start, end, shard.bytes)
            self._ahead[shard.path, start] = request

    def fetch_shard(self, shard: Shard) -> None:
        """Have a shard in the cache, unless another process is at it."""

        def fill(file: BinaryIO) -> str:
            return self.reader.download(shard.path, shard.bytes, file)

        self.cache.add(shard.sha256, shard.bytes, fill, wait=False)

    def _open(self, url: str, sha256: str, size: int, again: bool = True) -> BinaryIO:
        """An object from the cache. Raises ObjectChanged when the store has another one."""
        try:
            return self.cache.open(sha256, size, lambda file: self.reader.download(url, size, file))
        except WrongContent as error:
            if again:
                return self._open(url, sha256, size, again=False)
            self._changed(f"{url} has the SHA-256 {error.found} instead of {sha256}")

    # checks ----------------------------------------------------------------------------------

    def sizes(self, shards: Sequence[Shard]) -> list[int | None]:
        """Bytes that each shard has now, where the store says. Raises FileNotFoundError."""
        found = self.reader.each([shard.path for shard in shards], self.reader.info)
        self._tags = {s.path: tag for s, (_, tag) in zip(shards, found, strict=True)} | self._tags
        return [size for size, _ in found]

    def _check_same(self, shard: Shard) -> None:
        """Raise ObjectChanged when the store has another object now than at the start."""
        size, tag = self.reader.info(shard.path)
        before = self._tags.get(shard.path, tag)
        if tag != before or size not in (None, shard.bytes):
            self._changed(
                f"{shard.path} changed under way (its tag was {before}, now {tag}; "
                f"{size} bytes, {shard.bytes} in the index)"
            )

    @staticmethod
    def _changed(what: str) -> NoReturn:
        raise ObjectChanged(
            f"{what}: put the old object back, or upload the source again, index last, and start a "
            "new run"
        )

    def open_shard(self, shard: Shard) -> BinaryIO:
        """A nameless copy of the shard as it is now, in the cache's folder."""
        size, _ = self.reader.info(shard.path)
        file = tempfile.TemporaryFile(dir=self.cache.folder)  # noqa: SIM115
        try:
            self.reader.download(shard.path, shard.bytes if size is None else size, file)
        except BaseException:
            file.close()
            raise
        file.flush()
        file.seek(0)
        return file  # type: ignore[return-value]

    def tars(self, source: str) -> list[str]:
        """URLs of the tars beside a source's index, where the store lists them."""
        names = self.reader.names(f"{self.root}/{source}")
        return [self.url(source, name) for name in names if ".tar" in name]
