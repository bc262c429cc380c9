"""A study file: which arms are compared, with which settings, seeds, budget and tasks.

docs/study.md shows one. Every combination of an arm's grid is a setting. All settings run with seed
1; the one that is best on the validation part runs with the other seeds, and is what is reported.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

import ldistill.tiny.suite  # noqa: F401 - makes the suite `tiny` known
from ldistill.common.errors import did_you_mean
from ldistill.evaluation.suites import suite
from ldistill.recipe import load_recipe, parse, recipe_differences

Grid = Mapping[str, Sequence[Any] | None]  # field → values
BUDGETS = ("steps", "tokens", "flops")


@dataclass(frozen=True)
class Merge:
    """An arm that averages a decoder with the LM instead of training; see `ldistill merge`."""

    of: str  # the arm whose student it is, or the study's `start`
    weight: float | str = 0.5
    layers: str | None = None


@dataclass(frozen=True)
class Command:
    """An arm that another program makes of an arm's student."""

    of: str  # as a merge's
    run: str  # its words, with {student}, {lm}, {seed}, {out} and {FIELD}s of the grid to fill in


@dataclass(frozen=True)
class Run:
    """One arm with one setting and one seed."""

    arm: Arm
    setting: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """Of its folder below the seed's."""
        parts = (f"{k}-{v}".replace(":", "-") for k, v in self.setting.items())
        return "--".join([self.arm.name, *parts])


@dataclass(frozen=True)
class Arm:
    """One way to get a student from the start."""

    name: str
    recipe: str | None = None  # a shipped one, whose differences from the shared fields it has
    fields: Mapping[str, Any] = field(default_factory=dict)  # further ones of the recipe
    merge: Merge | None = None
    command: Command | None = None
    grid: Grid = field(default_factory=dict)  # over the study's; None takes a field out of that
    budget: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def of(self) -> str | None:
        """The arm whose student it is made of; None: it trains."""
        return getattr(self.merge or self.command, "of", None)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the grid."""
        grid = {name: values for name, values in self.grid.items() if values}
        return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]

    def flags(self, shared: str | None, setting: Mapping[str, Any]) -> list[str]:
        """What a setting differs in from the shared recipe (None: from its own), for train.py."""
        values = recipe_differences(self.recipe) if shared and self.recipe else {}
        flags = {"recipe": shared or self.recipe or "tiny", **values, **self.fields, **setting}
        return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Study:
    """What a study file says: docs/study.md."""

    arms: tuple[Arm, ...]
    baseline: str  # the arm that the others are compared with
    title: str = "The study"
    main: str = ""  # the arm that the study is about: marked in pictures
    start: str = "adapted"  # what the report calls the student before training
    launch: str = "here"  # commands: it is printed, or submitted to SLURM, instead of run here
    recipe: str | None = None
    suite: str | None = None
    tasks: Sequence[str] = ()
    include: Sequence[str] = ()
    items_per_task: int | None = None
    measure: str = ""  # a command: {student} to {out}, a JSON of task → document → score
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of the suite, or tasks
    axes: Sequence[str] = ()  # the groups along and up in the picture; default reading, language
    seeds: int = 3
    # Of every arm that trains; its own come over them.
    fields: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, int | str] = field(default_factory=dict)
    grid: Grid = field(default_factory=dict)
    validation: float = 0.0  # share of the documents that choose among the settings

    @property
    def shared(self) -> dict[str, Any]:
        """Fields that all arms share, student and teacher among them."""
        return load_recipe(self.recipe or self.choose([self.baseline])[0].recipe or "tiny")

    def choose(self, names: Sequence[str]) -> list[Arm]:
        """Arms of these names, without any all; ValueError for one that is not there."""
        known = {arm.name: arm for arm in self.arms}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no variant {unknown[0]!r}; there are: {', '.join(known)}.")
        return [known[name] for name in names or known]


def filled(command: str, **values: Any) -> list[str]:
    """Words of a command with values in it; KeyError for one that is not there."""
    return [word.format(**values) for word in shlex.split(command)]


def load_study(name: str, **given: Any) -> Study:
    """A shipped study, or a file's; fields that are given and not None come over its own.

    Raises ValueError: no such study, or something in it that cannot be: what and where.
    """
    shipped = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ValueError(f"no study {name!r}. Shipped: {', '.join(shipped)}; or give a YAML file.")
    try:
        study = _read(yaml.safe_load(path.read_text(encoding="utf-8")))
        for problem in _problems(study):
            raise ValueError(problem)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"study {name!r}: {error}") from error
    study = replace(study, **{k: v for k, v in given.items() if v is not None})
    if study.items_per_task and not (study.suite and suite(study.suite).make_tasks):
        raise ValueError(f"study {name!r} has no suite that makes items: its tasks have theirs.")
    return study


def _read(values: Any) -> Study:
    made, arms = _known(values, Study, "the file"), []
    made |= {part: tuple(made.get(part) or ()) for part in ("tasks", "include")}
    if not made.get("arms"):
        raise ValueError("it names no arms.")
    for name, of in made["arms"].items():
        of = {"budget": made.get("budget", {})} | _known(of or {}, Arm, f"arm {name!r}")
        for kind, cls in (("merge", Merge), ("command", Command)):
            if kind in of:
                of[kind] = cls(**_known(of[kind], cls, f"arm {name!r}, {kind}"))
        if not {"merge", "command"} & of.keys():
            of |= {part: made.get(part, {}) | of.get(part, {}) for part in ("fields", "grid")}
        arms.append(Arm(name, **of))
    return Study(**(made | {"arms": tuple(arms)}))


def _known(values: Any, cls: type, where: str) -> dict[str, Any]:
    """A mapping whose keys are fields of `cls`."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of fields to values.")
    names = [f.name for f in fields(cls) if f.name != "name"]
    for key in values:
        if key not in names:
            hint, known = did_you_mean(str(key), names), ", ".join(names)
            raise ValueError(f"unknown field {key!r} in {where}.{hint} There are: {known}.")
    return values


