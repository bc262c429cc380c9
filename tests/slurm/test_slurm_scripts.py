"""The scripts of `slurm/` with stand-ins for SLURM's commands and for train.py, on one rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import REPO

from ldistill.checkpoint.folder import MANIFEST
from ldistill.recipe import parse, shipped_recipes
from ldistill.sources import DOCUMENT, LANGUAGE

JOB = "4711"
GOES_ON = "--resume_from_checkpoint auto --overwrite false"
COMMANDS = {
    "srun": """
while [[ $1 == -* ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_STEP_TASKS_PER_NODE=1
exec "$@" """,
    "scontrol": "[[ $1 == show ]] && echo n1 || exit 1",  # takes no job back: the script ends
    "squeue": 'echo "$STATE"',
    "ldistill": 'echo "built: $*"',
}
SAVE = f'save() {{ mkdir -p "$1" && echo "$RANDOM" > "$1/{MANIFEST}"; }}\n'


class Job:
    """A copy of the scripts where `python` is a piece of shell, told by `start: PORT ARGS`."""

    def __init__(self, root: Path, python: str) -> None:
        self.root, self.run = root, root / "run"
        for folder in ("bin", "ldistill", "slurm/logs"):
            (root / folder).mkdir(parents=True)
        (root / "ldistill" / "train.py").touch()
        for script in (REPO / "slurm").glob("*.sh"):
            (root / "slurm" / script.name).symlink_to(script)
        told = 'echo "start: $MASTER_PORT $*"\n'
        for name, text in (COMMANDS | {"python": SAVE + told + python}).items():
            (root / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (root / "bin" / name).chmod(0o755)

    def start(self, *args: str, script: str = "selective", **env: str) -> subprocess.Popen:
        env = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "SETUP": ":", "BACKOFF": "0",
            "SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "n1", "OUTPUT_DIR": str(self.run),
            "RUN": str(self.run),
        } | env  # fmt: skip
        command = ("bash", f"slurm/{script}.sh", *args)
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.root, env=env, **out)

    def __call__(self, *args: str, **options: str) -> tuple[int, str]:
        process = self.start(*args, **options)
        text, _ = process.communicate(timeout=60)
        return process.returncode, text

    def save(self, step: int) -> None:
        (self.run / f"checkpoint-{step}").mkdir(parents=True)
        (self.run / f"checkpoint-{step}" / MANIFEST).touch()


def fresh(text: str) -> list[bool]:
    """Of every start: whether the command's own arguments count."""
    return [not line.endswith(GOES_ON) for line in re.findall(r"^start: .*", text, re.M)]


@pytest.mark.parametrize(
    "asked", ["--overwrite", "--resume_from_checkpoint=elsewhere/checkpoint-4"]
)
def test_a_checkpoint_of_the_job_ends_what_the_command_asks_at_first(tmp_path, asked):
    """Through crashes and a requeue, beside an old run whose checkpoint is of the same step."""
    python = """
starts=$(($(cat starts) + 1)); echo $starts > starts
case $starts in
  1) exit 1 ;;                                    # nothing done yet: the old run is still there
  2) rm -r "$RUN"/checkpoint-*; exit 1 ;;         # begun, nothing saved
  3) save "$RUN/checkpoint-6"; exit 1 ;;
  4) exit 85 ;;
  5) exit 1 ;;
esac"""
    job = Job(tmp_path, python)
    job.save(6)
    (tmp_path / "starts").write_text("0")
    code, text = job(asked)
    assert (code, fresh(text)) == (85, [True, True, True, False])
    code, text = job(asked, SLURM_RESTART_COUNT="1")
    assert (code, fresh(text)) == (0, [False, False])
    assert not list((tmp_path / "slurm" / "logs").iterdir())
    code, text = job(asked)
    assert (code, fresh(text)) == (0, [True]), "another job, by chance of the same number"


def test_a_job_that_never_started_begins_with_its_command(tmp_path):
    """SLURM counts it as restarted where a node failed before the script."""
    job = Job(tmp_path, "")
    job.save(6)
    code, text = job("--overwrite", SLURM_RESTART_COUNT="1")
    assert (code, fresh(text)) == (0, [True])


def test_what_goes_on_wins_over_the_command():
    asked = "--recipe lingudistill --shards s --overwrite --resume-from-checkpoint=a/checkpoint-4"
    recipe = parse(f"{asked} {GOES_ON}".split())
    assert recipe.training.resume_from_checkpoint == "auto"
    assert recipe.run.overwrite is False


@pytest.mark.parametrize("flag", ["--output_dir {}", "--output_dir={}", "--output-dir {}"])
def test_an_output_folder_among_the_arguments_is_the_one_watched(tmp_path, flag):
    """As it grows, crashes are tried again; another job that writes to it is in the way."""
    python = """
n=$(ls -d other/checkpoint-* 2>/dev/null | wc -l)
((n == 4)) || { save "other/checkpoint-$((n + 1))"; exit 1; }"""
    job = Job(tmp_path, python)
    flags = ("--output_dir", "before", *flag.format("other").split())
    code, text = job(*flags, MAX_CRASHES="1")
    assert code == 0, text
    assert text.count("trying again") == 4
    assert not job.run.exists()
    code, text = job(*flags, SLURM_JOB_ID="4712", STATE=JOB)
    assert code == 2
    assert f"job {JOB} is writing to other" in text


def test_a_stop_between_two_starts_is_one(tmp_path):
    job = Job(tmp_path, "exit 1")
    process = job.start(BACKOFF="60")
    assert any("trying again" in line for line in process.stdout)
    began = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 85, text
    assert "back to the queue" in text
    assert "start:" not in text
    assert time.monotonic() - began < 30


def test_every_start_has_a_port_of_its_own_and_leaves_no_buffers(tmp_path):
    """Ports of neighbouring jobs, which may run on the same node, among them."""
    prefix = f"deepspeed_allreduce_buffer_0_{tmp_path.name}"
    job = Job(tmp_path, f'touch "/dev/shm/{prefix}_${{MASTER_PORT}}_0"; exit 1')
    ports = []
    for number in (JOB, "4712"):
        for restarts in ("0", "1"):
            text = job(SLURM_JOB_ID=number, SLURM_RESTART_COUNT=restarts, MAX_CRASHES="2")[1]
            ports += re.findall(r"^start: (\d+)", text, re.M)
    assert len(set(ports)) == len(ports) == 12
    assert all(20000 <= int(port) < 32000 for port in ports)
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))
    assert "start: 23456 " in job(MASTER_PORT="23456", MAX_CRASHES="1")[1]


