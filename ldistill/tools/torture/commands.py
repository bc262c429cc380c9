"""`ldistill torture`: kill and starve real tiny runs, and say whether they came through."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ldistill.tools.torture.bench import Bench, Row


def torture(
    steps: Annotated[int, typer.Option(min=6, help="Optimizer steps of each run.")] = 12,
    kills: Annotated[int, typer.Option(min=0, help="kill -9 at so many random moments.")] = 3,
    ranks: Annotated[int, typer.Option(min=1, help="gloo ranks of each run, on the CPU.")] = 2,
    stage: Annotated[int, typer.Option(min=1, max=3, help="ZeRO stage.")] = 2,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="Of the other faults only this one; may be repeated; `none`: no other."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random moments.")] = 0,
    workdir: Annotated[
        Path | None, typer.Option(help="Empty folder to keep runs and logs in; default: none kept.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
) -> None:
    """Kill real tiny runs, fill their disk, break their shards: the losses must stay the same.

    Runs the embedded pair with DeepSpeed on CPU ranks. Exit status 1 when anything did not hold, 2
    when it could not be tried.
    """
    from rich.console import Console

    from ldistill.tools.torture.bench import Bench
    from ldistill.tools.torture.faults import FAULTS, NEEDS_SEVERAL_RANKS

    chosen = _choose(fault, FAULTS, NEEDS_SEVERAL_RANKS if ranks == 1 else ())
    root = workdir or Path(tempfile.mkdtemp(prefix="ldistill-torture-"))
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise ValueError(f"{root} is not empty: choose an empty folder.")
    console = Console()
    bench = Bench(root, ranks=ranks, steps=steps, stage=stage)
    began = time.monotonic()
    try:
        rows = _rows(bench, kills, seed, [FAULTS[name] for name in chosen], console)
    finally:
        if workdir is None:
            shutil.rmtree(root, ignore_errors=True)
    console.print(_table(rows, bench))
    passed = all(row.passed for row in rows)
    if json_file is not None:
        seconds = round(time.monotonic() - began, 1)
        record = {"steps": steps, "kills": kills, "ranks": ranks, "stage": stage, "seed": seed}
        record |= {"seconds": seconds, "passed": passed, "rows": [row.as_dict() for row in rows]}
        json_file.write_text(json.dumps(record, indent=2), encoding="utf-8")
    raise typer.Exit(0 if passed else 1)


def _choose(
    asked: Sequence[str] | None, known: Iterable[str], impossible: Collection[str] = ()
) -> list[str]:
    """The faults asked for, by default all; ``impossible`` ones, on one rank, only if none is."""
    if not asked:
        for name in impossible:
            typer.echo(f"{name} is left out: it takes several ranks to differ (--ranks 2).")
        return [name for name in known if name not in impossible]
    if left := sorted(set(asked) & set(impossible)):
        raise ValueError(f"{', '.join(left)} cannot be tried on one rank: give --ranks 2 or more.")
    if unknown := sorted(set(asked) - set(known) - {"none"}):
        raise ValueError(f"no fault {', '.join(unknown)}; there are {', '.join(known)} and none.")
    return [name for name in asked if name != "none"]


def _rows(
    bench: Bench,
    kills: int,
    seed: int,
    faults: Sequence[Callable[[Bench], Row]],
    console: Console,
) -> list[Row]:
    from ldistill.tools.torture.bench import Row
    from ldistill.tools.torture.kills import torture as kill_at_random

    def tell(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    rows = []
    tasks = [lambda bench: kill_at_random(bench, kills, seed, tell)] if kills else []
    for task in [*tasks, *faults]:
        try:
            row = task(bench)
        except RuntimeError as error:  # a run that should have ended well did not
            row = Row(getattr(task, "__name__", "kills"), "the run ends well", str(error), False)
        rows.append(row)
        tell(f"{'held' if row.passed else 'FAILED'}: {row.fault}")
    return rows


def _table(rows: Sequence[Row], bench: Bench) -> Table:
    from rich.table import Table

    title = f"{bench.ranks} ranks, ZeRO-{bench.stage}, {bench.steps} steps"
    table = Table(title=title, title_justify="left")
    for column in ("fault", "expected", "outcome", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        verdict = "[green]held[/]" if row.passed else "[red]FAILED[/]"
        table.add_row(row.fault, row.expected, row.outcome, verdict)
    return table
