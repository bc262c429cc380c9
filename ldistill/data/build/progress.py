"""What a build has finished so far, on disk: the folder `{source}/.build/`.

Holds the build's plan (everything its bytes depend on), one record per finished shard, and a lock.
A killed build finds here where to go on; a build with another plan is refused.
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

WORK_NAME = ".build"


@dataclass
class Progress:
    """Where a build stands after some row; recorded with every finished shard."""

    next_row: int = 0
    samples: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    turn_drops: Counter[str] = field(default_factory=Counter)

    def count(self, drops: Iterable[Drop]) -> None:
        """Count drops of samples and of single turns apart."""
        for drop in drops:
            (self.turn_drops if drop.unit == "turn" else self.drops)[drop.reason] += 1

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON."""
        return {"next_row": self.next_row, **self.counts()}

    def counts(self) -> dict[str, Any]:
        """Samples kept and drops by reason, in JSON."""
        return {
            "samples": self.samples,
            "drops": dict(sorted(self.drops.items())),
            "turn_drops": dict(sorted(self.turn_drops.items())),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """The inverse of `to_json`."""
        drops, turn_drops = Counter(values["drops"]), Counter(values["turn_drops"])
        return cls(values["next_row"], values["samples"], drops, turn_drops)


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is on disk, its samples (`SAMPLE_DTYPE`), and the progress it stands for."""

    file: ShardFile
    rows: np.ndarray
    progress: Progress


class Ledger:
    """Records of one source's build in `folder/.build/`."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder, self.work = folder, folder / WORK_NAME
        self.plan = plan

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

    def resume(self) -> list[FinishedShard]:
        """Finished shards of this plan whose bytes are still those recorded, in order.

        Raises FileExistsError when the unfinished build has another plan.
        """
        file = self.work / "plan.json"
        if not file.exists():
            write_text(file, json.dumps(self.plan, indent=1))
        elif json.loads(file.read_text()) != json.loads(json.dumps(self.plan)):
            raise FileExistsError(
                f"{self.folder} holds the unfinished build of another input or other options: "
                "choose another folder, or pass --overwrite to start over"
            )
        shards: list[FinishedShard] = []
        while (shard := self._load(len(shards))) is not None:
            shards.append(shard)
        return shards

    def _load(self, number: int) -> FinishedShard | None:
        stem = self.work / f"{number:06d}"
        try:
            record = json.loads(stem.with_suffix(".json").read_text())
            rows = np.load(stem.with_suffix(".npy"))
            file = ShardFile(**record["shard"])
            progress = Progress.from_json(record["progress"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return FinishedShard(file, rows, progress) if is_whole(self.folder, file) else None

    def record(self, number: int, shard: FinishedShard) -> None:
        """Note a shard as finished; its tar is on disk already."""
        stem = self.work / f"{number:06d}"
        np.save(stem.with_suffix(".npy"), shard.rows)
        record = {"shard": asdict(shard.file), "progress": shard.progress.to_json()}
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
