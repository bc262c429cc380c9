"""Where shards lie: a folder, or a store behind a URL. Both answer the same questions.

store = open_store("s3://bucket/shards", Reading(cache="/scratch/shards", cache_gb=200))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ldistill.data.archive import read_range
from ldistill.data.remote.cache import ShardCache
from ldistill.data.remote.reader import Retry, is_remote

if TYPE_CHECKING:
    from ldistill.data.index import Shard
    from ldistill.data.remote.store import RemoteStore

INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.npy"
SLICES_NAME = ".slices"
READS = ("auto", "whole", "ranged")


@dataclass(frozen=True)
class Reading:
    """How remote shards are read; folders on this machine need none of it."""

    cache: str | None = None
    """Folder of the shard cache; None: `shards` in `$LDISTILL_CACHE` or the user's cache folder."""
    cache_gb: float = 64.0
    """The most that the cache may take, in GB; less where the disk has less left."""
    reads: str = "auto"
    """whole: fetch shards into the cache; ranged: samples alone; auto: see `read_ahead`."""
    retry: Retry = field(default_factory=Retry)

    def __post_init__(self) -> None:
        if self.reads not in READS:
            raise ValueError(f"shard_reads must be one of {', '.join(READS)}, got {self.reads!r}")
        if self.cache_gb <= 0:
            raise ValueError(f"shard_cache_gb must be above 0, got {self.cache_gb}")

    def open_cache(self) -> ShardCache:
        """The cache folder, made if need be. Raises OSError."""
        from ldistill.tiny.prepare import default_cache

        folder = Path(self.cache) if self.cache else default_cache() / "shards"
        return ShardCache(folder, int(self.cache_gb * 1e9))


def open_store(root: str | Path, reading: Reading | None = None) -> LocalStore | RemoteStore:
    """The store at a path or URL; nothing is read yet, but a remote one makes its cache folder."""
    if is_remote(root):
        from ldistill.data.remote.store import RemoteStore

        return RemoteStore(str(root).rstrip("/"), reading or Reading())
    return LocalStore(str(root).removeprefix("file://"))


class LocalStore:
    """A folder on this machine."""

    remote = False

    def __init__(self, root: str) -> None:
        self.root = root

    def sources(self, also: Iterable[str] = ()) -> list[str]:
        """Folders with an index, by name."""
        return sorted(path.parent.name for path in Path(self.root).glob(f"*/{INDEX_NAME}"))

    def describe_empty(self) -> str:
        """Why `sources` is empty and what to do."""
        root = Path(self.root)
        if not root.is_dir():
            return (
                f"no shards: the folder {root} does not exist. Build it with "
                "`ldistill shards build`"
            )
        if (root / SLICES_NAME).is_dir():
            return f"{root} is built in slices: join them with `ldistill shards merge {root}`"
        if any(root.glob("*/.build")):
            return f"the build of {root} is unfinished: run the same `ldistill shards build` again"
        return (
            f"no shards in {root} (expected SOURCE/{INDEX_NAME}): see "
            "`ldistill shards build --help`"
        )

    def url(self, source: str, name: str) -> str:
        """Path of a source's file."""
        return str(Path(self.root) / source / name)

    def read_index(self, source: str) -> bytes:
        """Content of a source's index.json. Raises OSError."""
        return Path(self.url(source, INDEX_NAME)).read_bytes()

    def table(self, source: str, meta: dict[str, Any]) -> Path:
        """The source's samples.npy."""
        return Path(self.url(source, SAMPLES_NAME))

    def read(self, shard: Shard, record: np.void) -> bytes:
        """A sample's bytes. Raises OSError."""
        return read_range(shard.path, int(record["offset"]), int(record["size"]))

    def check(self, shards: Sequence[Shard]) -> None:
        """Raise FileNotFoundError or ValueError for a shard that is missing or cut short."""
        for shard in shards:
            path = Path(shard.path)
            if not path.is_file():
                raise FileNotFoundError(f"shard {path} is missing: build or copy it again")
            if path.stat().st_size != shard.bytes:
                raise ValueError(
                    f"shard {path} has {path.stat().st_size} bytes instead of {shard.bytes}: it is "
                    "truncated or was replaced; build or copy it again"
                )

    def open_shard(self, shard: Shard) -> BinaryIO:
        """The shard's file. Raises OSError."""
        return Path(shard.path).open("rb")

    def tars(self, source: str) -> list[str]:
        """Paths of the tars in a source's folder."""
        return sorted(str(path) for path in (Path(self.root) / source).glob("*.tar*"))
