"""Which checkpoint a run goes on from.

``--resume_from_checkpoint auto`` takes the newest complete one, says which it skipped and why, and
begins at step 0 where none was ever made; ``true`` is the same but wants one; a path is that one or
nothing. Before anything is loaded the bytes are compared with the manifest's hashes (the ranks
share that work) and every pickle is searched for anything that is not plain data.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldistill.checkpoint import folder as checkpoint_folder
from ldistill.checkpoint import universal
from ldistill.common import ranks
from ldistill.common.errors import TransientError, disk_failed
from ldistill.common.run_files import run_id
from ldistill.common.telling import telling
from ldistill.data.archive import patiently
from ldistill.data.index import ShardIndex
from ldistill.data.order import Order
from ldistill.models.pair import Pair

# Classes that DeepSpeed and transformers pickle into their own checkpoints; each is plain data.
_PLAIN = """
collections.OrderedDict collections.defaultdict builtins.dict builtins.list builtins.int
torch.Size torch.device torch.dtype
deepspeed.runtime.zero.config.ZeroStageEnum deepspeed.utils.tensor_fragment.fragment_address
deepspeed.runtime.fp16.loss_scaler.LossScaler deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler
numpy._core.multiarray._reconstruct numpy.core.multiarray._reconstruct
numpy._core.multiarray.scalar numpy.core.multiarray.scalar
numpy.ndarray numpy.dtype numpy.dtypes.UInt32DType _codecs.encode
"""
_HARMLESS = frozenset(_PLAIN.split())
# Of a manifest's `about`: what a checkpoint belongs to that this run may not go on from.
_WHAT = {
    "run": "another run (its id is not the one in {folder})",
    "student": "a run that began from another student",
    "teacher": "a run with another teacher",
    "data": "a run over other shards, or in another order of samples",
}


def wants_newest(asked: str | None) -> bool:
    """Whether the newest checkpoint of the run folder is asked for."""
    return str(asked).lower() in ("true", "auto")


def find_checkpoint(asked: str | None, folder: Path) -> Path | None:
    """The checkpoint to go on from; None to begin at step 0. Every rank must call it.

    Args:
        asked: ``--resume_from_checkpoint``: a path, ``auto``, ``true``, ``false`` or None.
        folder: the run's.

    Raises:
        FileNotFoundError: asked for one, and there is none.
        ValueError: there are some, and none of them can be used.
        TransientError: the disk does not let one be read, which may be whole.
    """
    if asked is None or str(asked).lower() == "false":
        return None
    if not wants_newest(asked):
        path = Path(asked)
        if not path.is_dir():
            raise FileNotFoundError(f"checkpoint {asked!r} does not exist.")
        reason = ranks.from_first(lambda: checkpoint_folder.problem(path)) or _bytes_problem(path)
        if reason:
            raise ValueError(f"{path} cannot be used: {reason}.")
        return path
    skipped: list[str] = []
    for candidate in ranks.from_first(lambda: checkpoint_folder.survey(folder)):
        reason = candidate.problem or _bytes_problem(candidate.path)
        if reason is None:
            ranks.say("\n".join([*skipped, f"going on from {candidate.path}."]))
            return candidate.path
        skipped.append(f"{candidate.path.name} skipped: {reason}")
    if skipped:
        raise ValueError(
            f"none of the checkpoints in {folder} can be used:\n  " + "\n  ".join(skipped) + "\n"
            "Restore one from a copy, or begin anew with --overwrite or another --output_dir."
        )
    if str(asked).lower() == "true":
        raise FileNotFoundError(f"nothing to resume: {folder} holds no checkpoint-N folder.")
    ranks.say(f"no checkpoint in {folder} yet: beginning at step 0.")
    return None


def _bytes_problem(path: Path) -> str | None:
    """What is wrong inside the files; the ranks read a share each and all get the answer.
    Raises TransientError on every rank, when one of them could not read its share."""
    own, unread = None, None
    try:
        if names := checkpoint_folder.damaged(path, ranks.index(), ranks.count()):
            own = f"{names[0]} is not what was written (SHA-256 differs)"
    except (FileNotFoundError, ValueError) as error:
        own = str(error)
    except OSError as error:
        unread = str(error)
    ranks.relay(unread, lambda found: _unreadable(path, next(iter(found.values()))))
    problems = filter(None, ranks.gather(own))
    return next(problems, None) or ranks.from_first(lambda: foreign_code(path))


def _unreadable(path: Path, why: str) -> TransientError:
    """Not a reason to skip a checkpoint: what is later than the one taken is given up."""
    return TransientError(
        f"{path} cannot be read now, and may be whole ({why}): mend the disk and start again, or "
        "name another checkpoint with --resume_from_checkpoint PATH."
    )


def foreign_code(checkpoint: Path) -> str | None:
    """Name what a checkpoint's pickles would import beyond plain data; None when nothing.

    Reads the opcodes alone: nothing is unpickled. DeepSpeed itself loads without torch's
    ``weights_only``, so this check is what stands between a downloaded checkpoint and its code.
    Raises TransientError: the disk does not let a file be read.
    """
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix not in (".pt", ".pth", ".bin", ".pkl"):
            continue
        name = path.relative_to(checkpoint).as_posix()
        try:
            named = patiently(
                lambda path=path: torch.serialization.get_unsafe_globals_in_checkpoint(path)
            )
        except Exception as error:  # whatever cannot even be parsed is not ours
            if disk_failed(error):
                raise _unreadable(checkpoint, str(error)) from error
            return f"{name} is not a plain torch file ({type(error).__name__})"
        if odd := sorted(set(named) - _HARMLESS):
            return f"{name} would run code of its own ({', '.join(odd[:3])}): refused"
    return None


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or from a checkpoint that may have been converted for it."""

    checkpoint: Path | None = None
    step: int = 0
    converted: bool = False


