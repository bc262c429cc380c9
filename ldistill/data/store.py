"""Where shards lie: a folder, or a store behind a URL. Both answer the same questions.

store = open_store("s3://bucket/shards", Reading(cache="/scratch/shards", cache_gb=200))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldistill.data.archive import INDEX_NAME, SAMPLES_NAME, Shard, read_range
from ldistill.data.remote.reader import is_remote
from ldistill.data.remote.store import Reading, Reads, RemoteStore

__all__ = ["INDEX_NAME", "SAMPLES_NAME", "LocalStore", "Reading", "Reads", "open_store"]
SLICES_NAME = ".slices"


def open_store(root: str | Path, reading: Reading | None = None) -> LocalStore | RemoteStore:
    """The store at a path or URL; nothing is read yet, but a remote one makes its cache folder."""
    if is_remote(root):
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

    def sizes(self, shards: Sequence[Shard]) -> list[int | None]:
        """Bytes that each shard has now. Raises FileNotFoundError."""
        gone = [shard.path for shard in shards if not Path(shard.path).is_file()]
        if gone:
            raise FileNotFoundError(f"shard {gone[0]} is missing: build or copy it again")
        return [Path(shard.path).stat().st_size for shard in shards]

    def open_shard(self, shard: Shard) -> BinaryIO:
        """The shard's file. Raises OSError."""
        return Path(shard.path).open("rb")

    def tars(self, source: str) -> list[str]:
        """Paths of the tars in a source's folder."""
        return sorted(str(path) for path in (Path(self.root) / source).glob("*.tar*"))