def _problems(study: Study) -> Iterator[str]:
    """Sentences on what cannot be."""
    names = [arm.name for arm in study.arms]
    if study.launch not in ("here", "commands"):
        yield f"launch must be one of here, commands, got {study.launch!r}."
    for role in ("baseline", "main"):
        if (name := getattr(study, role)) and name not in names:
            yield f"{role} {name!r} is no arm; there are: {', '.join(names)}."
    if not (study.suite or study.tasks):
        yield "nothing to evaluate: give a suite or tasks."
    if study.suite:
        suite(study.suite)
    yield from _unfilled("measure", study.measure, ("student", "out"))
    if study.axes and (len(study.axes) != 2 or not set(study.axes) <= study.groups.keys()):
        known = ", ".join(study.groups)
        yield f"axes are two of the groups, got {study.axes!r}; there are: {known}."
    if not 0 <= study.validation < 1:
        yield f"validation is a share of the documents below 1, got {study.validation}."
    for number, arm in enumerate(study.arms):
        if len(arm.settings) > 1 and not study.validation:
            yield f"arm {arm.name!r} has several settings: `validation` must say what chooses."
        if arm.of and arm.of not in (study.start, *names[:number]):
            yield f"arm {arm.name!r} is made of {arm.of!r}, which is no arm above it."
        for unit, amount in arm.budget.items():
            if unit not in BUDGETS or len(arm.budget) > 1:
                yield f"a budget is one of {', '.join(BUDGETS)}, got {dict(arm.budget)}."
            elif isinstance(amount, str) and amount not in names[:number]:
                yield f"the budget of arm {arm.name!r} names {amount!r}, which is no arm above it."
        for setting in arm.settings:
            if arm.merge:
                replace(arm.merge, **setting)
            elif arm.command:
                known = ("student", "lm", "seed", "out", *setting)
                yield from _unfilled(f"the command of arm {arm.name!r}", arm.command.run, known)
            else:
                parse(arm.flags(study.recipe, setting))
            run = Run(arm, setting, 1).name
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", run):
                yield f"settings name folders, which cannot be called {run!r}."


def _unfilled(what: str, command: str, known: Iterable[str]) -> Iterator[str]:
    try:
        filled(command, **dict.fromkeys(known, ""))
    except (KeyError, ValueError, IndexError) as error:
        yield f"{what} cannot be filled in ({type(error).__name__} {error})."
