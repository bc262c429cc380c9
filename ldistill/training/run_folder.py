"""The folder of a run: what it holds, and when it may be written to.

recipe.yaml        the resolved recipe        environment.json   versions and git state
run.json           the run's id, which its checkpoints carry
samples/           what each step trained on, with --log_samples
order.json         documents, packs, drops of an epoch
origins.json       pair and data by name and licence, for the model card
metrics.jsonl      one record a logged step   loss_curves.png    CE and KD by category
checkpoint-N/      to resume from             student/           the exported student
evaluation.json    before and after           logs of --report_to, if any
stopped.json       stopped on request at ...  wandb_run_id       of every start of this run
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import uuid
from contextlib import suppress
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from ldistill.checkpoint.folder import ADAPTED, RETIRED, WRITING, complete, survey, write_durably
from ldistill.common import run_files
from ldistill.common.run_files import RECIPE, run_id

# A run is resumed only with the recipe it began with; how long, how fast and how often may change.
_IDENTITY = """
student teacher sources mix validation max_length packing on_long shuffle_window tiling
distil alpha temperature combine t_squared kl gate kv_scope kv_grad
train lora_rank lora_alpha seed data_seed optim
"""
_PACKAGES = "ldistill torch deepspeed transformers triton accelerate datasets webdataset"


def default_folder(recipe: str) -> Path:
    """``runs/<recipe>``, or with a number behind it when that is taken."""
    folder = Path("runs", Path(recipe).stem)
    others = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], others) if not path.exists())


def newest_folder(recipe: str, root: Path = Path("runs")) -> Path | None:
    """The folder among those of :func:`default_folder` whose run was started last."""
    name = Path(recipe).stem
    named = re.compile(re.escape(name) + r"(-\d+)?")
    runs = [path for path in root.glob(f"*/{RECIPE}") if named.fullmatch(path.parent.name)]
    own = [path for path in runs if Path(_read(path).get("recipe") or "run").stem == name]
    newest = max(own, key=lambda path: path.stat().st_mtime, default=None)
    return newest and newest.parent


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def claim(
    folder: Path,
    recipe: dict[str, Any],
    resume: Path | None,
    overwrite: bool,
    restart: bool = False,
) -> bool:
    """Make the folder this run's; whether a run begins here, rather than goes on or begins again.

    With ``overwrite`` a run that lies there is renamed, ``FOLDER.old-1``; with ``restart`` one of
    the same recipe, without a checkpoint yet, begins again; ``resume`` is a checkpoint.

    Raises:
        ValueError: it holds another run, or the run to resume began with another recipe.
    """
    old = folder / RECIPE
    there, aside = old.exists(), None
    if resume is not None:
        _check_same_run(resume.parent / RECIPE, recipe)
        if overwrite and folder.resolve() in resume.resolve().parents:
            raise ValueError(
                f"--overwrite would rename {resume}, from which the run is to go on: leave one of "
                "the two flags out."
            )
    if there and overwrite:
        aside = _set_aside(folder)
    elif there and not (resume and folder.samefile(resume.parent)):
        # What has no checkpoint yet may be the same run, started again.
        kept = survey(folder) or (folder / run_files.STUDENT).exists()
        if not restart and (resume is None or kept):
            which = f", which is not the one of {resume}" if resume else ""
            raise ValueError(
                f"{folder} already holds a run{which}: continue it with --resume_from_checkpoint "
                "auto, begin anew with --overwrite, or choose another --output_dir."
            )
        _check_same_run(old, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if run_id(folder) is None:
            replaced = {"replaced": str(aside)} if aside else {}
            write_durably(folder / run_files.RUN, json.dumps({"id": uuid.uuid4().hex} | replaced))
        write_durably(old, yaml.safe_dump(plain(recipe), sort_keys=False))
        write_durably(folder / run_files.ENVIRONMENT, json.dumps(environment(), indent=2))
    except OSError:
        if aside:
            _put_back(folder, aside)
        raise
    return overwrite or not there


def _set_aside(folder: Path) -> Path:
    """Rename a folder, or what it links to, and leave an empty one; where the old one is now."""
    real = folder.resolve()
    asides = (real.with_name(f"{real.name}.old-{number}") for number in count(1))
    aside = next(path for path in asides if not path.exists())
    real.rename(aside)
    real.mkdir()
    if (aside / run_files.JOB).exists():  # by the script that starts this run
        shutil.copyfile(aside / run_files.JOB, real / run_files.JOB)
    print(f"the run that was in {folder} is now in {aside}.", flush=True)
    return aside


def _put_back(folder: Path, aside: Path) -> None:
    """Undo :func:`_set_aside`."""
    shutil.rmtree(folder.resolve())
    aside.rename(folder.resolve())


def release(folder: Path, run: str) -> None:
    """Undo :func:`claim` for a run of this id that began and failed before anything came of it.

    A folder in which anything was trained, or that is another run's by now, stays as it is. Raises
    nothing: there is an error to tell already.
    """
    with suppress(OSError, ValueError):
        record = run_files.read_json(folder / run_files.RUN)
        metrics = folder / run_files.METRICS
        trained = metrics.exists() and metrics.stat().st_size
        if record.get("id") != run or survey(folder) or trained:
            return
        if "replaced" in record:
            _put_back(folder, Path(record["replaced"]))
            return
        for name in run_files.OF_A_START:
            (folder / name).unlink(missing_ok=True)
        for name in (run_files.SAMPLES, WRITING):
            shutil.rmtree(folder / name, ignore_errors=True)
        folder.rmdir()  # unless there was something in it before


def check_shared(folder: Path, expected: str | None) -> None:
    """Raise OSError where this rank's node does not see the run that rank 0 sees in the folder."""
    if run_id(folder) != expected:
        raise OSError(
            f"{folder} is not the folder that rank 0 sees: --output_dir must lie on a file system "
            "that all nodes share."
        )


