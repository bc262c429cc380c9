"""`ldistill compare`: the paper's tables from lmms-eval's results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_DIR|RESULTS_DIR...",
            help="Folders with lmms-eval results; NAME=DIR names a variant.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    baseline: Annotated[
        str | None, typer.Option(help="Variant to compare with. Default: nanovlm-full.")
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(help="Student before training, or teacher: what counts as 100% recovered."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Rows of this suite, found or not.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, comma-separated.")] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Samples on the page per variant, task, outcome and mode.")
    ] = 25,
    words: Annotated[
        Path | None, typer.Option(help="Word list, one a line, instead of English.")
    ] = None,
    read_pictures: Annotated[
        bool, typer.Option(help="Let tesseract read pictures for the failure modes.")
    ] = True,
) -> None:
    """Put variants side by side: scores, share recovered, samples won and lost, and how."""
    from rich.console import Console
    from rich.progress import track

    from ldistill.evaluation.compare import comparison
    from ldistill.evaluation.compare.examples import find_examples
    from ldistill.evaluation.compare.failure_modes import Lexicon, english
    from ldistill.evaluation.compare.report import headline, write
    from ldistill.evaluation.compare.results import read_variants

    lexicon = english() if words is None else Lexicon(words.read_text("utf-8").split())
    missing: list[str] = []
    variants = read_variants(results, missing.append)
    for sentence in missing:
        typer.echo(sentence, err=True)
    names = [variant.name for variant in variants]
    roles = comparison.choose_roles(names, baseline, original)
    wanted = None if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()]
    rows = comparison.choose_rows(variants, suite, wanted)
    compared = comparison.compare(
        variants, rows, *roles, read_pictures=read_pictures, missing=missing
    )
    console = Console(stderr=True)
    found = find_examples(
        compared,
        lexicon,
        lambda work: track(work, "failure modes", console=console, transient=True),
    )
    files = write(compared, found, out, examples)
    typer.echo(f"baseline {roles[0] or 'none'}, original {roles[1] or 'none'}")
    typer.echo(compared.table.markdown())
    typer.echo(headline(compared, found, files))
