"""``ldistill eval``: a model on the paper's tasks, the tiny world's or one's own, by lmms-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate_command(
    student: Annotated[
        str,
        typer.Option(help="nanoVLM, Hugging Face VLM or bare LM; folder, run or hub id."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    suite: Annotated[
        str | None, typer.Option(help="language | document | general | paper | tiny.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Further tasks of lmms-eval, separated by commas.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of every task; to try out.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Requests per forward. Default 1, for tiny 64.")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="Folder with tasks of your own; may be repeated.")
    ] = None,
    tiling: Annotated[
        bool | None,
        typer.Option(
            help="nanoVLM, SmolVLM: cut large pictures into tiles, as the stock models do. "
            "Default: as the run that left the student; one tile without a run."
        ),
    ] = None,
    drop_pictures: Annotated[
        bool, typer.Option(help="Bare LM: ask without the pictures instead of refusing them.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Default: one for every visible GPU.")
    ] = None,
) -> None:
    """Evaluate a model with lmms-eval, samples logged."""
    from ldistill.evaluation.lmms_run import LOG, Evaluation, evaluate

    asked = Evaluation(
        student,
        out,
        suite,
        tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
        limit,
        batch_size,
        tuple(include_path or ()),
        model_options(student, tiling, drop_pictures, dtype, tokenizer),
        processes,
    )
    if asked.all_tasks:
        typer.echo(f"lmms-eval runs {', '.join(asked.all_tasks)}; its output: {out / LOG}")
    show(evaluate(asked), out)


def model_options(
    student: str, tiling: bool | None, drop_pictures: bool, dtype: str, tokenizer: str | None
) -> dict[str, Any]:
    """Options of the lmms-eval model that serves this kind of student.

    Raises:
        ValueError: an option that this kind of model does not have.
    """
    from ldistill.evaluation.answerer_loading import kind_of, model_folder, tiled_in_training

    kind = kind_of(model_folder(student))
    if tiling and kind == "lm":
        raise ValueError(f"--tiling is for a model that sees; {student} is a bare LM.")
    if drop_pictures and kind != "lm":
        raise ValueError(f"--drop-pictures is for a bare LM; {student} holds a {kind} student.")
    options: dict[str, Any] = {"dtype": dtype}
    trained = tiled_in_training(student)
    if trained if tiling is None else tiling:
        options["tiling"] = True
    elif trained:
        options["tiling"] = False
    if drop_pictures:
        options["pictures"] = "drop"
    if tokenizer:
        options["tokenizer"] = tokenizer
    return options


def show(result: dict[str, Any], out: Path) -> None:
    """Scores as a table by group, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    from ldistill.evaluation.compare.tables import OTHER, group_title
    from ldistill.evaluation.suites import GROUPS, ROWS

    table = Table(title=f"{result['student']}", title_justify="left")
    for column in ("task", "score", "documents"):
        table.add_column(column, justify="left" if column == "task" else "right")
    digits = {row.id: row.digits for row in ROWS}
    for group in (*GROUPS, OTHER):
        rows = {k: s for k, s in result["scores"].items() if s["group"] == group}
        if rows:
            mean = result["groups"].get(group)  # none of tasks that have nothing in common
            mean = "" if mean is None else f"{mean:.3f}"
            table.add_row(group_title(group), mean, "", style="bold")
        for key, score in rows.items():
            value = f"{score['value']:.{digits.get(key, 3)}f}"
            table.add_row(f"  {score['name']}", value, str(score["documents"]))
    console = Console()
    if result["scores"]:
        console.print(table)
    if result["limit"]:
        console.print(f"Only the first {result['limit']} documents of every task: a try, no score.")
    console.print(f"results   {out / result['results']}", highlight=False)