def test_a_recipe_that_has_its_shards_is_given_none(tmp_path):
    """`RECIPE=tiny sbatch slurm/selective.sh` needs no folder; what is named in SHARDS counts."""
    job = Job(tmp_path, "")
    of_its_own = [n for n, p in shipped_recipes().items() if "\nprepare:" in p.read_text()]
    assert of_its_own == ["tiny"]  # whose name the scripts know
    (tmp_path / "mine.yaml").write_text("alpha: 0.5\nshards: /data/mine\n")
    (tmp_path / "bare.yaml").write_text("# shards: of the shared folder\nalpha: 0.5\n")
    for recipe, env, expected in (
        ("tiny", {}, []),
        ("mine.yaml", {}, []),
        ("bare.yaml", {}, ["shards"]),
        ("lingudistill", {}, ["shards"]),
        ("lingudistill", {"SHARDS": ""}, []),
        ("tiny", {"SHARDS": "/data/other"}, ["/data/other"]),
    ):
        code, text = job(RECIPE=recipe, **env)
        assert code == 0, text
        assert re.findall(r"--shards (\S+)", text) == expected, recipe


def test_outside_the_repository_an_installed_package_runs(tmp_path):
    """In the folder that `ldistill scripts slurm` wrote; without a package it is a mistake."""
    job = Job(tmp_path, "")
    (tmp_path / "ldistill" / "train.py").unlink()
    code, text = job("--max_steps", "3")
    assert code == 0, text
    assert re.search(r"^start: \d+ -u -m ldistill.train .* --max_steps 3$", text, re.M)
    (tmp_path / "bin" / "python").write_text("#!/usr/bin/env bash\nexit 1\n")
    code, text = job()
    assert code == 2
    assert text.startswith("error: no ldistill here")
    code, text = job(CONTAINER="env", MAX_CRASHES="0")  # which is asked nothing beforehand
    assert "no ldistill here" not in text


