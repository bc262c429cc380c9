"""`ldistill tiny`: make the tiny pair again, or its training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The embedded tiny world.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder for teacher/ and student/.")],
    steps_scale: Annotated[float, typer.Option(help="Share of the full training steps.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the world and the weights.")] = None,
) -> None:
    """Build the tiny pair: tokenizer, language model, alignment."""
    from ldistill.tiny.build import build_pair
    from ldistill.tiny.world import DEFAULT_SEED

    try:
        made = build_pair(out, seed=DEFAULT_SEED if seed is None else seed, steps_scale=steps_scale)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"teacher  {made.teacher}  (loss {made.lm_loss:.3f})")
    typer.echo(f"student  {made.student}  (loss {made.alignment_loss:.3f})")


@app.command()
def data(
    cache: Annotated[Path | None, typer.Option(help="Cache folder.")] = None,
) -> None:
    """Make (or find) the tiny run's shards and benchmark items."""
    from ldistill.tiny.prepare import prepare

    try:
        made = prepare(cache)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"shards  {made.shards}")
    typer.echo(f"items   {made.items}")
