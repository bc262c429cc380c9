"""Train or merge, and evaluate, whatever of a study is not there yet.

Each arm is a run of ``train.py`` started as a user would start it, or a merge; each student goes
through lmms-eval. What is finished is kept; what fails is named, and the rest goes on.

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
from ldistill.common.locate import resolve
from ldistill.common.run_files import METRICS, STUDENT
from ldistill.evaluation.lmms_run import LOG, Evaluation, evaluate, read_evaluation
from ldistill.evaluation.suites import SUITES
from ldistill.recipe import load_recipe
from ldistill.tools.study.files import Arm, Run, Study, filled
from ldistill.tools.study.scores import MEASURED, Scores, best_setting, read_scores
from ldistill.tools.study.warm import Warm

PROBE_STEPS = 2


@dataclass(frozen=True)
class Workplace:
    """A study and the folder in which it is run; without a run, what is asked is the start's."""

    study: Study
    out: Path
    overrides: Sequence[str] = ()  # further flags of ``train.py`` for every run

    @cached_property
    def programs(self) -> Warm:
        """What runs training, merging and lmms-eval; offline where all tasks are made here."""
        own = self.study.suite and SUITES[self.study.suite].make_tasks
        return Warm(offline=bool(own) and not self.study.tasks)

    def folder(self, run: Run | None = None) -> Path:
        return self.out / (f"seed-{run.seed}/{run.name}" if run else self.study.start)

    def student(self, run: Run | None = None) -> str:
        return str(self.folder(run) / STUDENT) if run else self.study.shared["student"]

    def scores(self, run: Run | None = None) -> Scores:
        """Of its evaluation, as far as there is one."""
        return read_scores(self.folder(run), self.study.validation)

    def chosen(self, arm: Arm) -> Run:
        """An arm's best setting on the validation part, by the runs of seed 1; the first of one."""
        runs = [Run(arm, setting, 1) for setting in arm.settings]
        return best_setting(self.study, [(run, self.scores(run)) for run in runs])

    def named(self, arm: str, seed: int) -> Run:
        return replace(self.chosen(*self.study.choose([arm])), seed=seed)

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
        bar = progress.add_task("", total=1 + len(first) + (study.seeds - 1) * len(arms))

        def do(run: Run | None) -> None:
            label = f"{run.name}, seed {run.seed}" if run else study.start
            try:
                if run:
                    what = "making" if run.arm.of else "training"
                    progress.update(bar, description=f"{label}: {what}")
                    _make(place, run)
                progress.update(bar, description=f"{label}: evaluation")
                _evaluate(place, run)
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
    study, path = place.study, place.out / "study.json"
    recipe = load_recipe(study.recipe) if study.recipe else {}
    settings = {"overrides": list(place.overrides), "items_per_task": study.items_per_task}
    settings["recipe"] = {k: v for k, v in recipe.items() if v is not None}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != settings:
        other = f"{place.out} holds a study with other settings ({path})"
        raise ValueError(f"{other}: choose another --out.")
    place.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _make(place: Workplace, run: Run) -> None:
    """The student of a run, unless it is there."""
    folder, study, arm, source = place.folder(run), place.study, run.arm, None
    asked = replace(arm.merge, **run.setting) if arm.merge else arm.command
    if asked:
        source = place.named(asked.of, run.seed) if asked.of != study.start else None
        made_by = f"{asked} of {source.name if source else study.start}"
    else:
        made_by = shlex.join(arm.flags(study.recipe, run.setting))
    note = folder.with_name(f"{folder.name}.arm")
    if (folder / STUDENT / "config.json").is_file():
        if note.is_file() and note.read_text(encoding="utf-8") != made_by:
            raise ValueError(f"it was made otherwise: remove {folder}, or call the arm otherwise.")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    student, lm, out = place.student(source), study.shared["teacher"], folder / STUDENT
    if arm.command:
        pair = {"student": student, "lm": lm}
        words = filled(asked.run, **pair, seed=run.seed, out=out, **run.setting)
        _run(place, folder, words[0], words)
    elif asked:
        words = ["merge", "--student", student, "--lm", lm, "--weight", asked.weight]
        words += ["--layers", asked.layers] if asked.layers else []
        _run(place, folder, "merging", [*words, "--out", out], "ldistill.cli")
    else:
        _train(place, run, folder, _budget_flags(place, run))
    note.write_text(made_by, encoding="utf-8")


def _train(place: Workplace, run: Run, folder: Path, extra: Sequence[str]) -> None:
    words = [*run.arm.flags(place.study.recipe, run.setting), "--seed", run.seed]
    words += ["--output_dir", folder, "--evaluate", "false", "--disable_tqdm", "true"]
    words += ["--overwrite", "true", *place.overrides, *extra]
    _run(place, folder, "training", words, "ldistill.train")


def _run(place: Workplace, folder: Path, what: str, words: Sequence[object], module="") -> None:
    """Run a command, or a module with these words; ValueError, with what it said, if it fails."""
    log = folder.with_name(f"{folder.name}.train.log")
    programs = place.programs
    if status := programs.run(module, words, log) if module else programs.call(words, log):
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [f" ({line.removeprefix('error: ')})" for line in said if "error: " in line[:7]]
        ended = f"{what} ended with status {status}{''.join(errors[-1:])}"
        raise ValueError(f"{ended}; its output is in {log}. The same command tries it again.")


def _budget_flags(place: Workplace, run: Run) -> list[str]:
    """`--max_steps` of a budget; how much a step takes is measured on the first two."""
    for unit, amount in run.arm.budget.items():
        if isinstance(amount, str):
            amount = cost(place.folder(place.named(amount, run.seed)))[unit]
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
    records = read_metrics(folder / METRICS)
    found = {unit: sum(r.get(unit, 0) for r in records) for unit in ("tokens", "flops")}
    found["seconds"] = sum(r["tokens"] / r["tokens_per_second"] for r in records)
    return {"steps": records[-1]["step"] if records else 0, **found}


def _evaluate(place: Workplace, run: Run | None) -> None:
    def start(asked: Evaluation, config: Path) -> int:
        words = ("--config", config, "--verbosity", "DEBUG")
        return place.programs.run("lmms_eval", words, asked.out / LOG)

    study, student, folder = place.study, place.student(run), place.folder(run)
    record = read_evaluation(folder / "eval")
    if record is None or not record["complete"]:
        options = {"include_paths": tuple(map(Path, study.include))}
        options |= {"tasks": study.tasks, "items_per_task": study.items_per_task}
        asked = Evaluation(student, folder / "eval", study.suite, **options)
        evaluate(asked, run=None if torch.cuda.device_count() > 1 else start)
    measured, log = folder / MEASURED, folder / "measure.log"
    if study.measure and not measured.is_file():
        part = measured.with_suffix(".part")
        words = filled(study.measure, student=resolve(student), out=part)
        if status := place.programs.call(words, log):
            raise ValueError(f"{words[0]} ended with status {status}; its output is in {log}.")
        part.rename(measured)
