"""Disks that fill, shards that break, ranks that have nothing to do: one function a fault.

Each does it to a real run and returns a row: either the run did what the undisturbed one did, or
it ended by itself, at once, with a sentence, and went on to the same losses and samples once the
cause was mended.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ldistill.checkpoint.folder import WRITING, survey
from ldistill.common.errors import ERROR_EXIT_CODE, TRANSIENT_EXIT_CODE
from ldistill.common.run_files import METRICS
from ldistill.data.index import ShardIndex
from ldistill.tools.torture.bench import Bench, Row
from ldistill.tools.torture.history import History
from ldistill.tools.torture.processes import TIMED_OUT, Ranks
from ldistill.tools.torture.rank import FIRED, Fault, release
from ldistill.tools.torture.world import HARDLY_DISTILLING, TEXTUAL
from ldistill.training.metrics import read_metrics

_SAME = "as if undisturbed"
_THEN = "a sentence; then, mended, as if undisturbed"
# fp32 sums in another order on another number of ranks or ZeRO stage.
TOLERANCE = 1e-5


def _ended(
    bench: Bench,
    run: Path,
    needle: str,
    *,
    under_way: Callable[[Ranks], object] | None = None,
    step: int = 4,
    alone: bool = True,
    **options: Any,
) -> str | None:
    """Start a run that must end by itself with a sentence; what was wrong with its end.

    Args:
        bench: where.
        run: folder of the run.
        needle: part of the sentence.
        under_way: done to the run while it waits, alive, after ``step`` and its first checkpoint.
        step: where it waits; without data workers, at once after it.
        alone: no rank may say more than a sentence.
        options: of the start.

    Raises:
        RuntimeError: the run ended before it could wait.
    """
    hold = Fault("hold", step, run)
    with bench.start(run, **({"fault": hold} if under_way else {}), **options) as ranks:
        if under_way is not None:
            if not ranks.wait_for(lambda: FIRED in ranks.output() and _kept(run), bench.timeout):
                raise RuntimeError(f"{run.name} was not held:\n{ranks.output()[-3000:]}")
            under_way(ranks)
            release(hold)
        code, said = ranks.finish(bench.timeout), ranks.output()
    return _judge(code, said, needle, alone)


def _kept(run: Path) -> bool:
    return any(folder.problem is None for folder in survey(run))


def _judge(code: int, said: str, needle: str, alone: bool) -> str | None:
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    told = (ERROR_EXIT_CODE, TRANSIENT_EXIT_CODE)
    if code in (0, TIMED_OUT) or (alone and code not in told):
        return f"exit status {code}, not that of an error with a sentence:\n{said[-1500:]}"
    if not any(needle in line for line in errors):
        return f"no sentence with {needle!r}: {errors or said[-1500:]}"
    if alone and "Traceback" in said:
        return "a traceback beside the sentence"
    return None


def _same(expected: History, history: History, tolerance: float = 0.0) -> tuple[str, bool]:
    difference = expected.difference(history, tolerance)
    return difference or "same losses and samples", difference is None


# ---- disks ----


def full_disk(bench: Bench) -> Row:
    """The disk fills up after the first checkpoint; later there is room again."""
    expected = bench.undisturbed()
    run = bench.fresh("full_disk")
    with _small_disk(run) as small:
        if not small:
            return _limited_files(bench, run, expected)
        filler = run / "filler"
        problem = _ended(bench, run, "could not be written", under_way=lambda ranks: _fill(filler))
        problem = problem or _left(run)
        filler.unlink(missing_ok=True)
        if problem is None:
            problem, passed = _same(expected, bench.complete(run))
        else:
            passed = False
    return Row("disk full while saving (tmpfs)", _THEN, problem, passed)


def _limited_files(bench: Bench, run: Path, expected: History) -> Row:
    """Where no disk may be mounted: files that may not grow (RLIMIT_FSIZE)."""
    problem = _ended(bench, run, "could not be written", fault=Fault("file_size", 200_000))
    outcome, passed = (problem, False) if problem else _same(expected, bench.complete(run))
    return Row("disk full while saving (file size limit)", _THEN, outcome, passed)


def _left(run: Path) -> str | None:
    if any((run / WRITING).glob("*")):
        return "a half-written checkpoint was left"
    return None if survey(run) else "no checkpoint was kept"


@contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A disk of 64 MiB at ``folder``, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def _fill(path: Path) -> None:
    """Leave room for metrics, not for a checkpoint."""
    for room in range(300_000, 1_000_000, 100_000):
        free = shutil.disk_usage(path.parent).free
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - room))
            return
        except OSError as error:  # not all that is free is there for a file's contents
            if error.errno != errno.ENOSPC:
                raise
    raise RuntimeError(f"{path} could not be filled")


# ---- shards ----


def truncated_shard(bench: Bench) -> Row:
    """A shard lacks its end before the run starts."""
    return _broken_at_start(bench, "truncated", lambda tar: os.truncate(tar, 700))


def missing_shard(bench: Bench) -> Row:
    """A shard is not there when the run starts."""
    return _broken_at_start(bench, "missing", Path.unlink)


def _broken_at_start(bench: Bench, word: str, spoil: Callable[[Path], None]) -> Row:
    shards = _copy(bench, f"shards_{word}")
    tar = sorted(shards.glob("*/*.tar"))[-1]
    spoil(tar)
    problem = _ended(bench, bench.fresh(f"{word}_shard"), tar.name, shards=shards)
    outcome = problem or "ended before the first step, naming the shard"
    return Row(f"shard {word} at the start", "a sentence", outcome, problem is None)


def flipped_bit(bench: Bench) -> Row:
    """One bit of every sample of a shard is wrong; sizes are right."""

    def spoil(tar: Path) -> None:
        data = bytearray(tar.read_bytes())
        for place in range(600, len(data) - 1024, 512):
            data[place] ^= 1
        tar.write_bytes(bytes(data))

    return _broken_midway(bench, "bits flipped in a shard", "checksum", spoil, spoil_first=True)


def vanished_shard(bench: Bench) -> Row:
    """A shard vanishes while the run goes on."""
    return _broken_midway(bench, "shard vanishes during the run", "unreadable", Path.unlink)


def cut_shard(bench: Bench) -> Row:
    """A shard is cut short while the run goes on."""
    cut = "shard truncated during the run"
    return _broken_midway(bench, cut, "truncated shard", lambda tar: os.truncate(tar, 700))


def _broken_midway(
    bench: Bench, title: str, needle: str, spoil: Callable[[Path], None], spoil_first: bool = False
) -> Row:
    """Spoil all shards of a source under a run, see it end, mend them, see it go on."""
    expected = bench.undisturbed()
    name = title.replace(" ", "_")
    shards, run = _copy(bench, f"shards_{name}"), bench.fresh(name)
    tars = sorted(shards.glob("docvqa/*.tar"))
    if spoil_first:
        tars = tars[-1:]
        spoil(tars[0])
        problem = _ended(bench, run, needle, shards=shards)
    else:
        under_way = partial(_spoil_all, tars, spoil)
        problem = _ended(bench, run, needle, under_way=under_way, shards=shards)
    for tar in tars:
        shutil.copyfile(bench.shards() / tar.relative_to(shards), tar)
    if problem is not None:
        return Row(title, _THEN, problem, False)
    outcome, passed = _same(expected, bench.complete(run, shards=shards))
    return Row(title, _THEN, outcome, passed)


def _spoil_all(tars: list[Path], spoil: Callable[[Path], None], ranks: Ranks) -> None:
    for tar in tars:
        spoil(tar)


def _copy(bench: Bench, name: str) -> Path:
    folder = bench.root / name
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(bench.shards(), folder))


def slow_reads(bench: Bench) -> Row:
    """Every read takes 50 ms longer."""
    return _unharmed(bench, "slow reads", Fault("slow", 0.05))


def failing_reads(bench: Bench) -> Row:
    """One sample in five fails once with an I/O error before it can be read."""
    return _unharmed(bench, "reads that fail once", Fault("flaky", 1))


def _unharmed(bench: Bench, title: str, fault: Fault) -> Row:
    expected = bench.undisturbed()
    history = bench.complete(bench.fresh(title.replace(" ", "_")), fault=fault)
    return Row(title, _SAME, *_same(expected, history))


def killed_worker(bench: Bench) -> Row:
    """A data worker is killed, as by a machine short of memory."""
    expected, run = bench.undisturbed(), bench.fresh("killed_worker")

    def kill(ranks: Ranks) -> None:
        [worker] = ranks.children(0)
        os.kill(worker, signal.SIGKILL)

    # Workers are some steps ahead of what is logged. PyTorch may tell of the death in the midst of
    # a collective, which then ends on the other rank with a traceback.
    problem = _ended(
        bench,
        run,
        "worker",
        under_way=kill,
        step=1,
        alone=False,
        dataloader_num_workers=1,
    )
    outcome, passed = (problem, False) if problem else _same(expected, bench.complete(run))
    return Row("a data worker is killed", _THEN, outcome, passed)


def dead_storage(bench: Bench) -> Row:
    """Reads fail for good in mid-run; later they work again."""
    expected, run = bench.undisturbed(), bench.fresh("dead_storage")
    problem = _ended(bench, run, "unreadable", fault=Fault("broken"))
    outcome, passed = (problem, False) if problem else _same(expected, bench.complete(run))
    return Row("reads that fail for good", _THEN, outcome, passed)


# ---- ranks with nothing to do ----


def text_only_rank(bench: Bench) -> Row:
    """Under ZeRO-3 some ranks have pictures and some have none."""
    shards = bench.shards("shards_textual", TEXTUAL)
    options = {"shards": shards, "packing": False, "per_device_train_batch_size": 1}
    expected = bench.undisturbed("textual_alone", ranks=1, **options)
    history = bench.complete(bench.fresh("textual"), stage=3, **options)
    outcome, passed = _same(expected, history, TOLERANCE)
    uneven = _uneven_steps(history, ShardIndex.load(shards), bench.ranks)
    if passed and not uneven:
        outcome, passed = "no step had a rank without pictures: more steps are needed", False
    details = {"steps with pictures on some ranks only": uneven}
    return Row(
        "a rank with text alone (ZeRO-3)", "losses of one rank alone", outcome, passed, details
    )


def _uneven_steps(history: History, index: ShardIndex, ranks: int) -> int:
    names = (index.locate(number)[2] for number in range(len(index)))
    tiles = dict(zip(names, index.column("tiles")))
    uneven = 0
    for packs in history.samples.values():
        for turn in zip(*[iter(packs)] * ranks):
            pictures = [sum(tiles[name] for name in pack) > 0 for pack in turn]
            uneven += any(pictures) and not all(pictures)
    return uneven


def nothing_distils(bench: Bench) -> Row:
    """Under ZeRO-3, with the teacher sharded too, many steps have nothing to teach."""
    shards = bench.shards("shards_hardly", HARDLY_DISTILLING)
    options = {"shards": shards, "packing": False, "per_device_train_batch_size": 1}
    expected = bench.undisturbed("hardly_alone", ranks=1, **options)
    run = bench.fresh("hardly")
    history = bench.complete(run, stage=3, **options)
    outcome, passed = _same(expected, history, TOLERANCE)
    rows = [r["teacher_rows"] for r in read_metrics(run / METRICS)]
    idle = sum(r == 0 for r in rows)
    if passed and not 0 < idle < len(rows):
        outcome, passed = f"{idle} of {len(rows)} steps had nothing to teach: not the case", False
    details = {"steps without teacher rows": idle, "steps": len(rows)}
    title = "many steps without distilling rows (ZeRO-3 teacher)"
    return Row(title, "losses of one rank alone", outcome, passed, details)


NEEDS_SEVERAL_RANKS = frozenset({"text-only-rank"})
FAULTS: dict[str, Callable[[Bench], Row]] = {
    "full-disk": full_disk,
    "truncated-shard": truncated_shard,
    "missing-shard": missing_shard,
    "flipped-bit": flipped_bit,
    "vanished-shard": vanished_shard,
    "cut-shard": cut_shard,
    "slow-reads": slow_reads,
    "failing-reads": failing_reads,
    "dead-storage": dead_storage,
    "killed-worker": killed_worker,
    "text-only-rank": text_only_rank,
    "nothing-distils": nothing_distils,
}