def _check_same_run(path: Path, recipe: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {RECIPE}: not a run of this program.")
    old, new = _read(path), plain(recipe)
    differing = [
        f"{k}: then {old[k]!r}, now {new.get(k)!r}"
        for k in _IDENTITY.split()
        if k in old and old[k] != new.get(k)
    ]
    if differing:
        raise ValueError(
            f"{path.parent} is a run of another recipe; it can only go on as it began:\n  "
            + "\n  ".join(differing)
        )


def plain(values: Any) -> Any:
    """The same values in types that YAML and JSON have."""
    return json.loads(json.dumps(values, default=lambda value: str(getattr(value, "value", value))))


def environment() -> dict[str, Any]:
    """Versions of what computes, and the state of the source tree."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES.split())
    for name in versions:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    state = None
    with suppress(OSError, subprocess.CalledProcessError):
        state = {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    return {"python": platform.python_version(), "packages": versions, "git": state}


def check_disk(folder: Path, trained: int, total: int, checkpoints: int) -> None:
    """Raise OSError where so many checkpoints, the next one and the export will not fit beside what
    the run has written; `total` are the student's parameters, `trained` have an optimizer state."""
    # fp32 student, fp32 master weight and two moments, 16-bit weights
    each = 4 * total + 14 * trained
    needed = (checkpoints + 1) * each + 4 * total
    there = sum(min(_bytes(found.path), each) for found in complete(folder)[:checkpoints])
    there += min(_bytes(folder / run_files.STUDENT), 4 * total)
    # What a killed run left half done goes before the next checkpoint.
    there += sum(_bytes(folder / name) for name in (WRITING, RETIRED, ADAPTED))
    free = shutil.disk_usage(folder).free
    if free + there < needed:
        raise OSError(
            f"{folder} has {free / 2**30:.1f} GiB free; {checkpoints} checkpoints, the next one "
            f"and the exported student need about {(needed - there) / 2**30:.1f} GiB besides what "
            "the run has written. Make room, lower --save_total_limit, or choose another "
            "--output_dir."
        )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
