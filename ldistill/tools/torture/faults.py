"""Ranks that are killed, disks that fill, shards that break, ranks that have nothing to do.

Each fault is done to a real run: either the run does what the undisturbed one did, or it ends by
itself, at once, with a sentence, and goes on to the same losses and samples once it is mended.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from ldistill.checkpoint.folder import WRITING, survey
from ldistill.checkpoint.logs import read_metrics
from ldistill.common.errors import ERROR_EXIT_CODE, TRANSIENT_EXIT_CODE
from ldistill.common.run_files import METRICS
from ldistill.data.index import ShardIndex
from ldistill.tools.torture.bench import (
    FIRED,
    TIMED_OUT,
    Bench,
    Fault,
    History,
    Ranks,
    check,
    last_step,
)

TOLERANCE = 1e-5  # fp32 sums in another order on another number of ranks or ZeRO stage
Spoil = Callable[[Path], object]


class Trial(NamedTuple):
    """A fault that can be done to a run."""

    name: str  # of its option and its run's folder
    title: str
    expected: str
    attempt: Callable[[Bench, Path], str]  # the outcome on a new run; RuntimeError: it did not hold

    def __call__(self, bench: Bench) -> dict[str, Any]:
        """Try it: a row of the table, with what the attempt left in ``bench.details``."""
        row, bench.details = {"fault": self.title, "expected": self.expected}, {}
        try:
            row |= {"outcome": self.attempt(bench, bench.fresh(self.name)), "passed": True}
        except RuntimeError as error:
            row |= {"outcome": str(error), "passed": False}
        return row | {"details": bench.details}


def choose(asked: Sequence[str], ranks: int) -> list[Trial]:
    """The faults asked for, by default all that so many ranks can have."""
    possible = [name for name in FAULTS if ranks > 1 or name != TEXT_ONLY]
    if unknown := sorted(set(asked) - {*possible, "none"}):
        hint = f" ({TEXT_ONLY} takes --ranks 2 or more)" if ranks == 1 else ""
        known = f"there are {', '.join(possible)} and none{hint}"
        raise ValueError(f"no fault {', '.join(unknown)}; {known}.")
    return [FAULTS[name] for name in dict.fromkeys(asked or possible) if name != "none"]


def kills(count: int, seed: int = 0, tell: Callable[[str], None] = lambda text: None) -> Trial:
    """kill -9 one rank or all ``count`` times at random moments (in a step, while a checkpoint is
    being written, at the start), restart each time; ``tell`` hears of it.

    A run that is through before its kill comes is compared, too, and another takes its place.
    """

    def attempt(bench: Bench, run: Path) -> str:
        expected, rng, runs = bench.undisturbed(), random.Random(seed), 1
        done = bench.details["kills"] = []
        while len(done) < count and runs <= count + 1:
            with bench.start(run) as ranks:
                killed = _kill(ranks, bench, run, rng, count - len(done))
                code = ranks.finish(grace=0) if killed else ranks.finish(bench.timeout)
            if killed:
                done.append(killed)
                tell(f"kill {len(done)} of {count}: {killed}")
            else:
                check(code == 0, f"ended with {code}:\n{ranks.output()[-2000:]}")
                expected.require(History.of(run))
                run, runs = bench.fresh(run.name), runs + 1
        same = f"{expected.require(bench.complete(run))} after {len(done)} kills"
        check(len(done) == count, f"only {len(done)} of {count} kills hit before the end; {same}")
        return same

    title = f"kill -9, {count} times at random"
    return Trial("killed", title, "losses and samples of the undisturbed run, bit for bit", attempt)


def _kill(
    ranks: Ranks, bench: Bench, run: Path, rng: random.Random, left: int
) -> dict[str, Any] | None:
    """Kill at a random moment; None when the run ended before it came."""
    metrics = run / METRICS

    def logged(step: int) -> bool:  # by this start, not the one before
        anew = metrics.exists() and metrics.stat().st_mtime > ranks.began
        return anew and last_step(run) >= step

    moment = rng.choices(("step", "writing", "starting"), (45, 45, 10))[0]
    if moment == "starting":
        ranks.wait_for(lambda: False, timeout=rng.uniform(0, 5))
    else:
        # So far ahead that the kills to come find steps left to hit.
        begin = max((f.step for f in survey(run) if f.problem is None), default=0)
        ahead = rng.randint(1, max(1, 2 * (bench.steps - begin) // (left + 1)))
        waits = [lambda: logged(min(bench.steps - 1, begin + ahead))]
        waits += [lambda: any((run / WRITING).glob("*"))] if moment == "writing" else []
        if not all(map(ranks.wait_for, waits)):
            return None
        time.sleep(rng.uniform(0, 0.2))
    if not ranks.alive():
        return None
    victim = rng.choice([None, *range(bench.ranks)])
    ranks.kill(victim)
    who = "all ranks" if victim is None else f"rank {victim}"
    return {"moment": moment, "killed": who, "after step": last_step(run)}


# ---- how a run takes a fault ----


def _unharmed(fault: Fault, bench: Bench, run: Path) -> str:
    """It does not even show it."""
    return bench.undisturbed().require(bench.complete(run, fault=fault))


def _recovers(
    needle: str, bench: Bench, run: Path, mend: Callable[[], object] | None = None, **how: Any
) -> str:
    """It ends with a sentence (see `_end`); once the fault is mended, it goes on."""
    expected = bench.undisturbed()
    _end(bench, run, needle, **how)
    if mend is not None:
        mend()
    return expected.require(bench.complete(run, shards=how.get("shards")))


def _end(
    bench: Bench,
    run: Path,
    needle: str,
    *,
    under_way: Callable[[Ranks], object] | None = None,
    step: int = 4,
    alone: bool = True,
    **options: Any,
) -> None:
    """A run must end by itself with a sentence that has ``needle`` in it; else RuntimeError.

    ``under_way`` is done to it while it waits, alive, after ``step`` and its first checkpoint
    (without data workers, at once after that step). ``alone``: no rank may say more.
    """
    hold = Fault("hold", step, run)
    with bench.start(run, **({"fault": hold} if under_way else {}), **options) as ranks:
        if under_way is not None:
            kept = lambda: any(folder.problem is None for folder in survey(run))  # noqa: E731
            held = ranks.wait_for(lambda: FIRED in ranks.output() and kept(), bench.timeout)
            check(held, f"{run.name} was not held:\n{ranks.output()[-3000:]}")
            under_way(ranks)
            hold.gate.touch()
        code, said = ranks.finish(bench.timeout), ranks.output()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    told = code in (ERROR_EXIT_CODE, TRANSIENT_EXIT_CODE)
    ended = told or (not alone and code not in (0, TIMED_OUT))
    check(ended, f"exit status {code}, not that of an error with a sentence:\n{said[-1500:]}")
    check(needle in "\n".join(errors), f"no sentence with {needle!r}: {errors or said[-1500:]}")
    check(not alone or "Traceback" not in said, "a traceback beside the sentence")


def _full_disk(bench: Bench, run: Path) -> str:
    """A disk of 64 MiB, where this user may mount one, fills up after the first checkpoint; later
    there is room again. Elsewhere files may not grow."""
    recovers, filler = partial(_recovers, "could not be written", bench, run), run / "filler"
    run.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(run)]
    small = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    if not small:
        return f"{recovers(fault=Fault('file_size', 200_000))} (file size limit)"

    def fill(ranks: Ranks) -> None:  # but for metrics: a megabyte holds no checkpoint
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(run).free - 1_000_000)

    def mend() -> None:
        filler.unlink()
        check(not any((run / WRITING).glob("*")), "a half-written checkpoint was left")
        check(survey(run), "no checkpoint was kept")

    try:
        return f"{recovers(under_way=fill, mend=mend)} (tmpfs)"
    finally:
        subprocess.run(["umount", "-l", str(run)], check=False)


def _cut(tar: Path) -> None:
    os.truncate(tar, 700)


def _flip(tar: Path) -> None:
    """One bit of every sample is wrong; sizes are right."""
    data = np.fromfile(tar, np.uint8)
    data[600:-1024:512] ^= 1
    data.tofile(tar)


def _at_start(spoil: Spoil, bench: Bench, run: Path) -> str:
    """A shard that the run does not even start with."""
    shards = shutil.copytree(bench.shards(), bench.root / f"shards-{run.name}")
    tar = max(shards.glob("*/*.tar"))
    spoil(tar)
    _end(bench, run, tar.name, shards=shards)
    return "ended before the first step, naming the shard"


def _midway(spoil: Spoil, needle: str, bench: Bench, run: Path) -> str:
    """Spoil all shards of a source under a run, see it end, mend them, see it go on."""
    shards = shutil.copytree(bench.shards(), bench.root / f"shards-{run.name}")
    mend = partial(shutil.copytree, bench.shards(), shards, dirs_exist_ok=True)

    def spoil_all(ranks: Ranks) -> None:
        for tar in shards.glob("docvqa/*.tar"):
            spoil(tar)

    return _recovers(needle, bench, run, mend, under_way=spoil_all, shards=shards)


def _killed_worker(bench: Bench, run: Path) -> str:
    def kill(ranks: Ranks) -> None:
        [worker] = psutil.Process(ranks.processes[0].pid).children()
        worker.kill()

    # Workers are some steps ahead of what is logged. PyTorch may tell of the death in the midst of
    # a collective, which then ends on the other rank with a traceback.
    how = {"under_way": kill, "step": 1, "alone": False}
    return _recovers("worker", bench, run, **how, dataloader_num_workers=1)


# ---- ranks with nothing to do ----


def _as_alone(
    count: Callable[[Bench, Path, Path], None], bench: Bench, run: Path, **mixture: Any
) -> str:
    """Several ranks under ZeRO-3 do what one rank alone does; ``count`` tells how often the fault
    was there, RuntimeError for never."""
    shards = bench.shards(f"shards-{run.name}", **mixture)
    options = {"shards": shards, "packing": False, "per_device_train_batch_size": 1}
    expected = bench.undisturbed(f"{run.name}-alone", ranks=1, **options)
    outcome = expected.require(bench.complete(run, stage=3, **options), TOLERANCE)
    count(bench, run, shards)
    return outcome


def _uneven_steps(bench: Bench, run: Path, shards: Path) -> None:
    index, uneven = ShardIndex.load(shards), 0
    tiles = dict(zip((index.locate(n)[2] for n in range(len(index))), index.column("tiles")))
    for packs in History.of(run).samples.values():
        for turn in zip(*[iter(packs)] * bench.ranks):
            uneven += len({any(tiles[name] for name in pack) for pack in turn}) > 1
    check(uneven > 0, "no step had a rank without pictures: more steps are needed")
    bench.details["steps with pictures on some ranks only"] = uneven


def _idle_steps(bench: Bench, run: Path, shards: Path) -> None:
    rows = [record["teacher_rows"] for record in read_metrics(run / METRICS)]
    idle, steps = rows.count(0), len(rows)
    check(0 < idle < steps, f"{idle} of {steps} steps had nothing to teach: not the case")
    bench.details |= {"steps without teacher rows": idle, "steps": steps}


TEXT_ONLY = "text-only-rank"
_SAME, _SAID = "as if undisturbed", "a sentence"
_MENDED, _ALONE = "a sentence; then, mended, as if undisturbed", "losses of one rank alone"
_bits_flipped = partial(_midway, _flip, "checksum")
_vanished = partial(_midway, Path.unlink, "unreadable")
_truncated = partial(_midway, _cut, "truncated shard")
_dead_storage = partial(_recovers, "unreadable", fault=Fault("broken"))
_textual = partial(_as_alone, _uneven_steps, documents={"docvqa": 16, "vqav2": 32}, text_only=0.8)
_idle = partial(_as_alone, _idle_steps, documents={"docvqa": 56, "vqav2": 8})
_RARE = "many steps without distilling rows (ZeRO-3 teacher)"
_TRIALS = (
    Trial("full-disk", "disk full while saving", _MENDED, _full_disk),
    Trial("truncated-shard", "shard truncated at the start", _SAID, partial(_at_start, _cut)),
    Trial("missing-shard", "shard missing at the start", _SAID, partial(_at_start, Path.unlink)),
    Trial("flipped-bit", "bits flipped in a shard", _MENDED, _bits_flipped),
    Trial("vanished-shard", "shard vanishes during the run", _MENDED, _vanished),
    Trial("cut-shard", "shard truncated during the run", _MENDED, _truncated),
    Trial("slow-reads", "slow reads", _SAME, partial(_unharmed, Fault("slow", 0.05))),
    Trial("failing-reads", "reads that fail once", _SAME, partial(_unharmed, Fault("flaky", 1))),
    Trial("dead-storage", "reads that fail for good", _MENDED, _dead_storage),
    Trial("killed-worker", "a data worker is killed", _MENDED, _killed_worker),
    Trial(TEXT_ONLY, "a rank with text alone (ZeRO-3)", _ALONE, _textual),
    Trial("nothing-distils", _RARE, _ALONE, _idle),
)
FAULTS = {trial.name: trial for trial in _TRIALS}
