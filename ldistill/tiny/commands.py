"""`ldistill tiny`: make the tiny pair again, or its training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldistill.tiny.world import DEFAULT_SEED

app = typer.Typer(help="The embedded tiny world.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder for teacher/ and student/.")],
    steps_scale: Annotated[
        float, typer.Option(min=1e-6, help="Share of the full training steps.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the world and the weights.")] = DEFAULT_SEED,
) -> None:
    """Build the tiny pair: tokenizer, language model, alignment."""
    from ldistill.tiny.build import build_pair

    for name, loss in build_pair(out, seed=seed, steps_scale=steps_scale).items():
        typer.echo(f"{name}  {out / name}  (loss {loss:.3f})")


@app.command()
def data(cache: Annotated[Path | None, typer.Option(help="Cache folder.")] = None) -> None:
    """Make (or find) the tiny run's shards and benchmark items."""
    from ldistill.tiny.prepare import prepare

    made = prepare(cache)
    typer.echo(f"shards  {made.shards}")
    typer.echo(f"items   {made.items}")