def fit(checkpoint: Path | None, about: dict[str, Any], run: Path, plugin: Any) -> Start:
    """Where a run begins: the checkpoint as the run can load it, converted if of other ranks.

    ``about`` is what the run is (see :func:`describe`), ``run`` its folder; accelerate's DeepSpeed
    ``plugin`` is told of a conversion.

    Raises:
        ValueError: it belongs to another run, pair or data set, or cannot be converted.
    """
    if checkpoint is None:
        return Start()
    manifest = checkpoint_folder.read_manifest(checkpoint)
    found, step = manifest.about, manifest.step
    check_belongs(checkpoint, found, about | {"run": run_id(checkpoint.parent)})
    if found["layout"] == about["layout"]:
        return Start(checkpoint, step)
    universal.check_convertible(checkpoint, found["layout"], about["layout"])

    def convert() -> Path:
        with telling(f"{checkpoint.name} was cut otherwise ({found['layout']}): converting it"):
            return universal.convert(checkpoint, run)

    config = plugin.deepspeed_config
    config["checkpoint"] = config.get("checkpoint", {}) | {"load_universal": True}
    return Start(ranks.from_first(convert), step, converted=True)


def give_up_later(folder: Path, checkpoint: Path) -> list[Path]:
    """Rename a run's good checkpoints after the one it goes on from: ``given-up-checkpoint-N``.

    A run that goes back to an earlier checkpoint takes another way from there; ``auto`` must not
    return to the one it left. Call it on one rank.
    """
    step = checkpoint_folder.read_manifest(checkpoint).step
    moved = []
    for found in checkpoint_folder.complete(folder):
        if found.step > step:
            target = folder / f"given-up-{found.path.name}"
            checkpoint_folder.remove(target)
            moved.append(found.path.rename(target))
            ranks.say(f"{found.path.name} is later than {checkpoint.name}: now {target.name}.")
    return moved


# ---- what a checkpoint belongs to ----


def describe(
    run_id: str, pair: Pair, index: ShardIndex, order: Order, layout: Any
) -> dict[str, Any]:
    """The ``about`` of a run's manifests; rank-independent."""
    teacher = pair.teacher_folder
    # All that decides which documents come in which order.
    shards = [(s.source, s.samples, s.bytes, s.sha256) for s in index.shards]
    data = json.dumps([index.sources, shards, order.identity])
    return {
        "run": run_id,
        "student": model_fingerprint(pair.student_folder),
        "teacher": model_fingerprint(teacher) if teacher is not None else None,
        "data": hashlib.sha256(data.encode()).hexdigest(),
        "layout": layout,
    }


def model_fingerprint(folder: Path) -> str:
    """Hash of a model's configuration and of 64 pieces of 4 KiB from every file of weights, which
    tell any two trainings apart and cost nothing for many gigabytes."""
    digest = hashlib.sha256()
    weights = list(folder.glob("*.safetensors")) or folder.glob("pytorch_model*.bin")
    for path in sorted(weights):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(64):
                file.seek(max(0, size - 4096) * number // (64 - 1))
                digest.update(file.read(4096))
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    return digest.hexdigest()


def check_belongs(checkpoint: Path, found: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise ValueError for a checkpoint that another run, pair or data set made."""
    for key, text in _WHAT.items():
        if found.get(key) != mine[key]:
            raise ValueError(
                f"{checkpoint} belongs to {text.format(folder=checkpoint.parent)}; going on from "
                "it would mix two runs. Choose another --resume_from_checkpoint or --output_dir, "
                "or give back what the run began with."
            )
