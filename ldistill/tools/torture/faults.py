"""Ranks that are killed, disks that fill, shards that break, ranks that have nothing to do.

Each fault is done to a real run: either the run does what the undisturbed one did, or it ends by
itself, at once, with a sentence, and goes on to the same losses and samples once it is mended.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ldistill.checkpoint.folder import WRITING, survey
from ldistill.checkpoint.logs import read_metrics
from ldistill.common.errors import ERROR_EXIT_CODE, TRANSIENT_EXIT_CODE
from ldistill.common.run_files import METRICS
from ldistill.data.index import ShardIndex
from ldistill.tools.torture.bench import TIMED_OUT, Bench, History, Ranks, Verdict, check, judge
from ldistill.tools.torture.rank import FIRED, Fault, last_step

# fp32 sums in another order on another number of ranks or ZeRO stage.
TOLERANCE = 1e-5


def kills(
    bench: Bench, count: int, seed: int = 0, tell: Callable[[str], None] = lambda text: None
) -> Verdict:
    """kill -9 a run ``count`` times at random moments, restart it each time.

    Each kill draws a victim (one rank or all) and a moment: while a step is running, while a
    checkpoint is being written, or while the run is still starting. A run that is through before
    its kill comes is compared, too, and another takes its place. ``tell`` hears of each kill.
    """
    expected, rng = bench.undisturbed(), random.Random(seed)
    done: list[dict[str, Any]] = []

    def attempt() -> str:
        run, runs = bench.fresh("killed"), 1
        while len(done) < count and runs <= count + 1:
            stale = _inode(run)
            with bench.start(run) as ranks:
                killed = _kill(ranks, bench, run, rng, count - len(done), stale)
                code = ranks.finish(grace=0) if killed else ranks.finish(bench.timeout)
                said = ranks.output()
            if killed:
                done.append(killed | {"went on from": _resumed(said)})
                tell(f"kill {len(done)} of {count}: {done[-1]}")
            else:
                check(code == 0, f"ended with {code}:\n{said[-2000:]}")
                expected.require(History.of(run))
                run, runs = bench.fresh("killed"), runs + 1
        outcome = f"{expected.require(bench.complete(run))} after {len(done)} kills"
        hits = f"only {len(done)} of {count} kills hit before the end; {outcome}"
        check(len(done) == count, hits)
        return outcome

    wanted = "losses and samples of the undisturbed run, bit for bit"
    return judge(f"kill -9, {count} times at random", wanted, attempt, {"kills": done})


def _kill(
    ranks: Ranks, bench: Bench, run: Path, rng: random.Random, left: int, stale: int | None
) -> dict[str, Any] | None:
    """Kill at a random moment; None when the run ended before it came.

    ``stale`` is the inode of the metrics before this start, which writes them anew.
    """
    moment = rng.choices(("step", "writing", "starting"), (45, 45, 10))[0]
    if moment == "starting":
        ranks.wait_for(lambda: False, timeout=rng.uniform(0, 5))
    else:
        # So far ahead that the kills to come find steps left to hit.
        begin = max((f.step for f in survey(run) if f.problem is None), default=0)
        ahead = rng.randint(1, max(1, 2 * (bench.steps - begin) // (left + 1)))
        at = min(bench.steps - 1, begin + ahead)
        if not ranks.wait_for(lambda: _inode(run) != stale and last_step(run) >= at):
            return None
        if moment == "writing" and not ranks.wait_for(lambda: any((run / WRITING).glob("*"))):
            return None
        time.sleep(rng.uniform(0, 0.2))
    if not ranks.alive():
        return None
    victim = rng.choice([None, *range(bench.ranks)])
    ranks.kill(victim)
    who = "all ranks" if victim is None else f"rank {victim}"
    return {"moment": moment, "killed": who, "after step": last_step(run)}


def _inode(run: Path) -> int | None:
    path = run / METRICS
    return path.stat().st_ino if path.exists() else None


def _resumed(said: str, start: str = "going on from ") -> str | None:
    """Which checkpoint a start went on from, as it said."""
    found = [line for line in said.splitlines() if line.startswith(start)]
    return Path(found[0].removeprefix(start).rstrip(".")).name if found else None


# ---- how a run takes a fault ----


def _unharmed(title: str, fault: Fault, bench: Bench) -> Verdict:
    """It does not even show it."""
    expected, run = bench.undisturbed(), bench.fresh(title.replace(" ", "_"))
    attempt = partial(bench.complete, run, fault=fault)
    return judge(title, "as if undisturbed", lambda: expected.require(attempt()))


def _recovers(
    title: str,
    needle: str,
    bench: Bench,
    run: Path | None = None,
    *,
    mend: Callable[[], object] = lambda: None,
    shards: Path | None = None,
    **how: Any,
) -> Verdict:
    """It ends with a sentence (see `_end`); once the fault is mended, it goes on."""
    expected, run = bench.undisturbed(), run or bench.fresh(title.replace(" ", "_"))

    def attempt() -> str:
        _end(bench, run, needle, shards=shards, **how)
        mend()
        return expected.require(bench.complete(run, shards=shards))

    return judge(title, "a sentence; then, mended, as if undisturbed", attempt)


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
    (without data workers, at once after that step). ``alone``: no rank may say more than a
    sentence. ``options`` are of the start.
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
    found = any(needle in line for line in errors)
    check(found, f"no sentence with {needle!r}: {errors or said[-1500:]}")
    check(not alone or "Traceback" not in said, "a traceback beside the sentence")


# ---- disks ----


def full_disk(bench: Bench) -> Verdict:
    """The disk fills up after the first checkpoint; later there is room again."""
    run, title = bench.fresh("full_disk"), "disk full while saving"
    recovers = partial(_recovers, needle="could not be written", bench=bench, run=run)
    filler = run / "filler"
    with _small_disk(run) as small:
        if not small:  # files that may not grow instead
            return recovers(f"{title} (file size limit)", fault=Fault("file_size", 200_000))

        def fill(ranks: Ranks) -> None:  # but for metrics: a megabyte holds no checkpoint
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(run).free - 1_000_000)

        def mend() -> None:
            filler.unlink()
            check(not any((run / WRITING).glob("*")), "a half-written checkpoint was left")
            check(bool(survey(run)), "no checkpoint was kept")

        return recovers(f"{title} (tmpfs)", under_way=fill, mend=mend)


@contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A disk of 64 MiB at ``folder``, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


# ---- shards ----


def _cut(tar: Path) -> None:
    os.truncate(tar, 700)


def _flip(tar: Path) -> None:
    """One bit of every sample is wrong; sizes are right."""
    data = bytearray(tar.read_bytes())
    for place in range(600, len(data) - 1024, 512):
        data[place] ^= 1
    tar.write_bytes(bytes(data))


def _broken_at_start(word: str, spoil: Callable[[Path], object], bench: Bench) -> Verdict:
    """A shard that the run does not even start with."""
    shards = bench.root / f"shards_{word}"
    shutil.copytree(bench.shards(), shards)
    tar = sorted(shards.glob("*/*.tar"))[-1]
    spoil(tar)

    def attempt() -> str:
        _end(bench, bench.fresh(f"{word}_shard"), tar.name, shards=shards)
        return "ended before the first step, naming the shard"

    return judge(f"shard {word} at the start", "a sentence", attempt)


def _broken_midway(
    title: str, needle: str, spoil: Callable[[Path], object], bench: Bench
) -> Verdict:
    """Spoil all shards of a source under a run, see it end, mend them, see it go on."""
    shards = bench.root / f"shards_{title.replace(' ', '_')}"
    shutil.copytree(bench.shards(), shards)
    tars = sorted(shards.glob("docvqa/*.tar"))

    def spoil_all(ranks: Ranks) -> None:
        for tar in tars:
            spoil(tar)

    def mend() -> None:
        for tar in tars:
            shutil.copyfile(bench.shards() / tar.relative_to(shards), tar)

    return _recovers(title, needle, bench, under_way=spoil_all, mend=mend, shards=shards)


def killed_worker(bench: Bench) -> Verdict:
    """A data worker is killed, as by a machine short of memory."""

    def kill(ranks: Ranks) -> None:
        [worker] = ranks.children(0)
        os.kill(worker, signal.SIGKILL)

    # Workers are some steps ahead of what is logged. PyTorch may tell of the death in the midst of
    # a collective, which then ends on the other rank with a traceback.
    options = {"under_way": kill, "step": 1, "alone": False, "dataloader_num_workers": 1}
    return _recovers("a data worker is killed", "worker", bench, **options)


# ---- ranks with nothing to do ----


def _as_alone(
    title: str,
    mixture: dict[str, Any],
    count: Callable[[Bench, Path, Path], dict[str, int]],
    bench: Bench,
) -> Verdict:
    """Several ranks under ZeRO-3 do what one rank alone does.

    ``count`` (bench, run, shards) counts how often the fault was there; RuntimeError for never.
    """
    name = title.split(" (")[0].replace(" ", "_")
    shards, run = bench.shards(f"shards_{name}", **mixture), bench.fresh(name)
    options = {"shards": shards, "packing": False, "per_device_train_batch_size": 1}
    expected = bench.undisturbed(f"{name}_alone", ranks=1, **options)
    details: dict[str, int] = {}

    def attempt() -> str:
        outcome = expected.require(bench.complete(run, stage=3, **options), TOLERANCE)
        details.update(count(bench, run, shards))
        return outcome

    return judge(title, "losses of one rank alone", attempt, details)


def _uneven_steps(bench: Bench, run: Path, shards: Path) -> dict[str, int]:
    index = ShardIndex.load(shards)
    tiles = dict(zip((index.locate(n)[2] for n in range(len(index))), index.column("tiles")))
    uneven = 0
    for packs in History.of(run).samples.values():
        for turn in zip(*[iter(packs)] * bench.ranks):
            pictures = [sum(tiles[name] for name in pack) > 0 for pack in turn]
            uneven += any(pictures) and not all(pictures)
    check(uneven > 0, "no step had a rank without pictures: more steps are needed")
    return {"steps with pictures on some ranks only": uneven}


def _idle_steps(bench: Bench, run: Path, shards: Path) -> dict[str, int]:
    rows = [record["teacher_rows"] for record in read_metrics(run / METRICS)]
    idle = sum(r == 0 for r in rows)
    check(0 < idle < len(rows), f"{idle} of {len(rows)} steps had nothing to teach: not the case")
    return {"steps without teacher rows": idle, "steps": len(rows)}


TEXT_ONLY = "text-only-rank"
TEXTUAL = {"documents": {"docvqa": 16, "vqav2": 32}, "text_only": 0.8}
HARDLY_DISTILLING = {"documents": {"docvqa": 56, "vqav2": 8}}
FAULTS: dict[str, Callable[[Bench], Verdict]] = {
    "full-disk": full_disk,
    "truncated-shard": partial(_broken_at_start, "truncated", _cut),
    "missing-shard": partial(_broken_at_start, "missing", Path.unlink),
    "flipped-bit": partial(_broken_midway, "bits flipped in a shard", "checksum", _flip),
    "vanished-shard": partial(
        _broken_midway, "shard vanishes during the run", "unreadable", Path.unlink
    ),
    "cut-shard": partial(_broken_midway, "shard truncated during the run", "truncated shard", _cut),
    "slow-reads": partial(_unharmed, "slow reads", Fault("slow", 0.05)),
    "failing-reads": partial(_unharmed, "reads that fail once", Fault("flaky", 1)),
    "dead-storage": partial(
        _recovers, "reads that fail for good", "unreadable", fault=Fault("broken")
    ),
    "killed-worker": killed_worker,
    TEXT_ONLY: partial(_as_alone, "a rank with text alone (ZeRO-3)", TEXTUAL, _uneven_steps),
    "nothing-distils": partial(
        _as_alone,
        "many steps without distilling rows (ZeRO-3 teacher)",
        HARDLY_DISTILLING,
        _idle_steps,
    ),
}


def choose(asked: Sequence[str], ranks: int) -> list[Callable[[Bench], Verdict]]:
    """The faults asked for, by default all that so many ranks can have."""
    possible = [name for name in FAULTS if ranks > 1 or name != TEXT_ONLY]
    if unknown := sorted(set(asked) - {*possible, "none"}):
        hint = f" ({TEXT_ONLY} takes --ranks 2 or more)" if ranks == 1 else ""
        known = ", ".join(possible)
        raise ValueError(f"no fault {', '.join(unknown)}; there are {known} and none{hint}.")
    return [FAULTS[name] for name in dict.fromkeys(asked or possible) if name != "none"]
