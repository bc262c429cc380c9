"""Every command of the README and the docs: run here, shortened, or listed with the reason why not.

A command that nobody listed fails the test, and so does one that is listed and not documented.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_data import picture
from runs import REPO
from typer.testing import CliRunner

from ldistill.checkpoint.logs import read_metrics
from ldistill.cli import app
from ldistill.tiny.prepare import STUDENT, TEACHER, prepare
from ldistill.train import main

PAGES = ("README.md", "CONTRIBUTING.md", "docs/results/index.md")
PAGES += tuple(sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")))
PROGRAMS = "ldistill|deepspeed|torchrun|python|pytest|pip|hf|bash|sbatch|srun|scontrol"
INLINE = re.compile(rf"(?:\w+=\S+ )*(?:{PROGRAMS}) \S.*")

# Why a command is not run here: a test that goes the same way, or what this machine has not.
CI = "what .ci/run does"
SUITE = "a part of this suite"
SITE = "belongs to a site"
MESSAGE = "an error message or a form, not a command"
LISTED = {
    "pip install -e . && deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json":
        "test_matrix.py",
    "pip install -e '.[test]' && pytest": CI,
    "pip install -e '.[eval]'": CI,
    "pip install -e '.[lora]'": CI,
    "pip install -e '.[s3]'": CI,
    "pip install -e '.[docs]'": CI,
    "pip install -e '.[test,eval]'": CI,
    "ruff check . && ruff format . && lint-imports": CI,
    "bash .ci/run": CI,
    "pytest": CI,
    "pytest -n 0 FILE": SUITE,
    "ldistill train --recipe tiny": "test_wheel.py",
    "OMP_WAIT_POLICY=active GOMP_SPINCOUNT=300000 ldistill train": "test_environment.py",
    "ldistill train --recipe tiny --max_steps 40 --evaluate false": "test_wheel.py",
    "python -c 'while True: pass'": "keeps a core busy",
    "python -m ldistill_kernels.compile_check --core": "test_compile_check.py",
    "python -m ldistill_kernels.shared_kv_attention.simulate": "test_shared_kv_attention_triton.py",
    "ldistill study FILE.yaml --out study/": "test_study.py",
    "ldistill push runs/lingudistill --repo me/my-vlm": "test_hub.py",
    "hf auth login": "the hub's own",
    "hf upload": "the hub's own",
    "ldistill scripts slurm --out jobs": "test_wheel.py",
    "ldistill merge --student nanovlm/ --lm HuggingFaceTB/SmolLM2-360M-Instruct "
    "--weights 0.1,0.3,0:0.5 --out merged/": "test_merge.py",
    # the hub, with names of the reader's own
    "deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json --recipe mine "
    "--student CHECKPOINT --teacher ITS_LM --shards shards/": "test_runs.py",
    "deepspeed ldistill/train.py --deepspeed ds_configs/zero3.json --recipe llava-7b "
    "--shards shards/ --sources mine": "test_runs_hf.py",
    "ldistill shards build --dataset mine.json --image-root pictures/ --sources mine "
    "--extra-sources mine=language --student llava-hf/llava-1.5-7b-hf --out shards/":
        "test_shards_commands.py",
    "ldistill shards stats shards/ --mix vqav2=2,docvqa=0.5,smoltalk=25%":
        "test_shards_commands.py",
    "deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json --recipe mine --shards shards/ "
    "--mix vqav2=2,docvqa=0.5,smoltalk=25% --alpha vqav2=0.9": "test_resume_runs.py",
    "deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json --recipe mine --shards shards/ "
    "--validation 1% --eval_steps 100 --load_best_model_at_end true --metric_for_best_model ce":
        "test_validation.py",
    "ldistill eval --student runs/mine --suite paper": "test_lmms_eval.py",
    "ldistill export RUN --out DIR": "test_cli.py",
    "ldistill export RUN --out DIR --decoder-only": "test_cli.py",
    "ldistill export google/gemma-3-4b-it --decoder-only --out gemma-3-4b": "test_models.py",
    "ldistill shards build --dataset ...": MESSAGE,
    "torchrun --nproc_per_node=8 train.py": "another project's command",
    # the hub
    "ldistill shards build --dataset HuggingFaceM4/the_cauldron --sources full --out shards/":
        "test_readers.py",
    "ldistill shards build --dataset HuggingFaceM4/the_cauldron --sources full "
    "--student llava-hf/llava-1.5-7b-hf --out shards-llava/": "test_hub_shards.py",
    "deepspeed ldistill/train.py --deepspeed ds_configs/zero3.json --recipe llava-7b "
    "--shards shards-llava/": "test_runs_hf.py",
    "ldistill eval --student lusxvr/nanoVLM-460M-8k --suite paper --out eval/nanovlm":
        "test_lmms_eval.py",
    "ldistill eval --student HuggingFaceTB/SmolLM2-360M-Instruct --tasks arc_easy,hellaswag "
    "--out eval/teacher": "test_lmms_eval.py",
    "ldistill eval --student runs/nanovlm-full --suite paper --out runs/nanovlm-full/eval":
        "test_lmms_eval.py",
    "ldistill eval --student runs/lingudistill --suite paper --out runs/lingudistill/eval":
        "test_lmms_eval.py",
    "hf download NAME": "the hub's own",
    # studies
    "ldistill compare eval/* runs/* --baseline nanovlm-full --original nanovlm --out report/":
        "test_compare.py",
    "ldistill study table3 --seeds 3 --out study/": "test_study.py",
    "ldistill study paper --shards shards --submit": "test_study.py",
    "python -m ldistill.tools.study.on_policy --student runs/labels/student --lm LM "
    "--out repaired/": "test_on_policy.py",
    "pip install -e '.[trl]'": CI,
    # minutes to hours
    "ldistill torture --steps 12 --kills 3": "test_torture.py",
    "ldistill torture --steps 80 --kills 20 --fault none": "test_torture.py",
    "ldistill torture --steps 60 --kills 20 --fault none": "test_torture.py",
    "ldistill torture --kills 0 --fault full-disk --json table.json": "test_torture.py",
    "ldistill bench step --pair nanovlm-460m --dtype bf16 --rows 1 --steps 3 --warmup 1":
        "test_bench_step.py",
    "ldistill bench kernels attention": "test_benchmarks_attention.py",
    "bash kernels/benchmarks/run_gpu.sh": "test_benchmarks_run_gpu.py",
    "pytest tests/multirank/test_runs.py": SUITE,
    "pytest tests/multirank/test_torture.py": SUITE,
    "pytest tests/unit": SUITE,
    "pytest tests/unit/data/test_packing.py": SUITE,
    "pytest tests/multirank/test_scale_measured.py tests/unit/tools/test_plan_memory.py": SUITE,
    "pytest tests/unit/kernels/test_distill_loss_memory.py": SUITE,
    "ldistill models --check": "test_models.py",
    "ldistill models --check NAME": "test_models.py",
    "ldistill models --check --student DIR --teacher DIR": "test_models.py",
    "ldistill models --markdown": "test_models.py",
    "ldistill plan --pair NAME": "test_plan.py",
    # SLURM
    "sbatch slurm/selective.sh": "test_slurm.py",
    "sbatch slurm/llava7b.sh": "test_slurm.py",
    "sbatch --account=lab --partition=gpu slurm/llava7b.sh": "test_slurm.py",
    "job=$(SOURCES=mine SLICES=8 sbatch --parsable --array=0-7 slurm/shards.sh --dataset mine/ "
    "--extra-sources mine=language --out shards/)": "test_slurm.py",
    "sbatch --dependency=afterok:$job slurm/merge.sh shards/": "test_slurm.py",
    "sbatch slurm/shards.sh --dataset HuggingFaceM4/the_cauldron --out shards/": "test_slurm.py",
    "TASKS=8 SOURCES=mine SLICES=8 sbatch --array=3,7 slurm/shards.sh --dataset mine/ "
    "--extra-sources mine=language --out shards/": "test_slurm_scripts.py",
    "job=$(sbatch --parsable slurm/selective.sh)": "test_slurm.py",
    "sbatch --dependency=afterok:$job slurm/eval.sh": "test_slurm.py",
    "sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 slurm/selective.sh":
        "needs eight GPUs",
    "RECIPE=tiny sbatch --nodes=2 --gpus-per-node=0 slurm/selective.sh": "test_slurm.py",
    "ldistill shards build ... --slice 3/8": "test_shards_commands.py",
    "ldistill shards merge shards/": "test_shards_commands.py",
    "mkdir -p runs && ln -s /scratch/me/shards shards": SITE,
    "export SBATCH_ACCOUNT=lab SBATCH_PARTITION=gpu": SITE,
    'export SETUP="module load cuda/12.8; source ~/envs/ldistill/bin/activate"': SITE,
    'export CONTAINER="apptainer exec --nv $HOME/ldistill.sif"': SITE,
    'export SRUN_FLAGS="--container-image=$HOME/ldistill.sqsh"': SITE,
    "export OUTPUT_DIR=runs/mine": SITE,
    "srun --kill-on-bad-exit": MESSAGE,
    "scontrol requeue": MESSAGE,
    "sbatch --signal=B:USR1@900 ...": MESSAGE,
    "deepspeed ldistill/train.py ...": MESSAGE,
    "sbatch --exclude=n12": MESSAGE,
    "MASTER_PORT=N sbatch ...": MESSAGE,
    "deepspeed --master_port N ...": MESSAGE,
    "sbatch --chdir=ROOT": MESSAGE,
    "deepspeed --hostfile": MESSAGE,
}  # fmt: skip
# Flags that make a documented training line a small one, on shards of the tiny world.
SHORT = ["--student", STUDENT, "--teacher", TEACHER, "--bf16", "false", "--max_length", "256"]
SHORT += ["--global_batch_size", "4", "--save_steps", "1", "--logging_steps", "1"]
TRAIN = "deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json --recipe "
RESUME = "deepspeed ldistill/train.py ... --resume_from_checkpoint auto"
SELECTIVE = TRAIN + "lingudistill --shards shards/ --output_dir runs/lingudistill"
OWN = TRAIN + "mine --shards own/"
LOOK = "ldistill look --student runs/lingudistill --image cat.jpg "
LOOK += '--prompt "What is this?" --answer "A cat."'
BUILD = "ldistill shards build --dataset receipts.json --extra-sources receipts=document --out own/"


def documented() -> set[str]:
    """Lines of code blocks and code in the text that begins with a program, without comments."""
    found = set()
    for page in PAGES:
        text = (REPO / page).read_text(encoding="utf-8")
        fenced = re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.S | re.M)
        blocks = [block for language, block in fenced if language != "python"]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        lines += [span for span in spans if INLINE.fullmatch(span)]
        found |= {re.sub(r"\s+# .*", "", line).strip() for line in lines}
    return found - {""}


def names_alone() -> set[str]:
    """Commands of `ldistill` that the text only names: no argument, no flag."""
    return {c for c in documented() if re.fullmatch(r"(ldistill|python -m ldistill)( [a-z]+)*", c)}


def test_every_command_is_run_or_listed():
    known = set(LISTED) | set(RUN) | names_alone()
    found = documented()
    assert len(found) > 60, "the collector finds too little"
    assert found - known == set(), "documented, and neither run nor listed here"
    assert known - found == set(), "listed here, and no longer documented"
    for test in {reason for reason in LISTED.values() if reason.endswith(".py")}:
        assert list((REPO / "tests").rglob(test)), f"there is no {test}"


# ---- the commands that run, in a folder as the README leaves it ----


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Shards of the tiny world, a picture, receipts, and the run of the README's second line."""
    root = tmp_path_factory.mktemp("documented")
    data = prepare(root / "cache", samples_per_source=12, items_per_task=2)
    (root / "shards").symlink_to(data.shards)
    (root / "cat.jpg").write_bytes(picture())
    (root / "receipt.png").write_bytes(picture(seed=3))
    (root / "receipts.json").write_text(
        '[{"id": "1", "image": "receipt.png", "conversations": [{"from": "human", "value": '
        '"<image>total?"}, {"from": "gpt", "value": "12"}]}]'
    )
    train(root, SELECTIVE, "--max_steps", "2")
    return root


