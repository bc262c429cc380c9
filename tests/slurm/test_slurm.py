"""The scripts of `slurm/` on a real two-node SLURM: runs, preemption, crashes, mistakes, arrays."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers_data import digests, make_student, picture
from runs import REPO, losses
from slurm_cluster import Cluster, CommandFailed, job_port, missing_programs
from typer.testing import CliRunner

from ldistill.checkpoint.logs import read_metrics
from ldistill.common.errors import ERROR_EXIT_CODE
from ldistill.recipe import load_recipe, shipped_recipes
from ldistill.tiny.prepare import prepare
from ldistill.tools.shards.commands import app
from ldistill.training.stopping import STOPPED_EXIT_CODE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no {', '.join(missing_programs())}: apt-get install slurm-wlm munge",
    ),
    pytest.mark.timeout(1800),  # a requeued job waits until its old credential has expired
]
STEPS = 40
CPU = ("--gpus-per-node=0",)
BOTH = ("--nodes=2", *CPU)
SCRIPTS = ("selective", "uniform", "baseline", "variants", "llava7b", "llava13b")


@pytest.fixture(scope="module")
def cluster():
    made = Cluster()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The tiny recipe in a few small steps."""
    root = tmp_path_factory.mktemp("slurm")
    data = prepare(root / "cache", samples_per_source=12, items_per_task=2)
    values = load_recipe("tiny") | {"prepare": None, "shards": str(data.shards)}
    values |= {"global_batch_size": 4, "per_device_train_batch_size": 2, "logging_steps": 1}
    values |= {"max_steps": STEPS, "save_steps": 5, "health_steps": 0, "disable_tqdm": True}
    (root / "tiny.yaml").write_text(yaml.safe_dump(values))
    return root


def submit(cluster, world: Path, name: str, *args: str, script="selective", flags=BOTH, **env):
    env = {"RECIPE": str(world / "tiny.yaml"), "SHARDS": "", "OUTPUT_DIR": str(world / name)} | env
    return cluster.submit(script, *args, log=world / f"{name}.log", flags=flags, **env)


