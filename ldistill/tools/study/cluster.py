"""A study as commands to type, or as SLURM jobs to submit.

Every arm trains from the same student, each student is evaluated, and one comparison follows. What
is printed is what would be submitted.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
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
    slurm: Path = Path("slurm")
    """Folder of the job scripts, for `submit`."""

    def runs(self) -> Iterator[tuple[Run, Path, list[str]]]:
        """Every run with its folder and its flags of ``train.py``.

        Raises:
            ValueError: an arm made of another's, or whose budget must be measured; no shards.
        """
        for arm in self.arms:
            problem = None
            if arm.of or arm.budget.keys() - {"steps"}:
                problem = "needs what other runs gave: `launch: here` runs it."
            elif "--shards" not in (*arm.flags(self.study.recipe, {}), *self.overrides):
                problem = "has no shards: give --shards."
            if problem:
                raise ValueError(f"arm {arm.name!r} {problem}")
            steps = [f"--max_steps={count}" for count in arm.budget.values()]
            for setting in arm.settings:
                run = Run(arm, setting, 1)
                flags = arm.flags(self.study.recipe, setting)
                yield run, self.out / run.name, [*flags, *steps, *self.overrides]


def commands(study: ClusterStudy) -> Iterator[str]:
    """One line of shell after another, in the order in which to run them."""
    runs = list(study.runs())  # before anything is printed
    yield _evaluate(study, study.study.shared["student"], study.out / study.study.start)
    for _, folder, flags in runs:
        train = ["deepspeed", "ldistill/train.py", "--deepspeed", study.deepspeed]
        yield shlex.join([*train, *flags, "--output_dir", str(folder)])
        yield _evaluate(study, str(folder / STUDENT), folder / "eval")
    yield _compare(study)


def _evaluate(study: ClusterStudy, student: str, out: Path) -> str:
    suite = ["--suite", study.study.suite] if study.study.suite else []
    tasks = ["--tasks", ",".join(study.study.tasks)] if study.study.tasks else []
    words = ["ldistill", "eval", "--student", student, *suite, *tasks, "--out", str(out)]
    return shlex.join([*words, *(f"--include-path={path}" for path in study.study.include)])


def _compare(study: ClusterStudy) -> str:
    start, baseline = study.study.start, study.study.baseline
    folders = [f"{start}={study.out / start}"]
    folders += [f"{run.name}={folder / 'eval'}" for run, folder, _ in study.runs()]
    options = ["--baseline", baseline, "--original", start, "--out", str(study.out / "report")]
    return shlex.join(["ldistill", "compare", *folders, *options])


def submit(study: ClusterStudy) -> Iterator[tuple[str, str]]:
    """Submit what `commands` prints, as jobs that wait for one another.

    The start and every arm are evaluated, each arm once its training is done; the comparison runs
    when all of that is over, with the arms that got there.

    Yields:
        Number and purpose of each job.

    Raises:
        FileNotFoundError: no `sbatch`, or no job scripts here.
        ValueError: SLURM refused a job, or an arm cannot be a job.
    """
    start, runs = study.study.start, list(study.runs())
    job = _submit_evaluation(study, study.study.shared["student"], study.out / start)
    yield job, f"evaluation of {start}"
    evaluated = [job]
    for run, folder, (_, recipe, *flags) in runs:
        environment = {"RECIPE": recipe, "OUTPUT_DIR": str(folder)}
        if "--shards" in flags:
            place = flags.index("--shards")
            environment["SHARDS"] = flags[place + 1]
            del flags[place : place + 2]
        arguments = ["--deepspeed", study.deepspeed, *flags]
        trained = _sbatch(study, [str(study.slurm / "selective.sh"), *arguments], environment)
        yield trained, f"training of {run.name}"
        job = _submit_evaluation(study, str(folder / STUDENT), folder / "eval", after=trained)
        yield job, f"evaluation of {run.name}, after {trained}"
        evaluated.append(job)
    # afterany: what failed is left out of the comparison, and named there.
    options = [f"--dependency=afterany:{':'.join(evaluated)}", "--job-name=compare", "--nodes=1"]
    options += ["--ntasks=1", f"--output={study.slurm}/logs/%x-%j.log"]
    script = f"source {study.slurm}/common.sh; on_one {_compare(study)}"
    compared = _sbatch(study, [*options, "--wrap", shlex.join(["bash", "-c", script])])
    yield compared, f"comparison, after {', '.join(evaluated)}"


def _submit_evaluation(
    study: ClusterStudy, student: str, out: Path, after: str | None = None
) -> str:
    options = []
    if after is not None:
        options = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    environment = {"STUDENT": student, "SUITE": study.study.suite or "", "EVAL_DIR": str(out)}
    return _sbatch(study, [*options, str(study.slurm / "eval.sh")], environment)


def _sbatch(
    study: ClusterStudy, arguments: list[str], environment: Mapping[str, str] | None = None
) -> str:
    """Number of a new job; its scripts find `environment` in theirs."""
    common = study.slurm / "common.sh"
    if not common.is_file():
        raise FileNotFoundError(f"no {common}: start this from the repository's folder.")
    done = subprocess.run(
        ["sbatch", "--parsable", "--export=ALL", *arguments],
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"SLURM refused {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
