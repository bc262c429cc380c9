"""The paper in miniature: every variant on the tiny world, several seeds, one report.

    ldistill study tiny --seeds 3 --out study/

Each variant is a run of ``train.py`` with the recipe `tiny` and the variant's own fields, started
as a user would start it; each student goes through lmms-eval on the tiny world's held-out tasks.
What is finished is kept: the same command goes on where it stopped.

    OUT/adapted/eval/                 the student before training
    OUT/seed-1/lingudistill/          a run folder; eval/ inside holds lmms-eval's results
    OUT/report.md  results.json  *.png
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import ldistill
from ldistill.common import run_files
from ldistill.evaluation.lmms_results import read_evaluation
from ldistill.evaluation.lmms_run import Evaluation, evaluate
from ldistill.recipe import load_recipe
from ldistill.tools.study.variants import ORIGINAL, Variant, variants

RECIPE = "tiny"
SUITE = "tiny"
LOG = "train.log"
TRAIN = Path(ldistill.__file__).with_name("train.py")


@dataclass(frozen=True)
class TinyStudy:
    """What is trained and where it goes."""

    out: Path
    variants: Sequence[Variant]
    seeds: int = 3
    overrides: Sequence[str] = ()
    """Further flags of ``train.py`` for every run."""
    items_per_task: int | None = None

    def runs(self) -> Iterator[tuple[Variant, int, Path]]:
        """Every run with its seed and folder, all variants of a seed before the next one."""
        for seed in range(1, self.seeds + 1):
            for variant in self.variants:
                yield variant, seed, self.out / f"seed-{seed}" / variant.name


def run_study(study: TinyStudy, show: bool = True) -> None:
    """Train and evaluate whatever is not there yet.

    Raises:
        ValueError: `out` holds a study with other settings, or a run or an evaluation failed (the
            message names its log).
    """
    _claim(study)
    runs = list(study.runs())
    with _progress(show) as progress:
        task = progress.add_task("", total=len(runs) + 1)
        progress.update(task, description=f"{ORIGINAL}: evaluation")
        _evaluate(str(load_recipe(RECIPE)["student"]), study.out / ORIGINAL / "eval", study)
        progress.advance(task)
        for variant, seed, folder in runs:
            name = f"{variant.name}, seed {seed}"
            progress.update(task, description=f"{name}: training")
            _train(variant, seed, folder, study.overrides)
            progress.update(task, description=f"{name}: evaluation")
            _evaluate(str(folder / run_files.STUDENT), folder / "eval", study)
            progress.advance(task)


def _claim(study: TinyStudy) -> None:
    """The settings that all runs of a folder share; seeds and variants may be added later."""
    settings = {
        "overrides": list(study.overrides),
        "items_per_task": study.items_per_task,
        "recipe": {k: v for k, v in load_recipe(RECIPE).items() if v is not None},
    }
    path = study.out / "study.json"
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier != settings:
            raise ValueError(
                f"{study.out} holds a study with other settings ({path}): choose another --out."
            )
        return
    study.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _train(variant: Variant, seed: int, folder: Path, overrides: Sequence[str]) -> None:
    if (folder / run_files.STUDENT / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), "--recipe", RECIPE, *variant.flags()]
    command += ["--seed", str(seed), "--output_dir", str(folder), "--evaluate", "false"]
    command += ["--disable_tqdm", "true", "--overwrite", "true", *overrides]
    with (folder.parent / f"{variant.name}.{LOG}").open("w", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if status.returncode:
        raise ValueError(
            f"training {variant.name} with seed {seed} ended with status {status.returncode}; its "
            f"output is in {log.name}. The same command goes on with what is left."
        )


def _evaluate(student: str, out: Path, study: TinyStudy) -> None:
    if _scores(out) is None:
        evaluate(Evaluation(student, out, SUITE, items_per_task=study.items_per_task))


def _scores(folder: Path) -> dict[str, float] | None:
    """Row id → score of a complete evaluation, else None."""
    record = read_evaluation(folder)
    if record is None or not record["complete"]:
        return None
    return {row: score["value"] for row, score in record["scores"].items()}


def collect(study: TinyStudy) -> dict[str, dict[str, list[float]]]:
    """Variant → row id → one score per seed, of every complete evaluation in the study's folder."""
    found: dict[str, dict[str, list[float]]] = {}
    runs = [(name, scores) for name, _, _, scores in _finished(study)]
    for name, scores in [(ORIGINAL, _scores(study.out / ORIGINAL / "eval") or {}), *runs]:
        for row, score in scores.items():
            found.setdefault(name, {}).setdefault(row, []).append(score)
    return found


def metrics_files(study: TinyStudy) -> dict[str, Path]:
    """Variant → metrics of its first seed, for the loss curves."""
    runs = ((name, folder) for name, seed, folder, _ in _finished(study) if seed == 1)
    files = {name: folder / run_files.METRICS for name, folder in runs}
    return {name: path for name, path in files.items() if path.is_file()}


def _finished(study: TinyStudy) -> Iterator[tuple[str, int, Path, dict[str, float]]]:
    """Variant, seed, folder and scores of every run that is done, those of earlier commands too."""
    numbers = (path.name.removeprefix("seed-") for path in study.out.glob("seed-*"))
    seeds = max([study.seeds, *(int(n) for n in numbers if n.isdecimal())])
    for variant, seed, folder in replace(study, variants=variants(), seeds=seeds).runs():
        if (scores := _scores(folder / "eval")) is not None:
            yield variant.name, seed, folder, scores


def _progress(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), disable=not show)
