"""What a checkpoint belongs to: the run, the pair, the data and their order, the engine's layout.

All of it goes into the checkpoint's manifest, so that a run never goes on from something else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ldistill.data.index import ShardIndex
from ldistill.data.order import Order
from ldistill.models.pair import Pair

_PIECES, _PIECE = 64, 4096


def describe(
    run_id: str, pair: Pair, index: ShardIndex, order: Order, layout: Any
) -> dict[str, Any]:
    """The ``about`` of a run's manifests; rank-independent."""
    teacher = pair.teacher_folder
    return {
        "run": run_id,
        "student": model_fingerprint(pair.student_folder),
        "teacher": model_fingerprint(teacher) if teacher is not None else None,
        "data": data_fingerprint(index, order),
        "layout": layout,
    }


def model_fingerprint(folder: Path) -> str:
    """Hash of a model's configuration and of its weights' headers and samples.

    64 pieces of 4 KiB from every weights file tell any two trainings apart, and cost nothing for
    weights of many gigabytes.
    """
    digest = hashlib.sha256()
    weights = list(folder.glob("*.safetensors")) or folder.glob("pytorch_model*.bin")
    for path in sorted(weights):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_PIECES):
                file.seek(max(0, size - _PIECE) * number // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    return digest.hexdigest()


def data_fingerprint(index: ShardIndex, order: Order) -> str:
    """Hash of everything that decides which documents come in which order."""
    shards = [(s.source, s.samples, s.bytes, s.sha256) for s in index.shards]
    facts = [index.sources, shards, order.identity]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


_WHAT = {
    "run": "another run (its id is not the one in {folder})",
    "student": "a run that began from another student",
    "teacher": "a run with another teacher",
    "data": "a run over other shards, or in another order of samples",
}


def check_belongs(checkpoint: Path, found: dict[str, Any], mine: dict[str, Any]) -> None:
    """Refuse a checkpoint that another run, pair or data set made.

    Raises:
        ValueError: saying which of them differs.
    """
    for key, text in _WHAT.items():
        if found.get(key) != mine[key]:
            raise ValueError(
                f"{checkpoint} belongs to {text.format(folder=checkpoint.parent)}; going on from "
                "it would mix two runs. Choose another --resume_from_checkpoint or --output_dir, "
                "or give back what the run began with."
            )
