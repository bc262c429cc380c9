"""The end of a run: the result, its scores, and what the user sees of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ldistill.checkpoint.folder import remove, sync
from ldistill.common import readme, run_files
from ldistill.common.errors import writing
from ldistill.common.ranks import everywhere, from_first, say
from ldistill.common.telling import telling
from ldistill.evaluation.items import evaluate, first_of_each, load_items
from ldistill.models.formats import load_processor, load_student
from ldistill.recipe import Recipe, compute_dtype
from ldistill.training.callbacks import plot_curves
from ldistill.training.card import card
from ldistill.training.trainer import DistillTrainer
from ldistill.training.validation import Best

Scores = dict[str, float] | None


def save_last(trainer: DistillTrainer, folder: Path) -> Path:
    """The last state of a training: its checkpoint, or what is saved of it now."""
    everywhere(trainer.parts.saver.sync_logs)
    last = folder / f"checkpoint-{trainer.state.global_step}"
    if not last.is_dir():
        last = folder / "final"
        trainer.save_model(str(last))
    return last


def export_result(last: Path, folder: Path, best: Best | None, step: int) -> None:
    """The run's result, in the format the student came in; every rank must call it.

    ``last`` is the checkpoint of the last state, of ``step``; with ``best`` the best evaluated
    student is asked for instead. Raises FileNotFoundError: the best is no longer there;
    TransientError: there is no room for it.
    """
    chosen = last
    found = from_first(lambda: best and best.find(step))
    if found is not None:
        step, value = found
        say(f"the best student is of step {step}: {best.metric} {value:.4g}.")
        chosen = folder / f"checkpoint-{step}"
        if not from_first(chosen.is_dir):
            raise FileNotFoundError(f"{chosen}, the best by {best.metric}, is no longer there.")
    elif best is not None:
        say(f"{best.metric} was never evaluated: the result is the last state.")
    result = folder / run_files.STUDENT
    say(f"exporting the student to {result}")
    from_first(lambda: copy_student(chosen / run_files.STUDENT, result))


def copy_student(source: Path, target: Path) -> None:
    """Copy a student, whole or not at all: an earlier one stays until the new one is on the disk.
    Raises TransientError: there is no room for it."""
    part, old = (target.with_name(f".{target.name}.{name}") for name in ("part", "old"))
    with writing(target):
        remove(part, old)
        part.mkdir()
        for path in sorted(source.rglob("*")):  # copytree hides which error it was
            copy = part / path.relative_to(source)
            if path.is_dir():
                copy.mkdir()
            else:
                shutil.copyfile(path, copy)
                sync(copy)
        if target.exists():
            target.rename(old)
        part.rename(target)
        remove(old)


def evaluate_student(recipe: Recipe, student: Path, when: str) -> Scores:
    """Scores of a student folder on the recipe's items, by rank 0 alone; None without items."""

    def scores() -> dict[str, float]:
        items = first_of_each(load_items(recipe.run.eval_items), recipe.run.eval_limit)
        device = recipe.training.device
        dtype = compute_dtype(recipe) if device.type == "cuda" else torch.float32
        model = load_student(student, dtype=dtype).to(device)
        processor = load_processor(student, recipe.pair.tokenizer, tiling=recipe.data.tiling)
        with telling(f"evaluating {when} on {len(items)} held-out items", len(items)) as told:
            return evaluate(model, processor, items, progress=told.advance)

    asked = recipe.run.eval_items is not None and recipe.run.evaluate
    return from_first(scores) if asked else None


def report(recipe: Recipe, folder: Path, before: Scores, after: Scores) -> None:
    """Draw the curves, write scores and card; tell where everything lies and what comes next."""
    drawn = plot_curves(folder / run_files.METRICS, folder / run_files.CURVES)
    console = Console()
    if before and after:
        result = json.dumps({"before": before, "after": after}, indent=2)
        (folder / run_files.EVALUATION).write_text(result, encoding="utf-8")
        console.print(_table(recipe, before, after))
    student = folder / run_files.STUDENT
    (student / readme.NAME).write_text(card(folder, student), encoding="utf-8")
    # Commands, to be changed and typed: see inside, measure or train on one's own, share.
    look = '--image cat.jpg --prompt "What is this?" --answer "A cat."'
    steps = [f"ldistill eval --student {folder} --suite paper --out {folder / 'eval'}"]
    if recipe.data.prepare:  # data for a try
        build = "--dataset mine.json --extra-sources mine=language --out shards/"
        steps = [f"ldistill shards build {build}", "ldistill train --recipe mine --shards shards/"]
    for line in (
        f"student   {student}  (model card: README.md)",
        f"metrics   {folder / run_files.METRICS}",
        *([f"curves    {folder / run_files.CURVES}"] if drawn else []),
        f"next      ldistill look --student {folder} {look}",
        *(" " * 10 + step for step in (*steps, f"ldistill push {folder} --repo NAME")),
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _table(recipe: Recipe, before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table(title="held-out items, accuracy", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    group_of = {item.task: item.group for item in load_items(recipe.run.eval_items)}
    for group in dict.fromkeys(group_of.values()):
        tasks = {f"  {task}": task for task, of in group_of.items() if of == group}
        for shown, name in ({group: group} | tasks).items():
            style = "bold" if shown == group else None
            table.add_row(shown, f"{before[name]:.3f}", f"{after[name]:.3f}", style=style)
    return table
