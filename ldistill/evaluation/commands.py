"""``ldistill generate``, ``eval`` and ``compare``: an answer, a model's scores, several models'."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typer import Argument, Option

from ldistill.common.errors import refuse
from ldistill.common.images import open_image
from ldistill.evaluation.compare import comparison
from ldistill.evaluation.compare.failure_modes import Lexicon, english
from ldistill.evaluation.compare.report import find_examples, headline, write
from ldistill.evaluation.compare.results import read_variants
from ldistill.evaluation.suites import GROUPS, OTHER, ROWS, group_title


def generate(
    student: Annotated[str, Option(help="Student folder, hub id or run folder.")],
    prompt: Annotated[str, Option(help="What to ask.")],
    image: Annotated[list[Path] | None, Option(help="Picture; repeatable.", exists=True)] = None,
    max_new_tokens: Annotated[int, Option(min=1)] = 128,
    temperature: Annotated[float, Option(min=0, help="0: greedy.")] = 0.0,
    tokenizer: Annotated[str | None, Option(help="Default: the configuration's.")] = None,
    tiling: Annotated[bool, Option(help="Cut large pictures into tiles.")] = False,
) -> None:
    """Ask a student something about a picture, or just something."""
    import torch

    from ldistill.evaluation.scorer import Question, StudentScorer, model_folder
    from ldistill.models.formats import load_processor, load_student

    pictures = tuple(open_image(path.read_bytes()) for path in image or ())
    folder, most = model_folder(student), max(len(pictures), 1)
    processor = load_processor(folder, tokenizer, tiling=tiling, max_images=most)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = StudentScorer(load_student(folder).to(device), processor)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    (text,) = scorer.generate([Question(prompt, pictures)], max_new_tokens, **sampling)
    typer.echo(text.strip())


def evaluate_command(
    student: Annotated[str, Option(help="nanoVLM, VLM or bare LM: folder, run or hub id.")],
    out: Annotated[Path, Option(help="Folder of the results.")],
    suite: Annotated[str | None, Option(help="language, document, general, paper or tiny.")] = None,
    tasks: Annotated[str | None, Option(help="Further tasks of lmms-eval: a,b,c.")] = None,
    limit: Annotated[int | None, Option(help="Documents of every task; to try out.")] = None,
    batch_size: Annotated[int | None, Option(help="Per forward; default 1, tiny 64.")] = None,
    include_path: Annotated[list[Path] | None, Option(help="Folder of your own tasks.")] = None,
    tiling: Annotated[
        bool | None,
        Option(help="Cut large pictures into tiles (nanoVLM, SmolVLM). Default: as in training."),
    ] = None,
    drop_pictures: Annotated[bool, Option(help="Bare LM: ask without the pictures.")] = False,
    dtype: Annotated[str, Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")] = "auto",
    tokenizer: Annotated[str | None, Option(help="Default: the model's own.")] = None,
    processes: Annotated[int | None, Option(min=1, help="Default: one per visible GPU.")] = None,
) -> None:
    """Evaluate a model with lmms-eval, samples logged."""
    from ldistill.evaluation.lmms_run import LOG, Evaluation, evaluate

    options = model_options(student, tiling, drop_pictures, dtype, tokenizer)
    own, paths = tuple(_names(tasks)), tuple(include_path or ())
    asked = Evaluation(student, out, suite, own, limit, batch_size, paths, options, processes)
    if asked.all_tasks:
        typer.echo(f"lmms-eval runs {', '.join(asked.all_tasks)}; its output: {out / LOG}")
    show(evaluate(asked), out)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def model_options(
    student: str, tiling: bool | None, drop_pictures: bool, dtype: str, tokenizer: str | None
) -> dict[str, Any]:
    """Options of the lmms-eval model for a student; ValueError: one that its kind does not have."""
    from ldistill.evaluation.scorer import kind_of, model_folder, tiled_in_training

    kind = kind_of(model_folder(student))
    blind = kind == "lm"
    cases = {
        f"--tiling is for a model that sees; {student} is a bare LM.": tiling and blind,
        f"--drop-pictures is for a bare LM; {student} holds a {kind} student.": (
            drop_pictures and not blind
        ),
    }
    refuse(cases)
    trained = tiled_in_training(student)
    options: dict[str, Any] = {"dtype": dtype}
    if tiling or trained:
        options["tiling"] = trained if tiling is None else tiling
    options |= {"pictures": "drop"} if drop_pictures else {}
    return options | ({"tokenizer": tokenizer} if tokenizer else {})


def show(result: dict[str, Any], out: Path) -> None:
    """Scores as a table by group, and where everything is."""
    table = Table("task", title=f"{result['student']}", title_justify="left")
    for column in ("score", "documents"):
        table.add_column(column, justify="right")
    digits = {row.id: row.digits for row in ROWS}
    for group in (*GROUPS, OTHER):
        rows = {k: s for k, s in result["scores"].items() if s["group"] == group}
        if rows:
            mean = result["groups"].get(group)  # none of tasks that have nothing in common
            shown = "" if mean is None else f"{mean:.3f}"
            table.add_row(group_title(group), shown, style="bold")
        for key, score in rows.items():
            value = f"{score['value']:.{digits.get(key, 3)}f}"
            table.add_row(f"  {score['name']}", value, str(score["documents"]))
    console = Console()
    if result["scores"]:
        console.print(table)
    if result["limit"]:
        console.print(f"Only the first {result['limit']} documents of every task: a try, no score.")
    console.print(f"results   {out / result['results']}", highlight=False)


def compare(
    results: Annotated[
        list[str],
        Argument(metavar="RUN_DIR|RESULTS_DIR...", help="NAME=DIR names a variant."),
    ],
    out: Annotated[Path, Option(help="Folder for the report.")],
    baseline: Annotated[str | None, Option(help="To compare with; default nanovlm-full.")] = None,
    original: Annotated[
        str | None, Option(help="Before training, or the teacher: what is 100% recovered.")
    ] = None,
    suite: Annotated[str | None, Option(help="Rows of this suite, found or not.")] = None,
    tasks: Annotated[str | None, Option(help="Only these tasks, comma-separated.")] = None,
    examples: Annotated[int, Option(min=1, help="Samples of every kind on the page.")] = 25,
    words: Annotated[Path | None, Option(help="Words, one a line, instead of English.")] = None,
    read_pictures: Annotated[bool, Option(help="Let tesseract read the pictures.")] = True,
) -> None:
    """Put variants side by side: scores, share recovered, samples won and lost, and how."""
    lexicon = english() if words is None else Lexicon(words.read_text("utf-8").split())
    missing: list[str] = []
    variants = read_variants(results, missing.append)
    for sentence in missing:
        typer.echo(sentence, err=True)
    roles = comparison.choose_roles([v.name for v in variants], baseline, original)
    rows = comparison.choose_rows(variants, suite, None if tasks is None else _names(tasks))
    compared = comparison.compare(
        variants, rows, *roles, read_pictures=read_pictures, missing=missing
    )
    console = Console(stderr=True)
    shown = partial(track, description="failure modes", console=console, transient=True)
    found = find_examples(compared, lexicon, shown)
    files = write(compared, found, out, examples)
    typer.echo(f"baseline {roles[0] or 'none'}, original {roles[1] or 'none'}")
    typer.echo(compared.table.markdown())
    typer.echo(headline(compared, found, files))
