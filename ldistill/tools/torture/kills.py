"""kill -9 at random moments, again and again, until the run is done all the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from ldistill.checkpoint.folder import WRITING, survey
from ldistill.common.run_files import METRICS
from ldistill.tools.torture.bench import Bench, Row
from ldistill.tools.torture.history import History, last_step
from ldistill.tools.torture.processes import Ranks

_SAID = "going on from "


def torture(
    bench: Bench, kills: int, seed: int = 0, advance: Callable[[str], None] = lambda text: None
) -> Row:
    """Kill a run ``kills`` times, restart it each time, and compare it with the undisturbed one.

    Each kill draws a victim (one rank or all) and a moment: while a step is running, while a
    checkpoint is being written, or while the run is still starting. A run that is through before
    its kill comes is compared, too, and another takes its place.

    Args:
        bench: where; its ``steps`` must leave room for the kills.
        kills: how many.
        seed: of the random moments.
        advance: told after each kill what happened.
    """
    expected = bench.undisturbed()
    run, rng = bench.fresh("killed"), random.Random(seed)
    done: list[dict[str, object]] = []
    runs = 1
    while len(done) < kills and runs <= kills + 1:
        stale = _inode(run)
        with bench.start(run) as ranks:
            record = _kill(ranks, run, rng, bench.steps, kills - len(done), stale)
            code = ranks.finish(bench.timeout) if record is None else ranks.finish(grace=0)
            said = ranks.output()
        if record is not None:
            done.append(record | {"went on from": _resumed(said)})
            advance(f"kill {len(done)} of {kills}: {done[-1]}")
        elif code:
            return _row(kills, f"ended with {code}:\n{said[-2000:]}", False, done)
        elif difference := _difference(expected, History.of(run)):
            return _row(kills, difference, False, done)
        else:
            run, runs = bench.fresh("killed"), runs + 1
    difference = _difference(expected, bench.complete(run))
    missing = f"only {len(done)} of {kills} kills hit before the end; " if len(done) < kills else ""
    text = missing + (difference or f"same losses and samples after {len(done)} kills")
    return _row(kills, text, not difference and not missing, done)


def _difference(expected: History, history: History) -> str | None:
    return expected.difference(history) or _twice(history)


def _row(kills: int, outcome: str, passed: bool, done: list[dict[str, object]]) -> Row:
    expected = "losses and samples of the undisturbed run, bit for bit"
    return Row(f"kill -9, {kills} times at random", expected, outcome, passed, {"kills": done})


def _kill(
    ranks: Ranks, run: Path, rng: random.Random, steps: int, left: int, stale: int | None
) -> dict[str, object] | None:
    """Kill at a random moment; None when the run ended before it came.

    ``stale`` is the inode of the metrics before this start, which writes them anew.
    """
    moment = rng.choices(("step", "writing", "starting"), (45, 45, 10))[0]
    if moment == "starting":
        ranks.wait_for(lambda: False, timeout=rng.uniform(0, 5))
    else:
        # So far ahead that the kills to come find steps left to hit.
        begin = max((f.step for f in survey(run) if f.problem is None), default=0)
        at = min(steps - 1, begin + rng.randint(1, max(1, 2 * (steps - begin) // (left + 1))))
        if not ranks.wait_for(lambda: _inode(run) != stale and last_step(run) >= at):
            return None
        if moment == "writing" and not ranks.wait_for(lambda: any((run / WRITING).glob("*"))):
            return None
        time.sleep(rng.uniform(0, 0.2))
    if not ranks.alive():
        return None
    victim = rng.choice([None, *range(ranks.count)])
    ranks.kill(victim)
    who = "all ranks" if victim is None else f"rank {victim}"
    return {"moment": moment, "killed": who, "after step": last_step(run)}


def _inode(run: Path) -> int | None:
    path = run / METRICS
    return path.stat().st_ino if path.exists() else None


def _resumed(output: str) -> str | None:
    """Which checkpoint this start went on from, as it said."""
    found = [line for line in output.splitlines() if line.startswith(_SAID)]
    return Path(found[0].removeprefix(_SAID).rstrip(".")).name if found else None


def _twice(history: History) -> str | None:
    """A sample that came again before every other had come once."""
    seen: set[str] = set()
    everything = {name for packs in history.samples.values() for pack in packs for name in pack}
    for step, packs in history.samples.items():
        for name in (name for pack in packs for name in pack):
            if name in seen:
                return f"{name} came twice by step {step}"
            seen.add(name)
            if seen == everything:
                return None
    return None
