"""Train or merge, and evaluate, whatever of a study is not there yet.

Each arm is a run of ``train.py`` started as a user would start it, or a merge; each student goes
through lmms-eval. What is finished is kept: the same command goes on where it stopped. What fails
is named, and the rest goes on.

    OUT/adapted/eval/                    the student before training
    OUT/seed-1/lingudistill/             a run folder; eval/ inside holds lmms-eval's results
    OUT/seed-1/labels--alpha-0.3/        the same of one of several settings
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ldistill.checkpoint.logs import read_metrics
from ldistill.common import run_files
from ldistill.common.locate import resolve
from ldistill.evaluation.lmms_run import LOG, Evaluation, evaluate, read_evaluation
from ldistill.evaluation.suites import SUITES
from ldistill.recipe import load_recipe
from ldistill.tools.study.files import Arm, Run, Study, filled
from ldistill.tools.study.scores import MEASURED, Scores, best_setting, read_scores
from ldistill.tools.study.warm import Warm

PROBE_STEPS = 2


@dataclass(frozen=True)
class Workplace:
    """A study and the folder in which it is run."""

    study: Study
    out: Path
    overrides: Sequence[str] = ()
    """Further flags of ``train.py`` for every run."""

    @cached_property
    def programs(self) -> Warm:
        """What runs training, merging and lmms-eval; offline where all tasks are made here."""
        own = self.study.suite and SUITES[self.study.suite].make_tasks
        return Warm(offline=bool(own) and not self.study.tasks)

    def folder(self, run: Run) -> Path:
        return self.out / f"seed-{run.seed}" / run.name

    def scores(self, run: Run) -> Scores:
        """Of its evaluation, as far as there is one."""
        return read_scores(self.folder(run), self.study.validation)

    @property
    def start_scores(self) -> Scores:
        return read_scores(self.out / self.study.start, self.study.validation)

    def chosen(self, arm: Arm) -> Run:
        """An arm's best setting on the validation part, by the runs of seed 1; the first of one."""
        runs = [Run(arm, setting, 1) for setting in arm.settings]
        return best_setting(self.study, [(run, self.scores(run)) for run in runs])

    def finished(self) -> Iterator[Run]:
        """Every run with scores, those of earlier commands too."""
        numbers = (path.name.removeprefix("seed-") for path in self.out.glob("seed-*"))
        for seed in sorted(int(number) for number in numbers if number.isdecimal()):
            for arm in self.study.arms:
                runs = (Run(arm, setting, seed) for setting in arm.settings)
                yield from (run for run in runs if self.scores(run).rows)


def run_study(place: Workplace, arms: Sequence[Arm], show: bool = True) -> list[str]:
    """Do all that is not there yet; returns a sentence on everything that failed.

    Raises ValueError: the folder holds a study with other settings.
    """
    _claim(place)
    study, problems = place.study, []
    first = [Run(arm, setting, 1) for arm in arms for setting in arm.settings]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), disable=not show) as progress:
        total = 1 + len(first) + (study.seeds - 1) * len(arms)
        bar = progress.add_task("", total=total)

        def do(run: Run | None) -> None:
            """Make and evaluate a run's student; without one evaluate the start."""
            label, folder = study.start, place.out / study.start
            student = study.shared["student"]
            try:
                if run:
                    label, folder = f"{run.name}, seed {run.seed}", place.folder(run)
                    student = str(folder / run_files.STUDENT)
                    what = "making" if run.arm.of else "training"
                    progress.update(bar, description=f"{label}: {what}")
                    _make(place, run)
                progress.update(bar, description=f"{label}: evaluation")
                _evaluate(place, student, folder)
            except (ValueError, OSError) as error:
                problems.append(f"{label}: {error}")
            progress.advance(bar)

        for run in (None, *first):
            do(run)
        for seed in range(2, study.seeds + 1):
            for arm in arms:
                do(replace(place.chosen(arm), seed=seed))
    return problems


