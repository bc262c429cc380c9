"""A study as commands to type, or as SLURM jobs to submit: what is printed would be submitted."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldistill.common.run_files import STUDENT
from ldistill.tools.study.files import Arm, Run, Study


@dataclass(frozen=True)
class ClusterStudy:
    """A study, where its runs go, and how they are started."""

    study: Study
    out: Path
    arms: Sequence[Arm]
    overrides: Sequence[str] = ()
    deepspeed: str = "ds_configs/zero2.json"
    slurm: Path = Path("slurm")  # folder of the job scripts, for `submit`


# What is evaluated: the start, or what a run leaves; flags are of its train.py.
_Student = namedtuple("_Student", "name student evaluation run flags", defaults=("", ()))


def _students(of: ClusterStudy) -> list[_Student]:
    """The start and every run's student. Raises ValueError: an arm that no job can train."""
    start = of.study.start
    found = [_Student(start, of.study.shared["student"], f"{of.out / start}")]
    for arm in of.arms:
        if arm.of or arm.budget.keys() - {"steps"}:
            needs = f"arm {arm.name!r} needs what other runs gave"
            raise ValueError(f"{needs}: `launch: here` runs it.")
        steps = [f"--max_steps={count}" for count in arm.budget.values()]
        for setting in arm.settings:
            flags = [*arm.flags(of.study.recipe, setting), *steps, *of.overrides]
            if "--shards" not in flags:
                raise ValueError(f"arm {arm.name!r} has no shards: give --shards.")
            run = of.out / Run(arm, setting, 1).name
            found.append(_Student(run.name, f"{run / STUDENT}", f"{run / 'eval'}", f"{run}", flags))
    return found


def commands(of: ClusterStudy) -> Iterator[str]:
    """One line of shell after another, in the order in which to run them. Raises ValueError."""
    students = _students(of)
    suite = ["--suite", of.study.suite] if of.study.suite else []
    for one in students:
        if one.run:
            train = ["deepspeed", "ldistill/train.py", "--deepspeed", of.deepspeed, *one.flags]
            yield shlex.join([*train, "--output_dir", one.run])
        words = ["ldistill", "eval", "--student", one.student, *suite, "--out", one.evaluation]
        yield shlex.join([*words, *_own_tasks(of.study)])
    yield _compare(of, students)


def _own_tasks(study: Study) -> list[str]:
    tasks = [f"--tasks={','.join(study.tasks)}"] if study.tasks else []
    return [*tasks, *(f"--include-path={path}" for path in study.include)]


def _compare(of: ClusterStudy, students: Sequence[_Student]) -> str:
    folders = [f"{one.name}={one.evaluation}" for one in students]
    roles = ["--baseline", of.study.baseline, "--original", of.study.start]
    return shlex.join(["ldistill", "compare", *folders, *roles, "--out", str(of.out / "report")])


def submit(of: ClusterStudy) -> Iterator[str]:
    """Submit what `commands` prints, as jobs that wait for one another; gives a line on each.

    Raises FileNotFoundError without `sbatch` or job scripts here, ValueError where SLURM refuses a
    job, or an arm cannot be one.
    """
    students, evaluated = _students(of), []
    for one in students:
        waits, purpose = [], f"evaluation of {one.name}"
        if one.run:
            _, recipe, *flags = one.flags
            place = flags.index("--shards")
            _, shards = flags[place : place + 2]
            del flags[place : place + 2]
            script = [f"{of.slurm}/selective.sh", "--deepspeed", of.deepspeed, *flags]
            trained = _sbatch(of, script, RECIPE=recipe, OUTPUT_DIR=one.run, SHARDS=shards)
            yield f"submitted  {trained}  training of {one.name}"
            waits = [f"--dependency=afterok:{trained}", "--kill-on-invalid-dep=yes"]
            purpose += f", after {trained}"
        script = [*waits, f"{of.slurm}/eval.sh", *_own_tasks(of.study)]
        settings = {"STUDENT": one.student, "SUITE": of.study.suite or ""}
        evaluated.append(_sbatch(of, script, **settings, EVAL_DIR=one.evaluation))
        yield f"submitted  {evaluated[-1]}  {purpose}"
    # afterany: what failed is left out of the comparison, and named there.
    options = [f"--dependency=afterany:{':'.join(evaluated)}", "--job-name=compare", "--nodes=1"]
    options += ["--ntasks=1", f"--output={of.slurm}/logs/%x-%j.log"]
    script = f"source {of.slurm}/common.sh; on_one {_compare(of, students)}"
    compared = _sbatch(of, [*options, "--wrap", shlex.join(["bash", "-c", script])])
    yield f"submitted  {compared}  comparison, after {', '.join(evaluated)}"


def _sbatch(of: ClusterStudy, arguments: list[str], **environment: str) -> str:
    """Number of a new job; its scripts find `environment` in theirs."""
    common = of.slurm / "common.sh"
    if not common.is_file():
        raise FileNotFoundError(f"no {common}: start this from the repository's folder.")
    command = ["sbatch", "--parsable", "--export=ALL", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"SLURM refused {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
