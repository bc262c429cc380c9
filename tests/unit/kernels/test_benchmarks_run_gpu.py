"""run_gpu.sh without a GPU: a stand-in for Python notes what is started, and fails at times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "kernels" / "benchmarks"
SCRIPT = (BENCHMARKS / "run_gpu.sh").read_text().replace("\\\n", " ")
CALLS = {"measure": 8, "sweep": 10, "profile": 8}  # minutes
STAND_IN = """#!/bin/sh
case "$*" in
    *get_device_name*) echo "$DEVICE" ;;
    *"FAILING"*) exit 3 ;;
    *) echo "$*" ;;
esac
"""
OURS = """#!/bin/sh
echo "$*"
"""


@pytest.fixture
def started(tmp_path: Path):
    """(exit status, unpacked results, standard output) of a call on a pretended device."""

    def run(
        call: str, device: str = "NVIDIA H100 80GB HBM3", failing: str = "no such words"
    ) -> tuple:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        for name, text in (
            ("python", STAND_IN.replace("FAILING", failing)), ("ncu", OURS),
        ):  # fmt: skip
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        environment = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": str(programs / "python"), "DEVICE": device,
        }  # fmt: skip
        command = ["bash", str(BENCHMARKS / "run_gpu.sh"), *call.split(), "out/results.tar.gz"]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        archive = tmp_path / "out" / "results.tar.gz"
        if archive.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(tmp_path / "unpacked", filter="data")
        return done.returncode, tmp_path / "unpacked", done.stdout + done.stderr

    return run


def steps(call: str) -> list[list[str]]:
    """The words of the steps of a call."""
    body = re.search(rf"^{call}\(\) {{\n(.*?)^}}", SCRIPT, re.DOTALL | re.MULTILINE)[1]
    lines = (line.strip() for line in body.splitlines())
    return [line.split() for line in lines if line.startswith("step ")]


@pytest.mark.parametrize("call", CALLS)
def test_one_archive_holds_the_log_of_every_step(started, call, tmp_path):
    status, unpacked, said = started(call)
    assert status == 0, said
    (folder,) = unpacked.iterdir()
    assert folder.name == f"NVIDIA-H100-80GB-HBM3-{call}"
    named = {words[1].strip('"') for words in steps(call)}
    if call == "profile":
        named = named - {"step-$kernels"} | {"step-auto", "step-reference"}
    assert {path.stem for path in folder.glob("*.txt")} == named | {"environment"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.tar.gz"]
    assert str(tmp_path / "out" / "results.tar.gz") in said


def test_a_failing_step_does_not_end_the_run_and_is_named(started):
    status, unpacked, said = started("measure", failing="attention.py --seconds")
    assert status == 1
    (folder,) = unpacked.iterdir()
    assert (folder / "failed.txt").read_text() == "attention: status 3\n"
    assert "attention: status 3" in said
    assert (folder / "goals.txt").exists()  # comes after the step that failed


@pytest.mark.parametrize(
    ("call", "device", "message"),
    [("measure", "", "no CUDA device"), ("everything", "H100", "measure, sweep or profile")],
)
def test_what_cannot_run_starts_nothing(started, call, device, message):
    status, unpacked, said = started(call, device)
    assert status == 2
    assert not unpacked.exists()
    assert message in said


@pytest.mark.parametrize("call", CALLS)
def test_benchmarks_understand_what_they_are_started_with(started, monkeypatch, call):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("attention", "loss", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import attention
    import loss

    _, unpacked, _ = started(call)
    modules, understood = {"attention": attention, "loss": loss}, 0
    for log in unpacked.glob("*/*.txt"):
        words = log.read_text().splitlines()[0].split()
        for name, module in modules.items():
            script = f"kernels/benchmarks/{name}.py"
            if script in words:
                module.parse(words[words.index(script) + 1 :])
                understood += 1
    assert understood == {"measure": 4, "sweep": 2, "profile": 4}[call]


@pytest.mark.parametrize(("call", "minutes"), CALLS.items())
def test_it_ends_in_time(call, minutes):
    """Time limits of the steps, those that run side by side counted once, and of what is before."""
    limits = [(int(words[2]), words[-1] == "&") for words in steps(call)]
    together = max((limit for limit, beside in limits if beside), default=0)
    alone = sum(limit for limit, beside in limits if not beside)
    if call == "profile":
        alone += next(int(words[2]) for words in steps(call) if "$kernels" in words[1])  # twice
    before = sum(map(int, re.findall(r"timeout (\d+)", SCRIPT)))
    start = 10  # asking for the device's name imports torch
    assert start + before + together + alone <= minutes * 60


RESERVES = {  # what the benchmark that is begun last may take
    ("measure", "attention"): 50, ("measure", "loss"): 25, ("measure", "warm-attention"): 30,
    ("measure", "warm-loss"): 30, ("sweep", "attention-sweep"): 40, ("sweep", "loss-sweep"): 25,
    ("profile", "attention"): 45, ("profile", "loss"): 25,
}  # fmt: skip


@pytest.mark.parametrize(("call", "name"), RESERVES)
def test_what_is_begun_last_can_end(call, name):
    """A step that is killed loses what it has not yet written: the figure, the whole sweep."""
    words = next(words for words in steps(call) if words[1] == name)
    assert int(words[2]) - int(words[words.index("--seconds") + 1]) >= RESERVES[call, name]