def _claim(place: Workplace) -> None:
    """The settings that all runs of a folder share; seeds and arms may be added later."""
    recipe = load_recipe(place.study.recipe) if place.study.recipe else {}
    settings = {
        "overrides": list(place.overrides),
        "items_per_task": place.study.items_per_task,
        "recipe": {k: v for k, v in recipe.items() if v is not None},
    }
    path = place.out / "study.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{place.out} holds a study with other settings ({path}): choose another --out."
        )
    place.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _make(place: Workplace, run: Run) -> None:
    """The student of a run, unless it is there."""
    folder, study = place.folder(run), place.study
    asked = replace(run.arm.merge, **run.setting) if run.arm.merge else run.arm.command
    source = None  # of what is made of another arm's student
    if asked and asked.of != study.start:
        source = replace(place.chosen(*study.choose([asked.of])), seed=run.seed)
    if asked is None:
        made_by = shlex.join(run.arm.flags(study.recipe, run.setting))
    else:
        made_by = f"{asked} of {source.name if source else study.start}"
    note = folder.with_name(f"{folder.name}.arm")
    if (folder / run_files.STUDENT / "config.json").is_file():
        if note.is_file() and note.read_text(encoding="utf-8") != made_by:
            raise ValueError(f"it was made otherwise: remove {folder}, or call the arm otherwise.")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    if asked is None:
        _train(place, run, folder, _budget_flags(place, run))
    else:
        student, out = study.shared["student"], folder / run_files.STUDENT
        if source:
            student = str(place.folder(source) / run_files.STUDENT)
        pair = {"student": student, "lm": study.shared["teacher"]}
        if run.arm.command:
            words = filled(asked.run, **pair, seed=run.seed, out=out, **run.setting)
            _run(place, folder, words[0], words)
        else:
            words = ["merge", "--student", student, "--lm", pair["lm"], "--weight", asked.weight]
            words += ["--layers", asked.layers] if asked.layers else []
            _run(place, folder, "merging", [*words, "--out", out], "ldistill.cli")
    note.write_text(made_by, encoding="utf-8")


def _train(place: Workplace, run: Run, folder: Path, extra: Sequence[str]) -> None:
    words = [*run.arm.flags(place.study.recipe, run.setting), "--seed", run.seed]
    words += ["--output_dir", folder, "--evaluate", "false", "--disable_tqdm", "true"]
    words += ["--overwrite", "true", *place.overrides, *extra]
    _run(place, folder, "training", words, "ldistill.train")


def _run(
    place: Workplace, folder: Path, what: str, words: Sequence[object], module: str | None = None
) -> None:
    """Run a command, or a module with these words; ValueError, with what it said, if it fails."""
    log = folder.with_name(f"{folder.name}.train.log")
    programs = place.programs
    if status := programs.run(module, words, log) if module else programs.call(words, log):
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [f" ({line.removeprefix('error: ')})" for line in said if "error: " in line[:7]]
        raise ValueError(
            f"{what} ended with status {status}{''.join(errors[-1:])}; its output is "
            f"in {log}. The same command tries it again."
        )


def _budget_flags(place: Workplace, run: Run) -> list[str]:
    """`--max_steps` of a budget; how much a step takes is measured on the first two."""
    for unit, amount in run.arm.budget.items():
        if isinstance(amount, str):
            like = place.folder(replace(place.chosen(*place.study.choose([amount])), seed=run.seed))
            amount = cost(like)[unit]
        if unit != "steps":
            probe = place.folder(run).with_name(f"{run.name}.probe")
            flags = ["--max_steps", str(PROBE_STEPS), "--logging_steps", "1"]
            _train(place, run, probe, [*flags, "--save_strategy", "no"])
            took = cost(probe)
            amount = math.ceil(amount * took["steps"] / took[unit])
            shutil.rmtree(probe)
        return ["--max_steps", str(amount)]
    return []


def cost(folder: Path) -> dict[str, float]:
    """Steps, tokens, FLOPs and seconds that the training in a folder took; 0 without one."""
    records = read_metrics(folder / run_files.METRICS)
    return {
        "steps": records[-1]["step"] if records else 0,
        "tokens": sum(r["tokens"] for r in records),
        "flops": sum(r.get("flops", 0.0) for r in records),
        "seconds": sum(r["tokens"] / r["tokens_per_second"] for r in records),
    }


def _evaluate(place: Workplace, student: str, folder: Path) -> None:
    def run(asked: Evaluation, config: Path) -> int:
        words = ("--config", config, "--verbosity", "DEBUG")
        return place.programs.run("lmms_eval", words, asked.out / LOG)

    study, out = place.study, folder / "eval"
    record = read_evaluation(out)
    if record is None or not record["complete"]:
        include = tuple(Path(path) for path in study.include)
        options = {"include_paths": include, "items_per_task": study.items_per_task}
        asked = Evaluation(student, out, study.suite, study.tasks, **options)
        evaluate(asked, run=None if torch.cuda.device_count() > 1 else run)
    measured, log = folder / MEASURED, folder / "measure.log"
    if study.measure and not measured.is_file():
        part = measured.with_suffix(".part")
        words = filled(study.measure, student=resolve(student), out=part)
        if status := place.programs.call(words, log):
            raise ValueError(f"{words[0]} ended with status {status}; its output is in {log}.")
        part.rename(measured)