def text_of(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def wait_for_step(cluster, folder: Path, step: int) -> None:
    file = folder / "metrics.jsonl"
    cluster.until(lambda: text_of(file).count("\n") >= step, f"step {step} in {folder}")


def ended(cluster, job: str, state: str, code: str, log: Path) -> dict[str, str]:
    """What SLURM says of a job that must have ended so."""
    [shown] = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"]) == (state, code), log.read_text()[-4000:]
    return shown


def test_a_preempted_run_goes_back_to_the_queue_and_gives_the_undisturbed_losses(cluster, world):
    whole, cut = world / "whole", world / "cut"
    job = submit(cluster, world, whole.name)
    shown = ended(cluster, job, "COMPLETED", "0:0", world / "whole.log")
    assert shown["NumNodes"] == "2"
    assert len(losses(whole)) == STEPS
    assert (whole / "student" / "model.safetensors").is_file()

    job = submit(cluster, world, cut.name)
    rank = cluster.rank(job, 1)
    wait_for_step(cluster, cut, 2)
    rank.suspend()  # the steps that are left are over sooner than a busy machine passes a signal on
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what SLURM sends before the limit
    cluster.until(lambda: "told to stop" in text_of(world / "cut.log"), "the signal")
    rank.resume()
    cluster.wait_for_restart(job, 1)
    shown = ended(cluster, job, "COMPLETED", "0:0", world / "cut.log")
    assert shown["Restarts"] == "1"
    text = (world / "cut.log").read_text()
    [stopped] = re.findall(rf"stopped on request .*{cut}/checkpoint-(\d+) is saved", text)
    assert 2 <= int(stopped) < STEPS
    assert "back to the queue" in text
    assert [r["step"] for r in read_metrics(cut / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert losses(cut) == losses(whole)
    assert not (cut / "stopped.json").exists()
    assert not list((REPO / "slurm" / "logs").glob(f"*-{job}"))


def test_a_killed_rank_ends_the_job(cluster, world):
    folder, log = world / "killed", world / "killed.log"
    long = ("--max_steps", "5000")  # no machine is through before the kill
    job = submit(cluster, world, folder.name, *long, MAX_CRASHES="0")
    rank = cluster.rank(job, 1)
    wait_for_step(cluster, folder, 1)
    rank.kill()
    [shown] = cluster.wait(job)
    text = log.read_text()
    assert shown["JobState"] == "FAILED", text
    # The status of the rank that was killed, or of the one that lost its peer.
    [code] = re.findall(r"crashed with (\d+) 1 times without getting further; not tried", text)
    assert shown["ExitCode"] == f"{code}:0"
    assert not cluster.leftovers(job)
    assert not (folder / "student").exists()


def test_mistakes_end_the_job_at_once_with_a_sentence(cluster, world):
    """No GPU where the script asks for one; a run folder that another job is writing to."""
    if torch.cuda.is_available():
        pytest.skip("the node would find a GPU")
    job = submit(cluster, world, "blind", flags=())  # as the script says: one node, one GPU
    ended(cluster, job, "FAILED", "2:0", world / "blind.log")
    text = (world / "blind.log").read_text()
    assert "the job asked for 1 GPUs a node, but PyTorch finds none" in text
    assert "trying again" not in text
    (world / "busy").mkdir()
    sleeper = cluster.sleeper(3600)
    try:
        cluster.until(lambda: cluster.show(sleeper)[0]["JobState"] == "RUNNING", "the other job")
        (world / "busy" / "slurm_job").write_text(sleeper)
        job = submit(cluster, world, "busy", flags=CPU)
        ended(cluster, job, "FAILED", "2:0", world / "busy.log")
    finally:
        cluster.call("scancel", sleeper)
    assert f"job {sleeper} is writing to" in (world / "busy.log").read_text()


# ---- what the scripts do with exit codes, with stand-ins for the ranks ----


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> dict[str, str]:
    """Environment in which `python` is `stand_in_train.sh`."""
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "python").symlink_to(REPO / "tests" / "support" / "stand_in_train.sh")
    return {"SETUP": f"export PATH={folder}:$PATH", "BACKOFF": "1"}


def test_crashes_are_tried_again_while_there_is_progress_and_not_for_ever(cluster, world, stand_in):
    job = submit(cluster, world, "crashes", FAULT="crash", MAX_CRASHES="2", **stand_in)
    [shown] = cluster.wait(job)
    assert shown["JobState"] == "FAILED"
    assert shown["Restarts"] == "0"
    text = (world / "crashes.log").read_text()
    assert re.findall(r"trying again in (\d+) s", text) == ["1", "2"], "the pauses grow"
    assert "3 times without getting further" in text
    job = submit(cluster, world, "progress", FAULT="progress", MAX_CRASHES="1", **stand_in)
    ended(cluster, job, "COMPLETED", "0:0", world / "progress.log")
    assert (world / "progress.log").read_text().count("trying again in 1 s") == 3


def test_a_mistake_of_one_rank_is_no_crash(cluster, world, stand_in):
    """srun's own status is that of the rank it killed as the other one left."""
    job = submit(cluster, world, "mistake", FAULT="mistake", **stand_in)
    ended(cluster, job, "FAILED", "2:0", world / "mistake.log")
    assert "trying again" not in (world / "mistake.log").read_text()


def test_requeues_are_bounded_and_keep_the_job(cluster, world, stand_in):
    log, steps = world / "bounded.log", world / "bounded" / "step"
    options = {"MAX_REQUEUES": "1"} | stand_in
    job = submit(cluster, world, "bounded", "--max_steps", "400", **options)
    for start in (1, 2):
        cluster.until(lambda n=start: text_of(log).count("2 ranks, 1 here") == n, f"start {start}")
        before = text_of(steps)
        cluster.until(lambda b=before: text_of(steps) != b, "a step")
        cluster.call("scancel", "--batch", "--signal=USR1", job)
        cluster.wait_for_restart(job, 1)
    ended(cluster, job, "FAILED", f"{STOPPED_EXIT_CODE}:0", log)
    text = log.read_text()
    starts = re.findall(r"from (\d+): 2 ranks, 1 here, 127.0.0.1:(\d+)", text)
    assert [int(step) > 0 for step, _ in starts] == [False, True]
    assert [port for _, port in starts] == [job_port(job), job_port(job, restarts=1)]
    assert "back in the queue 1 times already" in text


def test_variants_are_an_array_with_a_run_folder_each(cluster, world, stand_in):
    options = {"script": "variants", "flags": ("--array=0-1", *CPU)} | stand_in
    recipes = f"lingudistill {world / 'other.yaml'}"
    job = submit(cluster, world, "variants", "--max_steps", "1", RECIPE=recipes, **options)
    assert [t["JobState"] for t in cluster.wait(job)] == ["COMPLETED"] * 2
    for name in ("lingudistill", "other"):
        assert (world / "variants" / name / "step").read_text() == "1\n"


def test_shards_of_an_array_are_those_of_one_machine(cluster, tmp_path):
    """Two sources in two slices each, over two tasks; a dependent job joins them."""
    records = []
    for number in range(21):
        (tmp_path / f"{number}.png").write_bytes(picture(seed=number))
        talk = [{"from": "human", "value": f"<image>q{number}"}, {"from": "gpt", "value": "yes"}]
        source = ("vsr", "docvqa")[number % 2]
        records.append(
            {"id": f"{number}", "image": f"{number}.png", "conversations": talk, "source": source}
        )
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    student = make_student(tmp_path / "student")
    common = ["--dataset", str(tmp_path / "mixed.json"), "--student", str(student)]
    common += ["--workers", "1", "--shard-size", "10KB", "--out"]
    many = str(tmp_path / "many")
    job = cluster.submit(
        "shards", *common, many, log=tmp_path / "shards-%a.log", flags=("--array=1-3:2",),
        SOURCES="vsr,docvqa", SLICES="2",
    )  # fmt: skip
    after = (f"--dependency=afterok:{job}",)
    merge = cluster.submit("merge", many, log=tmp_path / "merge.log", flags=after)
    result = CliRunner().invoke(app, ["build", *common, str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    ended(cluster, merge, "COMPLETED", "0:0", tmp_path / "merge.log")
    assert "vsr, slice 2/2" in (tmp_path / "shards-3.log").read_text()
    assert digests(tmp_path / "many") == digests(tmp_path / "one")


def test_scripts_ask_for_what_exists(cluster, tmp_path):
    """Every script up to the command of its ranks, which is printed instead of run."""
    jobs = {}
    for script in SCRIPTS:
        flags = ("--nodes=1", "--ntasks-per-node=1", *CPU)
        flags += ("--array=6",) if script == "variants" else ()
        options = {"CONTAINER": "echo", "OUTPUT_DIR": str(tmp_path / "out" / script)}
        log = tmp_path / f"{script}.log"
        jobs[script] = cluster.submit(script, "--alpha", "0.1", log=log, flags=flags, **options)
    for script, job in jobs.items():
        cluster.wait(job)
        text = text_of(tmp_path / f"{script}.log")
        [config] = re.findall(r"--deepspeed (\S+)", text)
        [recipe] = re.findall(r"--recipe (\S+)", text)
        assert (REPO / config).is_file()
        assert recipe in (*shipped_recipes(), "llava-7b", "llava-13b")
        assert f"--output_dir {tmp_path / 'out' / script}" in text
        typed = re.search(r"--shards shards( .*)? --alpha 0\.1$", text, re.M)
        assert typed, "the user's arguments come last"


def test_a_job_without_gpus_never_waits_for_cores_that_no_node_has(cluster, tmp_path):
    """The nodes have one core, the script asks for 8 with each GPU: refused at once, or run."""
    options = {"CONTAINER": "echo", "OUTPUT_DIR": str(tmp_path / "out")}
    flags = (*CPU, "--cpus-per-gpu=8")  # the script's own
    refused = ""
    try:
        job = cluster.submit("selective", log=tmp_path / "log", flags=flags, **options)
    except CommandFailed as error:
        refused = str(error)
    if refused:
        assert "Requested node configuration is not available" in refused
    else:
        ended(cluster, job, "COMPLETED", "0:0", tmp_path / "log")


def test_evaluation_waits_for_the_run(cluster, world, tmp_path):
    first = cluster.sleeper(2)
    flags = (*CPU, f"--dependency=afterok:{first}")
    env = {"CONTAINER": "echo", "OUTPUT_DIR": "runs/mine"}
    job = cluster.submit("eval", "--limit", "5", log=tmp_path / "log", flags=flags, **env)
    ended(cluster, job, "COMPLETED", "0:0", tmp_path / "log")
    expected = "ldistill eval --student runs/mine/student --suite paper --out runs/mine/eval"
    assert f"{expected} --limit 5" in (tmp_path / "log").read_text()


def test_exit_codes_of_scripts_and_program_agree():
    """What the shell takes for a stop or a mistake is what train.py means by it."""
    text = (REPO / "slurm" / "common.sh").read_text()
    assert f"\nSTOPPED={STOPPED_EXIT_CODE} " in text
    assert f"\nMISTAKE={ERROR_EXIT_CODE} " in text
