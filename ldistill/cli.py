"""The `ldistill` command; imports are inside its functions, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

import ldistill.tiny.suite  # noqa: F401 - makes the suite `tiny` known
from ldistill import __version__
from ldistill.common.environment import check_versions, settle_environment
from ldistill.common.errors import exit_code
from ldistill.evaluation.commands import compare, evaluate_command, generate
from ldistill.tiny.commands import app as tiny_app
from ldistill.tools.bench.commands import app as bench_app
from ldistill.tools.commands import look, merge, models, plan, study, torture
from ldistill.tools.launch import scripts, train
from ldistill.tools.shards.commands import app as shards_app

_PLAIN = {"no_args_is_help": True, "pretty_exceptions_enable": False, "add_completion": False}
app = typer.Typer(help="Give a vision-language model its language back.", **_PLAIN)
groups = {"shards": shards_app, "bench": bench_app, "tiny": tiny_app, "scripts": scripts}
for name, group in groups.items():
    app.add_typer(group, name=name)
# Their further options are another program's.
_PASSING = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_PASSING | {"help_option_names": []})(train)
app.command(name="eval")(evaluate_command)
for command in (compare, generate, look, merge, models, plan, torture):
    app.command()(command)
app.command(context_settings=_PASSING)(study)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, Option("--version", help="Print it.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def recipes() -> None:
    """The shipped recipes and what each one is."""
    from ldistill.recipe import shipped_recipes

    for name, path in shipped_recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        typer.echo(f"{name:22} {comment}")


@app.command()
def export(
    run: Annotated[str, Argument(help="Run folder or checkpoint; for its decoder any student.")],
    out: Annotated[Path, Option(help="Where to write.")],
    decoder_only: Annotated[bool, Option(help="Also OUT/decoder: a transformers LM.")] = False,
    tokenizer: Annotated[str | None, Option(help="Default: the configuration's.")] = None,
) -> None:
    """Write the student of a run as the checkpoint it came from, or any student's decoder."""
    from ldistill.common.locate import resolve
    from ldistill.training.export import export_decoder, export_student

    student, folder = out, Path(run)
    if decoder_only and ((folder / "config.json").is_file() or not folder.is_dir()):
        student = resolve(run)  # of no run: as it is, there is nothing to export beside the decoder
    else:
        source = export_student(folder, out, also=("decoder",) if decoder_only else ())
        typer.echo(f"student  {out}  (from {source})")
    if decoder_only:
        export_decoder(student, out / "decoder", tokenizer)
        typer.echo(f"decoder  {out / 'decoder'}")


@app.command()
def push(
    run: Annotated[Path, Argument(help="Run folder, or one of its checkpoints.")],
    repo: Annotated[str, Option(help="On the hub: owner/name, or a name of your own.")],
    private: Annotated[bool | None, Option(help="If new. Default: as the owner's are.")] = None,
) -> None:
    """Upload the student of a run with its model card and curves to the Hugging Face hub."""
    from ldistill.training.export import push as upload

    typer.echo(upload(run, repo, private))


@app.command()
def doctor() -> None:
    """Check this machine: versions, GPU, compilers, disk; one line of advice per problem."""
    from ldistill.tools.doctor import run

    raise typer.Exit(run())


def main() -> None:
    """Entry point: a user's mistake is a sentence and exit status 2 (75: it may pass)."""
    settle_environment()
    try:
        if "doctor" not in sys.argv[1:2]:  # which has more to say of it
            check_versions()
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("LDISTILL_DEBUG") == "1":
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
