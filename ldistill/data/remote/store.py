"""A store behind a URL: samples as ranges, or from whole shards in the cache.

The tables of the index lie in the shard cache too, from where they are mapped. Which of the two
ways samples are read is for `read_ahead` to choose. Either way a sample's bytes are those of its
CRC-32 in the index, and a whole shard's those of its SHA-256; bytes that are not are fetched once
more, in case they were damaged on the way, before anybody is told.
"""

from __future__ import annotations

import os
import tempfile
import threading
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ldistill.data.archive import hash_file, pread_all
from ldistill.data.remote.cache import WrongContent
from ldistill.data.remote.reader import ObjectChanged, Refused, RemoteReader, join
from ldistill.data.store import INDEX_NAME, SAMPLES_NAME, Reading
from ldistill.sources import known_sources

if TYPE_CHECKING:
    from ldistill.data.index import Shard


class RemoteStore:
    """A store behind a URL, with its cache on this machine.

    `whole` says whether samples are read from whole shards in the cache; `expect` announces what
    will be read soon. Workers get a copy: threads, requests under way and locks stay behind.
    """

    remote = True

    def __init__(self, root: str, reading: Reading) -> None:
        self.root, self.reading = root, reading
        self.cache = reading.open_cache()
        self.reader = RemoteReader(reading.retry)
        self.whole = reading.reads == "whole"
        self._tags: dict[str, str | None] = {}
        self._start()

    def _start(self) -> None:
        """Begin with nothing under way, in this process: threads do not survive a fork."""
        self._owner = os.getpid()
        self._ahead: dict[tuple[str, int], Future[bytes]] = {}
        self._fetcher = ShardFetcher(self)

    def __getstate__(self) -> dict[str, Any]:
        left = ("_ahead", "_fetcher")
        return {k: v for k, v in self.__dict__.items() if k not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

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
        return join(self.root, source, name)

    def read_index(self, source: str) -> bytes:
        """Content of a source's index.json, always from the store. Raises OSError."""
        return self.reader.get(self.url(source, INDEX_NAME))

    def table(self, source: str, meta: dict[str, Any]) -> Path:
        """The source's samples.npy in the cache, fetched if it is not there. Raises OSError."""
        url, sha256 = self.url(source, SAMPLES_NAME), meta["samples_sha256"]
        path = self.cache.folder / sha256
        with suppress(FileNotFoundError):
            if hash_file(path) != sha256:
                self.cache.drop(sha256)
        if not self.cache.holds(sha256):
            size = self.reader.info(url).size
            if size is None:
                raise OSError(f"the store does not say how large {url} is: use another server")
            self._open(url, sha256, size).close()
        return path

    # samples ---------------------------------------------------------------------------------

    def read(self, shard: Shard, record: np.void) -> bytes:
        """A sample's bytes, from the cache or the store. Raises OSError."""
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
        future = self._ahead.pop((shard.path, offset), None)
        if future and self._owner == os.getpid():
            return future.result()
        return self.reader.fetch(shard.path, offset, offset + size, shard.bytes)

    def expect(self, ranges: Iterable[tuple[Shard, np.void]], shards: Iterable[Shard]) -> None:
        """Start fetching the samples that are read next, and shards that are needed later.

        Samples announced before and not read since are forgotten.
        """
        if self._owner != os.getpid():
            self._start()
        ahead = {}
        for shard, record in () if self.whole else ranges:
            start = int(record["offset"])
            place = (shard.path, start, start + int(record["size"]), shard.bytes)
            under_way = self._ahead.pop(place[:2], None)
            ahead[place[:2]] = under_way or self.reader.submit(self.reader.fetch, *place)
        for future in self._ahead.values():
            future.cancel()
        self._ahead = ahead
        for shard in shards:
            self._fetcher.add(shard)

    def fetch_shard(self, shard: Shard) -> None:
        """Have a shard in the cache, unless another process is at it. Raises OSError."""
        self.cache.add(shard.sha256, shard.bytes, self._fill(shard.path, shard.bytes), wait=False)

    def _fill(self, url: str, size: int) -> Any:
        return lambda file: self.reader.download(url, size, file)

    def _open(self, url: str, sha256: str, size: int) -> BinaryIO:
        """An object from the cache. Raises ObjectChanged when the store has another one."""
        fill = self._fill(url, size)
        try:
            return self.cache.open(sha256, size, fill)
        except WrongContent:
            try:
                return self.cache.open(sha256, size, fill)
            except WrongContent as error:
                raise ObjectChanged(
                    f"{url} has the SHA-256 {error.found} instead of {sha256}: it was replaced, or "
                    "its index is of another build; upload the source again, index last"
                ) from error

    # checks ----------------------------------------------------------------------------------

    def check(self, shards: Sequence[Shard]) -> None:
        """Raise FileNotFoundError or ValueError for a shard that is missing or cut short."""
        todo = [shard for shard in shards if shard.path not in self._tags]
        found = self.reader.each([shard.path for shard in todo], self.reader.info)
        for shard, info in zip(todo, found, strict=True):
            if info.size is not None and info.size != shard.bytes:
                raise ValueError(
                    f"shard {shard.path} has {info.size} bytes instead of {shard.bytes}: it is "
                    "truncated or was replaced; upload it again"
                )
            self._tags[shard.path] = info.tag

    def _check_same(self, shard: Shard) -> None:
        """Raise ObjectChanged when the store has another object now than at the start."""
        info = self.reader.info(shard.path)
        before = self._tags.get(shard.path, info.tag)
        if info.tag != before or info.size not in (None, shard.bytes):
            raise ObjectChanged(
                f"{shard.path} changed under way (its tag was {before}, now {info.tag}; "
                f"{info.size} bytes, {shard.bytes} in the index): put the old object back, or "
                "upload the source again and start a new run"
            )

    def open_shard(self, shard: Shard) -> BinaryIO:
        """A nameless copy of the shard as it is now, in the cache's folder. Raises OSError."""
        size = self.reader.info(shard.path).size
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
        names = self.reader.names(join(self.root, source))
        return [self.url(source, name) for name in names if ".tar" in name]


class ShardFetcher:
    """A thread that fetches shards into the cache, one after another; started when needed.

    What it cannot fetch it leaves: whoever reads a sample of that shard will be told why.
    """

    def __init__(self, store: RemoteStore) -> None:
        self._store = store
        self._wanted: dict[str, Shard] = {}
        self._lock = threading.Lock()
        self._running = False

    def add(self, shard: Shard) -> None:
        """Fetch a shard soon."""
        with self._lock:
            self._wanted[shard.sha256] = shard
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="shard fetcher", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running = False
                    return
                shard = self._wanted.pop(next(iter(self._wanted)))
            try:
                self._store.fetch_shard(shard)
            except Exception:
                continue
