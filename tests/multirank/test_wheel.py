"""The package: built, installed into an environment of its own, used in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import REPO, environment

from ldistill.checkpoint.logs import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SHORT = ("--recipe", "tiny", "--save_steps", "1", "--logging_steps", "1")
STAND_INS = {  # SLURM's commands, for one rank
    "srun": """while [[ $1 == -* ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_STEP_TASKS_PER_NODE=1
exec "$@" """,
    "scontrol": "[[ $1 == show ]] && echo 127.0.0.1",
    "squeue": ":",
}


def checked(*command: str | Path, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=500, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@dataclass
class Installed:
    """An environment with the wheel, whose other packages are this environment's; a folder."""

    bin: Path
    folder: Path
    env: dict[str, str]

    def __call__(self, *command: str | Path) -> str:
        return checked(*command, cwd=self.folder, env=self.env)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPO)
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Installed:
    root = tmp_path_factory.mktemp("installed")
    checked(sys.executable, "-m", "venv", "--without-pip", root / "venv")
    programs = root / "venv" / "bin"
    [wheel] = dist.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps")
    env = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    checked(*pip, "--no-index", wheel, cwd=root, env=env)
    # The requirements. Their own .pth files are not read from there, so that an editable install
    # of the repository stays out.
    [own] = (root / "venv" / "lib").glob("python*/site-packages")
    (own / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (root / "empty").mkdir()
    path = os.pathsep.join([str(programs), env["PATH"]])
    cache = str(root / "cache")
    return Installed(
        programs, root / "empty", env | {"PATH": path, "LDISTILL_CACHE": cache, "SETUP": ":"}
    )


def test_metadata_and_readme_are_fit_for_an_index(dist):
    assert len(list(dist.iterdir())) == 2
    found = checked(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    assert found.count("PASSED") == 2


def test_the_wheel_holds_what_is_no_module(dist):
    [wheel] = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern, place in (
        ("slurm", "*.sh", "ldistill/slurm"),
        ("ds_configs", "*.json", "ldistill/ds_configs"),
        ("ldistill/recipes", "*.yaml", "ldistill/recipes"),
        ("kernels/benchmarks", "*.py", "ldistill_kernels/benchmarks"),
    ):
        wanted = {f"{place}/{path.name}" for path in (REPO / folder).glob(pattern)}
        assert wanted
        assert wanted <= names


def test_it_trains_in_an_empty_folder_and_goes_on_by_the_written_scripts(installed, tmp_path):
    """Three starts of one run: the command, the SLURM script of the package, `python -m`."""
    shown = installed("python", "-c", "import ldistill, ldistill_kernels as k; print(k.__file__)")
    assert shown.startswith(str(installed.bin.parent))
    run = installed.folder / "runs" / "tiny"

    shown = installed("ldistill", "train", *SHORT, "--max_steps", "2", "--eval_limit", "1")
    assert "held-out items, accuracy" in shown
    assert "| α | 0.7 |" in (run / "student" / "README.md").read_text()

    assert "sbatch slurm/selective.sh" in installed("ldistill", "scripts", "slurm", "--out", "jobs")
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n1", "RECIPE": "tiny"}
    job |= {"OUTPUT_DIR": str(run), "PATH": f"{tmp_path}{os.pathsep}{installed.env['PATH']}"}
    more = ("--max_steps", "3", "--evaluate", "false", *SHORT[2:])
    jobs = installed.folder / "jobs"
    checked("bash", "slurm/selective.sh", *more, cwd=jobs, env=installed.env | job)

    more = (*SHORT, "--max_steps", "3", "--evaluate", "false", "--resume_from_checkpoint", "auto")
    assert "nothing is left to train" in installed("python", "-m", "ldistill", "train", *more)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    found = json.loads((run / "environment.json").read_text())
    assert found["git"] is None  # of whatever folder the package lies in


def test_what_else_it_offers_works_without_the_repository(installed):
    assert "--csv" in installed("ldistill", "bench", "kernels", "loss", "--", "--help")
    assert "lingudistill" in installed("ldistill", "recipes")
    assert "ready to train" in installed("ldistill", "doctor")
