"""A bounded folder of objects that were fetched from a store, shared by processes.

    cache = ShardCache(folder, limit=64_000_000_000)
    with cache.open(sha256, size, fill) as file: ...

A file's name is the SHA-256 of its content: the same shard under two addresses is kept once, and a
shard that is replaced in the store cannot be confused with the old one. `fill` writes beside the
name, under a lock of that name, and only a file whose hash is right is renamed to it; so what has
a name is whole. The space of a file under way is reserved before its first byte, and what was used
longest ago makes room: the limit holds at every moment. A process that dies leaves a `.part` file
that nobody reads; whoever opens the cache or needs the room next removes it. Nothing waits for
the disk: after a power cut a name may stand for lost bytes, but readers check theirs (`drop`).

fsspec's own file cache has no limit, no hashes and no locks between processes, hence this one.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ldistill.common.errors import TransientError, disk_full

PART = ".part"
Fill = Callable[[BinaryIO], str]
"""Writes an object to a file and returns the SHA-256 of what it wrote."""


class WrongContent(OSError):
    """What was fetched has another hash than it should; `found` is that hash."""

    def __init__(self, found: str) -> None:
        super().__init__(f"SHA-256 {found}")
        self.found = found


class ShardCache:
    """Whole objects by their hash in a folder of at most `limit` bytes.

    Raises OSError when the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        self._locks = self.folder / "locks"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"the shard cache {self.folder} cannot be made: {error}") from error
        self._sweep()

    def open(self, sha256: str, size: int, fill: Fill) -> BinaryIO:
        """An object's file, open for reading; it stays readable even when evicted meanwhile.

        Raises:
            WrongContent: what `fill` wrote has another hash; nothing of it is kept.
            OSError: no room within the limit or on the disk, or what `fill` raises.
        """
        while True:
            if file := self._open_whole(sha256):
                return file
            self.add(sha256, size, fill)

    def add(self, sha256: str, size: int, fill: Fill, wait: bool = True) -> bool:
        """Have an object in the cache. Without `wait`, False if another process is fetching it."""
        with self._lock(sha256, wait) as mine:
            if mine and not self.holds(sha256):
                self._fetch(sha256, size, fill)
            return mine

    def holds(self, sha256: str) -> bool:
        """Whether an object is there."""
        return (self.folder / sha256).exists()

    def drop(self, sha256: str) -> None:
        """Forget an object."""
        (self.folder / sha256).unlink(missing_ok=True)

    def room(self) -> int:
        """Bytes the cache can come to hold: its limit, or what the disk has left for it."""
        disk = os.statvfs(self.folder)
        held = sum(size for _, size, _ in self._entries())
        return min(self.limit, held + int(0.95 * disk.f_bavail * disk.f_frsize))

    # inside ----------------------------------------------------------------------------------

    def _open_whole(self, sha256: str) -> BinaryIO | None:
        path = self.folder / sha256
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        now = time.time_ns()  # finer than the clock a file system stamps with by itself
        with suppress(FileNotFoundError):  # evicted since: it is ours to read all the same
            os.utime(path, ns=(now, now))
        return file  # type: ignore[return-value]

    def _fetch(self, sha256: str, size: int, fill: Fill) -> None:
        part = self.folder / (sha256 + PART)
        try:
            self._reserve(part, size)
            with part.open("r+b") as file:
                found = fill(file)
                file.truncate()
            if found != sha256:
                raise WrongContent(found)
            with self._lock("room"):  # whoever counts what is held meets it under one name
                part.replace(self.folder / sha256)
        except OSError as error:
            if disk_full(error):
                raise TransientError(
                    f"no room left on the disk of the shard cache {self.folder}: free some, or set "
                    "a smaller --shard_cache_gb or another --shard_cache"
                ) from error
            raise
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> None:
        """Make `part` with its final size, evicting until it fits."""
        if size > self.limit:
            raise OSError(
                f"an object of {size / 1e9:.3f} GB does not fit the shard cache of "
                f"{self.limit / 1e9:.3f} GB: raise --shard_cache_gb, or read ranges "
                "(--shard_reads ranged)"
            )
        while True:
            with self._lock("room"):
                if self._evict(self.limit - size):
                    with part.open("wb") as file:
                        file.truncate(size)
                    return
            self._sweep()  # the rest is under way: wait for it to become a file or to be abandoned
            time.sleep(0.05)

    def _evict(self, most: int) -> bool:
        """Remove the longest unused until at most `most` bytes are left; False if they are not."""
        entries = sorted(self._entries())
        held = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if held <= most:
                break
            if path.suffix != PART:
                path.unlink(missing_ok=True)
                held -= size
        return held <= most

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every object and part."""
        with os.scandir(self.folder) as found:
            for entry in found:
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        stat = entry.stat()
                        yield stat.st_mtime_ns, stat.st_size, Path(entry.path)

    def _sweep(self) -> None:
        """Remove the parts of processes that died: those whose lock nobody holds."""
        for part in self.folder.glob("*" + PART):
            with self._lock(part.stem, wait=False) as mine:
                if mine:
                    part.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock that dies with the process; yields whether it was got."""
        with (self._locks / name).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                raise OSError(
                    f"the file system of the shard cache {self.folder} has no file locks "
                    f"({error.strerror}): choose a --shard_cache on a local disk"
                ) from error
            try:
                yield True
            finally:  # closing alone would not do while a child forked meanwhile has a copy of it
                fcntl.flock(file, fcntl.LOCK_UN)