def train(root: Path, command: str, *short: str) -> None:
    """A documented training line in this process; test_matrix.py has DeepSpeed's part of it."""
    _, _, _, config, *words = shlex.split(command)  # deepspeed ldistill/train.py --deepspeed ...
    assert (REPO / config).is_file()
    folders = ("shards/", "own/", "runs/")
    placed = [str(root / w) if w.startswith(folders) else w for w in words]
    assert main([*placed, *SHORT, *short]) == 0


def test_training_goes_on_where_it_stopped(world):
    train(world, SELECTIVE, "--max_steps", "3", "--resume_from_checkpoint", "auto")
    steps = [r["step"] for r in read_metrics(world / "runs" / "lingudistill" / "metrics.jsonl")]
    assert steps == [1, 2, 3]


def run(argv: list[str]) -> str:
    done = CliRunner().invoke(app, argv, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def build_own(world: Path, command: str) -> None:
    run([*shlex.split(command)[1:], "--student", STUDENT, "--workers=1"])
    assert (world / "own" / "receipts" / "index.json").is_file()


def train_on_own(world: Path, command: str) -> None:
    """After the line before it."""
    build_own(world, BUILD)
    short = ["--max_steps", "1", "--global_batch_size", "1"]
    train(world, command, *short, "--output_dir", str(world / "runs" / "own"))
    assert (world / "runs" / "own" / "student" / "model.safetensors").is_file()


def labels_alone(world: Path, command: str) -> None:
    train(world, command, "--max_steps", "1")


def as_it_stands(*more: str, shows: str = "") -> Callable[[Path, str], None]:
    """Run in the folder, with more flags at the end; what it prints must hold `shows`."""

    def check(world: Path, command: str) -> None:
        assert shows in run([*shlex.split(command)[1:], *more])

    return check


def ran_above(world: Path, command: str) -> None:
    assert (world / "runs" / "lingudistill" / "student" / "model.safetensors").is_file()


RUN: dict[str, Callable[[Path, str], None]] = {
    SELECTIVE: ran_above,
    RESUME: ran_above,
    TRAIN + "nanovlm-full --shards shards/ --output_dir runs/nanovlm-full": labels_alone,
    BUILD: build_own,
    OWN: train_on_own,
    "ldistill shards stats shards/ --plot lengths.png": as_it_stands(shows="docvqa"),
    "ldistill shards verify shards/": as_it_stands(),
    "ldistill export runs/lingudistill --out nanovlm/": as_it_stands(shows="student  nanovlm"),
    'ldistill generate --student nanovlm/ --image cat.jpg --prompt "What is this?"': as_it_stands(
        "--max-new-tokens", "4"
    ),
    LOOK: as_it_stands(shows="mean KL"),
    LOOK + " --out look.html": as_it_stands(shows="page: look.html"),
    "ldistill study paper --shards shards/": as_it_stands(shows="--recipe lingudistill"),
    "ldistill plan --pair llava-13b --gpus 32 --gpu-memory 80": as_it_stands(shows="train.py"),
    "ldistill plan --pair llava-13b --gpus 32 --gpu-memory 80 --node-link 25 --mfu 0.35":
        as_it_stands(shows="train.py"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(world, monkeypatch, command):
    monkeypatch.chdir(world)
    RUN[command](world, command)


@pytest.mark.parametrize("command", sorted(names_alone()))
def test_a_command_that_is_only_named_exists(command):
    words = command.split()[3 if command.startswith("python") else 1 :]
    shown = "--recipe" if words == ["train"] else "Usage"  # that help is train.py's own
    assert shown in run([*words, "--help"])


def test_a_runs_folder_answers_too(world, monkeypatch):
    """As for `eval` and `export`, with the students of its checkpoints where there is no result."""
    monkeypatch.chdir(world)
    short = ["--prompt", "hello", "--max-new-tokens", "2"]
    run(["generate", "--student", "runs/lingudistill", *short])