def test_cores_are_shared_out_over_the_ranks_of_a_node(tmp_path):
    """Given by GPU, by task, or, where nothing says, those that the job has on the node."""
    job = Job(
        tmp_path, 'echo "cores: $SRUN_CPUS_PER_TASK $OMP_NUM_THREADS ${SLURM_CPUS_PER_GPU-no}"'
    )
    for env, cores in (
        ({"SLURM_CPUS_PER_GPU": "8", "SLURM_CPUS_ON_NODE": "64", "SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_CPUS_PER_GPU": "8", "SLURM_CPUS_ON_NODE": "1", "SLURM_NTASKS_PER_NODE": "1"}, 1),
        ({"SLURM_CPUS_PER_TASK": "16", "SLURM_CPUS_ON_NODE": "16"}, 16),
    ):
        assert f"cores: {cores} {cores} no" in job(**env)[1]


# ---- shards.sh: which task builds what ----


def built(job: Job, ids: list[int], step: int = 1, **env: str) -> list[str]:
    """What the tasks of an array build, or the first one's refusal."""
    text = ""
    array = {"MIN": min(ids), "MAX": max(ids), "COUNT": len(ids), "STEP": step}
    for number in ids:
        known = {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in (array | {"ID": number}).items()}
        code, more = job(script="shards", **known, **env)
        if code:
            assert "built" not in more
            return [more]
        text += more
    return re.findall(r"^(\w+, slice \S+)", text, re.M)


def test_every_slice_is_built_once_whatever_the_numbers_of_the_array(tmp_path):
    job = Job(tmp_path, "")
    (tmp_path / "bin" / "python").write_text("#!/usr/bin/env bash\necho a b c\n")
    everything = sorted(f"{source}, slice {n}/2" for source in "abc" for n in (1, 2))
    for ids, step in ([0, 1, 2], 1), ([0, 2, 4], 2), ([1, 4], 3), ([5], 1):
        assert sorted(built(job, ids, step, SLICES="2")) == everything, ids


def test_units_are_the_sources_that_are_asked_for(tmp_path):
    job = Job(tmp_path, "")
    python = f'#!/usr/bin/env bash\nPYTHONPATH={REPO} exec {sys.executable} "$@"\n'
    (tmp_path / "bin" / "python").write_text(python)
    for asked, names in {
        "full": [*LANGUAGE, *DOCUMENT],
        "lang": LANGUAGE,
        "a,b": ["a", "b"],
    }.items():
        units = built(job, [0, 1], SOURCES=asked)
        assert sorted(units) == sorted(f"{name}, slice 1/1" for name in names), asked


def test_some_tasks_again_need_the_number_of_all(tmp_path):
    job = Job(tmp_path, "")
    (tmp_path / "bin" / "python").write_text("#!/usr/bin/env bash\necho a b c\n")
    [refusal] = built(job, [0, 3], SLICES="2")
    assert refusal.startswith("error: --array is a list.")
    again = built(job, [0, 3], SLICES="2", TASKS="4")
    assert again == ["a, slice 1/2", "c, slice 1/2", "b, slice 2/2"]
    [refusal] = built(job, [4], SLICES="2", TASKS="4")
    assert "numbered 0-3: there is no 4" in refusal
