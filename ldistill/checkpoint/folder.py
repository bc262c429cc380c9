"""Checkpoints on disk: one is complete, or nobody sees it.

    run/checkpoint-20/            complete: manifest.json lists every file with size and SHA-256
    run/.writing/checkpoint-30/   being written; nothing reads it
    run/.retired/checkpoint-10/   being deleted
    run/.adapted/checkpoint-20/   a copy for other ranks or another ZeRO stage, while it is loaded

A checkpoint is written aside by all ranks; its files are made durable and hashed; the manifest,
listing them, is written last; one rename makes the whole visible. Killed between any two of these
operations, a run keeps every checkpoint it had, and what is left aside is cleared away by the next
one. Nothing here knows of models or ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldistill.common.errors import refuse, writing
from ldistill.data.archive import hash_file, patiently

MANIFEST = "manifest.json"
WRITING = ".writing"
RETIRED = ".retired"
ADAPTED = ".adapted"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")

Files = dict[str, tuple[int, str]]
"""``{path within the checkpoint: (bytes, SHA-256)}``."""


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself; ``about`` is the writer's own."""

    step: int
    files: Files
    about: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A folder ``checkpoint-N``; ``problem`` says why it cannot be used, None where it can."""

    path: Path
    step: int
    problem: str | None = None


# ---- writing ----


def begin(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of ``step`` into; leftovers are cleared away."""
    clear(root)
    folder = root / WRITING / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    return folder


def clear(root: Path) -> None:
    """Remove what an earlier, killed process left half written, half deleted or half loaded."""
    remove(*(root / name for name in (WRITING, RETIRED, ADAPTED)))


def remove(*folders: Path) -> None:
    """Delete those of the folders that are there."""
    for folder in filter(Path.exists, folders):
        shutil.rmtree(folder)


def seal(folder: Path, part: int = 0, parts: int = 1) -> Files:
    """Make files of a folder durable, and hash them: every ``parts``-th, from ``part`` on."""
    files = {}
    for name in _names(folder)[part::parts]:
        path = folder / name
        sync(path)
        files[name] = (path.stat().st_size, hash_file(path))
    return files


def publish(folder: Path, step: int, files: Files, about: dict[str, Any]) -> Path:
    """Write the manifest and give a sealed folder its name; returns where the checkpoint lies.
    Raises OSError: what was sealed is not all there is, or the disk failed."""
    if set(files) != set(_names(folder)):
        odd = sorted(set(files) ^ set(_names(folder)))[:3]
        raise OSError(f"{folder} changed while it was sealed ({', '.join(odd)}).")
    record = {"format": FORMAT, "step": step, "files": files, "about": about}
    write_durably(folder / MANIFEST, json.dumps(record, indent=1, sort_keys=True))
    for inner in sorted(p for p in folder.rglob("*") if p.is_dir()):
        sync(inner)
    sync(folder)
    target = folder.parent.parent / folder.name
    if target.exists():  # of this step, but damaged or of a future that was given up
        _set_aside(target)
    folder.rename(target)
    sync(target.parent)
    return target


def retire(
    root: Path, keep: int | None, best: Callable[[int], tuple[int, float] | None] | None = None
) -> None:
    """Delete the oldest complete checkpoints beyond ``keep``, never the last one; None keeps all.

    What was ``best`` up to the oldest that is kept is kept as well: a run may go on from there.
    Folders that are not complete checkpoints of this format are left alone.
    """
    good = complete(root)
    kept = good[: max(keep, 1)] if keep else good
    spared = best(kept[-1].step) if best and kept else None
    gone = [f.path for f in good[len(kept) :] if spared is None or f.step != spared[0]]
    for path in reversed(gone):
        _set_aside(path)
    remove(root / RETIRED)


def _set_aside(path: Path) -> None:
    """Rename first, so that a half-deleted checkpoint is never seen under its name."""
    place = path.parent / RETIRED / path.name
    remove(place)
    place.parent.mkdir(exist_ok=True)
    path.rename(place)


# ---- reading ----


def survey(root: Path) -> list[Found]:
    """Folders named ``checkpoint-N``, newest first, with what their sizes say is wrong."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found.append(Found(path, int(match[1]), problem(path)))
    return sorted(found, key=lambda f: f.step, reverse=True)


def complete(root: Path) -> list[Found]:
    """The checkpoints of `survey` that can be used, the newest first."""
    return [found for found in survey(root) if found.problem is None]


def problem(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint, by manifest and sizes; None if it is one.
    Raises OSError: it cannot be read for now, so that nobody knows."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for path in folder.rglob("*"):
        if path.is_symlink():  # what lies behind one is neither listed nor searched for code
            return f"{path.relative_to(folder).as_posix()} is a symbolic link: refused"
    names = set(_names(folder))
    for name, (size, _) in manifest.files.items():
        if name not in names:
            return f"{name} is missing"
        if (actual := (folder / name).stat().st_size) != size:
            return f"{name} has {actual} bytes instead of {size}"
    return None


def damaged(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Files whose bytes are not those that were written: every ``parts``-th, from ``part`` on.
    Raises OSError: a file is missing, or cannot be read, however often it is tried."""
    manifest = read_manifest(folder)
    return [
        name
        for name in sorted(manifest.files)[part::parts]
        if patiently(lambda name=name: hash_file(folder / name)) != manifest.files[name][1]
    ]


def read_manifest(folder: Path) -> Manifest:
    """Of a checkpoint. Raises ValueError: none, or not one; OSError: not to be read for now."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"it has no {MANIFEST}: it was never finished, or another program's")
    text = patiently((folder / MANIFEST).read_bytes)
    try:
        record = json.loads(text)
        files = {name: (int(size), str(sha)) for name, (size, sha) in record["files"].items()}
        manifest = Manifest(int(record["step"]), files, dict(record["about"]))
        version = record["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged ({error!r})") from error
    outside = any(Path(n).is_absolute() or ".." in Path(n).parts for n in files)
    cases = {
        f"it has format {version}, this version reads {FORMAT}": version != FORMAT,
        f"its {MANIFEST} lists no files, or some outside of it": not files or outside,
    }
    refuse(cases)
    return manifest


def _names(folder: Path) -> list[str]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p.relative_to(folder).as_posix() for p in paths if p.name != MANIFEST)


# ---- durable writes ----


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace a file's text at once: a reader, or a crash, sees the old text or the new."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
