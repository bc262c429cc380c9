"""`ldistill models`: the families, and whether they hold what is promised of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def models(
    families: Annotated[
        list[str] | None, typer.Argument(help="Of the table; default: all.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Build each small, on the spot, and check it.")
    ] = False,
    student: Annotated[
        str | None, typer.Option(help="Check this student, with --teacher, instead.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="The LM it was built on.")] = None,
    reduced: Annotated[
        bool, typer.Option("--reduced", help="Of that pair the configurations, small and random.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table as it stands in docs/models.md.")
    ] = False,
) -> None:
    """The families that fit and why others do not; --check after every upgrade of transformers."""
    from rich.console import Console

    from ldistill.tools.models.table import FAMILIES, asked_for, families_table, refused_table

    if (student is None) != (teacher is None) or (reduced and not student):
        raise ValueError("give --student and --teacher together, and --reduced only with them.")
    if student or check:
        pairs = {"the pair": None} if student else dict.fromkeys(asked_for(families))
        failed = [name for name in pairs if not _passes(name, student, teacher, reduced)]
        typer.echo(f"{len(pairs) - len(failed)} of {len(pairs)} hold" + (
            f"; not {', '.join(failed)}" if failed else ""))  # fmt: skip
        raise typer.Exit(1 if failed else 0)
    chosen = {name: FAMILIES[name] for name in asked_for(families)}
    tables = [families_table(chosen), *([] if families else [refused_table()])]
    if markdown:
        typer.echo("\n\n".join(table.markdown() for table in tables))
        return
    for table in tables:
        Console().print(table.rich())


def _passes(name: str, student: str | None, teacher: str | None, reduced: bool) -> bool:
    """Check one pair and say what came of it."""
    import time
    from tempfile import TemporaryDirectory

    import torch
    from transformers.utils import logging

    from ldistill.common.locate import resolve
    from ldistill.models.zoo import write_pair, write_reduced
    from ldistill.tools.models.check import check_folders

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # small configurations, which transformers remarks on
    began, problems, held = time.monotonic(), [], 0
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            if student is None:
                write_pair(name, root)
            elif reduced:
                where = (resolve(student, weights=False), resolve(teacher, weights=False))
                write_reduced(*where, root)
            pair = (root / "student", root / "teacher")
            if student and not reduced:
                pair = (resolve(student), resolve(teacher))
            for verdict in check_folders(*pair):
                held += not verdict.problem
                problems += [f"{verdict.contract}: {verdict.problem}"] if verdict.problem else []
        except (ValueError, OSError) as error:
            problems.append(str(error))
    seconds = time.monotonic() - began
    typer.echo(f"{name:20} {'fails' if problems else 'holds'}  {held} contracts, {seconds:.1f} s")
    for problem in problems:
        typer.echo(f"    {problem}")
    return not problems
