"""`ldistill study`: the paper's comparison, in miniature or at full scale."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train and evaluate every variant of the paper from the same start.", no_args_is_help=True
)
_Variants = Annotated[
    list[str] | None, typer.Option("--variant", help="Only this one; may be repeated.")
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def tiny(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant.")] = 3,
    variant: _Variants = None,
    items: Annotated[int | None, typer.Option(help="Held-out items per task.")] = None,
    report_to: Annotated[
        Path | None, typer.Option(help="Folder of the report; default --out.")
    ] = None,
) -> None:
    """The tiny world, on whatever machine this is; goes on where it stopped.

    Further flags go to every training run: `--max_steps 100`.
    """
    from ldistill.tools.study.report import write_report
    from ldistill.tools.study.tiny import TinyStudy, collect, metrics_files, run_study
    from ldistill.tools.study.variants import variants

    chosen = variants(tuple(variant or ()))
    study = TinyStudy(out, chosen, seeds, tuple(context.args), items)
    run_study(study)
    command = shlex.join(["ldistill", *sys.argv[1:]])
    files = write_report(collect(study), metrics_files(study), report_to or out, command)
    typer.echo(files[0].read_text(encoding="utf-8"))
    for file in files:
        typer.echo(f"written  {file}")


@app.command()
def paper(
    shards: Annotated[str, typer.Option(help="Folder or URL of The Cauldron's shards.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/study"),
    variant: _Variants = None,
    deepspeed: Annotated[str, typer.Option(help="DeepSpeed configuration.")] = (
        "ds_configs/zero2.json"
    ),
    submit: Annotated[bool, typer.Option(help="Submit to SLURM instead of printing.")] = False,
) -> None:
    """The paper's scale: prints every command, or submits the jobs."""
    from ldistill.tools.study import paper as study_paper
    from ldistill.tools.study.variants import variants

    study = study_paper.PaperStudy(shards, out, variants(tuple(variant or ())), deepspeed)
    if submit:
        for job, purpose in study_paper.submit(study):
            typer.echo(f"submitted  {job}  {purpose}")
        return
    for line in study_paper.commands(study):
        typer.echo(line)
