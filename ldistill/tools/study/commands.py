"""`ldistill study`: arms compared from the same start; in miniature, at full scale, or a file's."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def study(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="tiny, paper, or a YAML file of one's own."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.")] = Path(
        "runs/study"
    ),
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of every arm.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only this arm; may be repeated.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Held-out items per task.")] = None,
    report_to: Annotated[
        Path | None, typer.Option(help="Folder of the report; default --out.")
    ] = None,
    shards: Annotated[str | None, typer.Option(help="Folder or URL of all arms' shards.")] = None,
    deepspeed: Annotated[str, typer.Option(help="DeepSpeed configuration, of commands.")] = (
        "ds_configs/zero2.json"
    ),
    submit: Annotated[bool, typer.Option(help="Submit to SLURM instead of printing.")] = False,
) -> None:
    """Train and evaluate every arm of a study from the same start; goes on where it stopped.

    tiny: the paper in miniature, on whatever machine this is. paper: at its scale, prints every
    command or submits the jobs. A file: see ldistill/tools/study/files.py. Further flags go to
    every training run: `--max_steps 100`.
    """
    from ldistill.tools.study import cluster, files, report, running

    asked = files.load_study(name)
    arms = asked.choose(variant or ())
    asked = replace(asked, seeds=seeds or asked.seeds, items_per_task=items or asked.items_per_task)
    flags = [*(["--shards", shards] if shards else []), *context.args]
    if asked.launch == "commands":
        jobs = cluster.ClusterStudy(asked, out, arms, flags, deepspeed)
        if submit:
            for job, purpose in cluster.submit(jobs):
                typer.echo(f"submitted  {job}  {purpose}")
            return
        for line in cluster.commands(jobs):
            typer.echo(line)
        return
    place = running.Workplace(asked, out, flags)
    problems = running.run_study(place, arms)
    command = shlex.join(["ldistill", *sys.argv[1:]])
    written = report.write_report(place, problems, report_to or out, command)
    typer.echo(written[0].read_text(encoding="utf-8"))
    for file in written:
        typer.echo(f"written  {file}")
    raise typer.Exit(1 if problems else 0)
