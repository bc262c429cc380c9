"""The same study at the paper's scale: commands to type, or jobs to submit.

Every recipe trains from the same student, each student is evaluated on the paper's suite, and one
comparison follows. What is printed is what would be submitted.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ldistill.recipe import load_recipe
from ldistill.tools.study.variants import BASELINE, ORIGINAL, Variant


@dataclass(frozen=True)
class PaperStudy:
    """Shards, variants and where the runs go."""

    shards: str
    out: Path
    variants: tuple[Variant, ...]
    deepspeed: str = "ds_configs/zero2.json"
    suite: str = "paper"
    slurm: Path = Path("slurm")
    """Folder of the job scripts, for `submit`."""

    def train_flags(self, variant: Variant) -> list[str]:
        """Flags of ``train.py`` for a variant (its recipe, or the main one and its fields)."""
        return ["--recipe", variant.base, *variant.flags_beyond_base(), "--shards", self.shards]

    def run_folder(self, variant: Variant) -> Path:
        return self.out / variant.name


def commands(study: PaperStudy) -> Iterator[str]:
    """One line of shell after another, in the order in which to run them."""
    start = str(load_recipe(BASELINE)["student"])
    yield _evaluate(start, study.out / ORIGINAL, study.suite)
    for variant in study.variants:
        folder = study.run_folder(variant)
        train = ["deepspeed", "ldistill/train.py", "--deepspeed", study.deepspeed]
        train += [*study.train_flags(variant), "--output_dir", str(folder)]
        yield shlex.join(train)
        yield _evaluate(str(folder / "student"), folder / "eval", study.suite)
    yield _compare(study)


def _evaluate(student: str, out: Path, suite: str) -> str:
    return shlex.join(
        ["ldistill", "eval", "--student", student, "--suite", suite, "--out", str(out)]
    )


def _compare(study: PaperStudy) -> str:
    folders = [f"{ORIGINAL}={study.out / ORIGINAL}"]
    folders += [f"{v.name}={study.run_folder(v) / 'eval'}" for v in study.variants]
    options = ["--baseline", BASELINE, "--original", ORIGINAL, "--out", str(study.out / "report")]
    return shlex.join(["ldistill", "compare", *folders, *options])


def submit(study: PaperStudy) -> Iterator[tuple[str, str]]:
    """Submit what `commands` prints, as jobs that wait for one another.

    The start and every variant are evaluated, each variant once its training is done; the
    comparison runs when all of that is over, with the variants that got there.

    Yields:
        Number and purpose of each job.

    Raises:
        FileNotFoundError: no `sbatch`, or no job scripts here.
        ValueError: SLURM refused a job.
    """
    start = str(load_recipe(BASELINE)["student"])
    job = _submit_evaluation(study, start, study.out / ORIGINAL)
    yield job, f"evaluation of {ORIGINAL}"
    evaluated = [job]
    for variant in study.variants:
        folder = study.run_folder(variant)
        environment = {"RECIPE": variant.base, "OUTPUT_DIR": str(folder), "SHARDS": study.shards}
        arguments = ["--deepspeed", study.deepspeed, *variant.flags_beyond_base()]
        trained = _sbatch(study, [str(study.slurm / "selective.sh"), *arguments], environment)
        yield trained, f"training of {variant.name}"
        job = _submit_evaluation(study, str(folder / "student"), folder / "eval", after=trained)
        yield job, f"evaluation of {variant.name}, after {trained}"
        evaluated.append(job)
    # afterany: what failed is left out of the comparison, and named there.
    options = [f"--dependency=afterany:{':'.join(evaluated)}", "--job-name=compare", "--nodes=1"]
    options += ["--ntasks=1", f"--output={study.slurm}/logs/%x-%j.log"]
    script = f"source {study.slurm}/common.sh; on_one {_compare(study)}"
    yield (
        _sbatch(study, [*options, "--wrap", shlex.join(["bash", "-c", script])]),
        f"comparison, after {', '.join(evaluated)}",
    )


def _submit_evaluation(study: PaperStudy, student: str, out: Path, after: str | None = None) -> str:
    options = []
    if after is not None:
        options = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    environment = {"STUDENT": student, "SUITE": study.suite, "EVAL_DIR": str(out)}
    return _sbatch(study, [*options, str(study.slurm / "eval.sh")], environment)


def _sbatch(
    study: PaperStudy, arguments: list[str], environment: Mapping[str, str] | None = None
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
