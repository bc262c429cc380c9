"""How far a build has come, on disk: the folder `{source}/.build/`.

Holds what the bytes depend on (`plan.json`), a record of every finished shard, and a lock. A
killed build finds here where to go on; a build of another input or other options is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldistill.common.samples import Drop
from ldistill.data.archive import ShardFile, hash_file


@dataclass
class Counts:
    """What became of the rows up to `next_row`; recorded with every finished shard."""

    next_row: int = 0
    samples: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    turn_drops: Counter[str] = field(default_factory=Counter)
    first_drops: dict[str, str] = field(default_factory=dict)
    """For each reason the first record that it met, and what was wrong with it."""

    def count(self, drops: Iterable[Drop]) -> None:
        """Count drops of samples and of single turns apart."""
        for drop in drops:
            (self.turn_drops if drop.unit == "turn" else self.drops)[drop.reason] += 1
            detail = f" ({drop.detail})" if drop.detail else ""
            self.first_drops.setdefault(drop.reason, f"{drop.id}{detail}")

    def to_json(self) -> dict[str, Any]:
        """Samples kept and drops by reason, in JSON."""
        return {
            "samples": self.samples,
            "drops": dict(sorted(self.drops.items())),
            "turn_drops": dict(sorted(self.turn_drops.items())),
        } | ({"first_drops": dict(sorted(self.first_drops.items()))} if self.first_drops else {})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Counts:
        """The inverse of `to_json`, with `next_row`."""
        drops, turn_drops = Counter(values["drops"]), Counter(values["turn_drops"])
        first = values.get("first_drops", {})
        return cls(values["next_row"], values["samples"], drops, turn_drops, first)


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is on disk, its samples (`SAMPLE_DTYPE`), and the counts up to its end."""

    file: ShardFile
    table: np.ndarray
    counts: Counts


class BuildState:
    """Records of one source's build in `folder/.build/`; `spec` is what its bytes depend on."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder, self.work, self.spec = folder, folder / ".build", spec

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep other builds out. The lock goes with the process: a kill leaves none behind."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FileExistsError(f"another build is writing {self.folder}") from error
            yield

    def is_ours(self) -> bool:
        """Whether what the folder holds, if anything, is of this build."""
        file = self.work / "plan.json"
        if not file.exists():
            write_text(file, json.dumps(self.spec, indent=1))
        return json.loads(file.read_text()) == json.loads(json.dumps(self.spec))

    def finished(self) -> list[FinishedShard]:
        """Finished shards of this build whose bytes are still those recorded, in order."""
        shards: list[FinishedShard] = []
        while (shard := self._load(len(shards))) is not None:
            shards.append(shard)
        return shards

    def _load(self, number: int) -> FinishedShard | None:
        stem = self.work / f"{number:06d}"
        try:
            record = json.loads(stem.with_suffix(".json").read_text())
            table = np.load(stem.with_suffix(".npy"))
        except (OSError, ValueError):
            return None
        file, counts = ShardFile(**record["shard"]), Counts.from_json(record["progress"])
        return FinishedShard(file, table, counts) if is_whole(self.folder, file) else None

    def record(self, number: int, shard: FinishedShard) -> None:
        """Note a shard as finished; its tar is on disk already."""
        stem = self.work / f"{number:06d}"
        np.save(stem.with_suffix(".npy"), shard.table)
        counts = {"next_row": shard.counts.next_row, **shard.counts.to_json()}
        record = {"shard": asdict(shard.file), "progress": counts}
        write_text(stem.with_suffix(".json"), json.dumps(record))

    def close(self) -> None:
        """Forget the records: the index says it all now."""
        shutil.rmtree(self.work)


def is_whole(folder: Path, file: ShardFile) -> bool:
    """Whether a shard is there with the size and hash recorded."""
    path = folder / file.url
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    return hash_file(path) == file.sha256


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename: the file is never seen half-written."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
