"""`ldistill torture`: kill and starve real tiny runs, and say whether they came through."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


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
    from rich.table import Table

    from ldistill.tools.torture import faults

    chosen = faults.choose(fault or [], ranks)
    root = workdir or Path(tempfile.mkdtemp(prefix="ldistill-torture-"))
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise ValueError(f"{root} is not empty: choose an empty folder.")
    console = Console()

    def tell(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    if ranks == 1 and not fault:
        tell(f"{faults.TEXT_ONLY} is left out: it takes several ranks to differ (--ranks 2).")
    title = f"{ranks} ranks, ZeRO-{stage}, {steps} steps"
    table = Table("fault", "expected", "outcome", "", title=title, title_justify="left")
    bench, began = faults.Bench(root, ranks=ranks, steps=steps, stage=stage), time.monotonic()
    killing = [lambda bench: faults.kills(bench, kills, seed, tell)] if kills else []
    verdicts = []
    try:
        for task in [*killing, *chosen]:
            verdict = task(bench)
            tell(f"{'held' if verdict.passed else 'FAILED'}: {verdict.fault}")
            mark = "[green]held[/]" if verdict.passed else "[red]FAILED[/]"
            table.add_row(verdict.fault, verdict.expected, verdict.outcome, mark)
            verdicts.append(verdict)
    finally:
        if workdir is None:
            shutil.rmtree(root, ignore_errors=True)
    console.print(table)
    passed = all(verdict.passed for verdict in verdicts)
    if json_file is not None:
        seconds = round(time.monotonic() - began, 1)
        record = {"steps": steps, "kills": kills, "ranks": ranks, "stage": stage, "seed": seed}
        record |= {"seconds": seconds, "passed": passed, "rows": [asdict(v) for v in verdicts]}
        json_file.write_text(json.dumps(record, indent=2), encoding="utf-8")
    raise typer.Exit(0 if passed else 1)
