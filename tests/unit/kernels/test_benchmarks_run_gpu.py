"""run_gpu.sh without a GPU: a stand-in for Python notes what is started, and fails at times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "kernels" / "benchmarks"
SCRIPT = BENCHMARKS / "run_gpu.sh"
STAND_IN = """#!/bin/sh
case "$*" in
    *get_device_name*) echo "$DEVICE" ;;
    *sweep*) exit 3 ;;
    *) echo "$*" ;;
esac
"""


@pytest.fixture
def started(tmp_path: Path):
    """(exit status, results folder, standard output) of a run on a pretended device."""

    def run(device: str) -> tuple[int, Path, str]:
        python = tmp_path / "python"
        python.write_text(STAND_IN)
        python.chmod(0o755)
        out = tmp_path / "results"
        environment = {**os.environ, "PYTHON": str(python), "DEVICE": device}
        command = ["bash", str(SCRIPT), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, out, done.stdout + done.stderr

    return run


def test_a_failing_step_does_not_end_the_run_and_is_named(started):
    status, out, said = started("NVIDIA H100 80GB HBM3")
    assert status == 1
    assert (out / "failed.txt").read_text() == "attention-sweep: status 3\n"
    assert "attention-sweep: status 3" in said
    steps = {path.stem for path in out.glob("*.txt")} - {"environment", "failed"}
    named = set(re.findall(r"^step (\S+)", SCRIPT.read_text(), re.MULTILINE))
    assert steps == named
    assert "loss" in steps  # comes after the step that failed


def test_without_a_device_nothing_is_started(started):
    status, out, said = started("")
    assert status == 2
    assert not out.exists()
    assert "no CUDA device" in said


def test_benchmarks_understand_what_they_are_started_with(started, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("attention", "loss", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import attention
    import loss

    _, out, _ = started("NVIDIA H100 80GB HBM3")
    for name, module in (("attention", attention), ("attention-sweep", attention), ("loss", loss)):
        words = (out / f"{name}.txt").read_text().splitlines()[0].split()
        options = module.parse(words[words.index(f"kernels/benchmarks/{module.__name__}.py") + 1 :])
        assert options.csv == str(out / f"{name}.csv")
        assert options.seconds > 0


STEPS = [
    line
    for line in SCRIPT.read_text().replace("\\\n", " ").splitlines()
    if line.startswith("step ")
]


def test_it_ends_within_eight_minutes():
    """Time limits of the steps, those that run side by side counted once, and of what is before."""
    limits = [(int(line.split()[2]), line.endswith("&")) for line in STEPS]
    together = max(limit for limit, beside in limits if beside)
    before = sum(map(int, re.findall(r"timeout (\d+)", SCRIPT.read_text())))
    start = 10  # asking for the device's name imports torch
    assert start + before + together + sum(n for n, beside in limits if not beside) <= 8 * 60


@pytest.mark.parametrize(
    ("name", "reserve"), [("attention", 50), ("attention-sweep", 15), ("loss", 25)]
)
def test_what_is_begun_last_can_end(name, reserve):
    """A step that is killed loses what it has not yet written: the figure, the whole sweep."""
    words = next(line.split() for line in STEPS if line.split()[1] == name)
    assert int(words[2]) - int(words[words.index("--seconds") + 1]) >= reserve
