"""The same study at the paper's scale: commands to type, or jobs to submit.

Every recipe trains from the same student, each student is evaluated on the paper's suite, and one
comparison follows. What is printed is what would be submitted.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldistill.recipe import load_recipe
from ldistill.study.variants import BASELINE, ORIGINAL, Variant


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


def submit(study: PaperStudy) -> list[str]:
    """Submit a training job per variant and an evaluation that waits for it.

    Returns:
        The numbers of the jobs.

    Raises:
        FileNotFoundError: no `sbatch`, or no job scripts here.
        ValueError: SLURM refused a job.
    """
    jobs = []
    for variant in study.variants:
        folder = study.run_folder(variant)
        environment = {"RECIPE": variant.base, "OUTPUT_DIR": str(folder), "SHARDS": study.shards}
        train = _sbatch(study.slurm / "selective.sh", environment, variant.flags_beyond_base())
        waiting = {"STUDENT": str(folder / "student"), "SUITE": study.suite}
        waiting["EVAL_DIR"] = str(folder / "eval")
        after = [f"--dependency=afterok:{train}"]
        jobs += [train, _sbatch(study.slurm / "eval.sh", waiting, options=after)]
    return jobs


def _sbatch(
    script: Path,
    environment: dict[str, str],
    arguments: list[str] | None = None,
    options: list[str] | None = None,
) -> str:
    if not script.is_file():
        raise FileNotFoundError(f"no {script}: start this from the repository's folder.")
    exported = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
    command = ["sbatch", "--parsable", f"--export={exported}", *(options or []), str(script)]
    done = subprocess.run([*command, *(arguments or [])], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"SLURM refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
