"""`ldistill plan`: the layout it chooses, what it says when nothing fits, and its command line."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import REPO
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.distill.targets import supervise
from ldistill.models.flops import count_step
from ldistill.models.named_pairs import student_config
from ldistill.models.nanovlm import NanoVLM
from ldistill.recipe import parse
from ldistill.tools.bench.batch import count_rows, mix_weights, paper_batch
from ldistill.tools.pairs import pair_shape, recipe_of
from ldistill.tools.plan.hardware import GIB, ZEROS, Cluster
from ldistill.tools.plan.layout import HOST, NODE, WORLD
from ldistill.tools.plan.plan import Request, make_plan

LLAVA = pair_shape("llava-13b")
NANO = pair_shape("nanovlm-460m")


def test_zero_is_what_the_shipped_files_say():
    files = {path.stem: path for path in (REPO / "ds_configs").glob("*.json")}
    assert files.keys() == ZEROS.keys()
    for name, zero in ZEROS.items():
        values = json.loads(files[name].read_text(encoding="utf-8"))["zero_optimization"]
        assert zero.stage == values["stage"]
        assert zero.reduce_bucket == values["reduce_bucket_size"]
        assert zero.offload_optimizer == ("offload_optimizer" in values)
        assert zero.offload_param == ("offload_param" in values)
        assert zero.node_partition == values.get("zero_hpz_partition_size", 1)
        assert zero.max_reuse == values.get("stage3_max_reuse_distance", zero.max_reuse)
        assert zero.prefetch == values.get("stage3_prefetch_bucket_size", zero.prefetch)
        assert values["contiguous_gradients"]
        assert values["overlap_comm"]


@pytest.mark.parametrize("mix", ["paper", "uniform"])
def test_counts_of_rows_are_those_of_the_benchmarks_batch(mix):
    config = student_config("nanovlm-460m")
    batch, vocabulary = paper_batch(config, 16, 1024), config.lm_base_vocab_size
    plan = supervise(batch, mix_weights(mix, 0.7, 4.0), "full", lambda ids: ids < vocabulary)
    with torch.device("meta"):
        counts = count_step(NanoVLM(config), batch, plan)
    counted = count_rows(config.mp_image_token_length, 1024, mix, rows=16).times(16, 1024)
    assert counted == replace(counts, image_tokens=0)


def test_the_chosen_layout_fits_and_none_that_fits_is_a_tenth_faster():
    for shape, cluster in ((LLAVA, Cluster.of(32)), (NANO, Cluster.of(1, gpu="RTX A6000"))):
        plan = make_plan(shape, cluster, Request())
        limit = cluster.memory * GIB
        assert plan.chosen.total <= limit
        for other in plan.others:
            assert other.total <= limit
            assert plan.chosen.seconds.exposed <= 1.1 * other.seconds.exposed


def test_the_papers_run_on_one_a6000():
    """What the paper did fits, and its GPU-hours follow from FLOPs alone on one card."""
    plan = make_plan(NANO, Cluster.of(1, gpu="RTX A6000"), Request(mfu=0.35))
    assert plan.chosen.network == 0
    rows = count_rows(64, 1024)
    seconds = NANO.step_flops(rows.times(128, 1024)) / (0.35 * 155e12)
    assert not plan.chosen.checkpointing
    assert plan.chosen.compute == pytest.approx(seconds)
    assert plan.chosen.gpu_hours(4000).hidden == pytest.approx(seconds * 4000 / 3600)
    assert plan.chosen.tokens_per_s.exposed == pytest.approx(rows.tokens * 128 / seconds)


def test_a_13b_pair_on_32_gpus_partitions_weights_within_nodes():
    plan = make_plan(LLAVA, Cluster.of(32, memory=80), Request())
    assert plan.chosen.zero.name == "zero3_multinode"
    assert {t.where for t in plan.chosen.transfers} == {WORLD, NODE}


def test_transfers_follow_the_usual_account():
    """Bytes of the ZeRO papers, and of what DeepSpeed does beyond them, per GPU and step."""
    share, trained, teacher = 31 / 32, 2 * LLAVA.trained_weights, 2 * LLAVA.teacher_weights
    vision, kept = 2 * LLAVA.vision_weights, 2 * 5e8  # of the forward's last weights, for backward

    def moved(zero: str, engine: str, batch: int) -> dict[str, float]:
        request = Request(zero=zero, teacher=engine, micro_batch=1, global_batch=batch)
        plan = make_plan(LLAVA, Cluster.of(32, memory=1000), request)
        layouts = [plan.chosen, *plan.others]
        found = next(x for x in layouts if not x.teacher_offload).transfers
        return {
            where: sum(t.bytes for t in found if t.where == where) for where in (WORLD, NODE, HOST)
        }

    assert moved("zero1", "replicated", 128)[WORLD] == pytest.approx(share * 3 * trained)
    assert moved("zero2", "replicated", 128)[WORLD] == pytest.approx(share * (4 * 2 + 1) * trained)
    zero3 = moved("zero3", "zero3", 128)[WORLD]
    assert zero3 == pytest.approx(share * 4 * (3 * trained + vision - kept + teacher))
    # two micro-batches: one gather of four leaves the node, and the frozen tower never does
    found = moved("zero3_multinode", "replicated", 64)
    assert found[WORLD] == pytest.approx(share * 3 * trained)
    assert found[NODE] == pytest.approx(7 / 8 * (3 * trained + 2 * vision - 2 * kept))
    found = moved("zero3_offload", "replicated", 32)
    part = LLAVA.trained_weights / 32
    weights = (2 * trained + vision - kept) / 32
    assert found[HOST] == pytest.approx(2 * part * 2 + 30 * part + weights)


@pytest.mark.parametrize(
    ("pair", "gpus", "changes", "culprit"),
    [
        ("llava-13b", 1, {"zero": "zero2"}, "optimizer"),
        ("llava-13b", 4, {"teacher": "replicated"}, "teacher"),
        ("nanovlm-460m", 1, {"micro_batch": 64, "checkpointing": False}, "activations"),
        ("llava-7b", 2, {"length": 16384, "micro_batch": 8}, "kv memory"),
    ],
)
def test_what_does_not_fit_is_named_with_changes_that_do(pair, gpus, changes, culprit):
    shape, cluster = pair_shape(pair), Cluster.of(gpus, memory=24)
    with pytest.raises(ValueError, match="does not fit") as caught:
        make_plan(shape, cluster, Request(**changes))
    sentence = str(caught.value)
    assert f"{pair} does not fit {gpus} GPU" in sentence
    assert culprit in sentence
    offered = dict(re.findall(r"--(gpus|seq|lora|gpu-memory|micro-batch) (\d+)", sentence))
    assert offered
    for flag, text in offered.items():
        value, request, where = int(text), dict(changes), cluster
        if flag == "gpus":
            where = Cluster.of(value, memory=24)
        elif flag == "gpu-memory":
            # the reserve grows with the card, so a little more is needed than was missing
            where = Cluster.of(gpus, memory=value * 1.05)
        else:
            name = {"seq": "length", "lora": "lora", "micro-batch": "micro_batch"}[flag]
            request[name] = value
        assert make_plan(shape, where, Request(**request)).chosen.total <= where.memory * GIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "llava-70b"], "no pair 'llava-70b'"),
        (["--pair", "nanovlm-460m", "--gpus", "12"], "no whole number of nodes"),
        (["--pair", "nanovlm-460m", "--gpus", "24"], "cannot be cut over 24 GPUs"),
        (["--pair", "nanovlm-460m", "--gpus", "2", "--micro-batch", "5"], "with --micro-batch 5"),
        (["--pair", "nanovlm-460m", "--seq", "50"], "room for a document of"),
        (["--pair", "nanovlm-460m", "--gpus", "4", "--zero", "zero3_multinode"], "within 8 GPUs"),
        (
            ["--pair", "tiny", "--gpus", "16", "--gpus-per-node", "4", "--zero", "zero3_multinode"],
            "within 8 GPUs of a node, and 4 is no multiple",
        ),
    ],
)
def test_wrong_requests_are_sentences(arguments, message):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--gpu", "TPU", "'TPU' is not one of"),
        ("--gpus", "0", "greater than or equal to 1"),
        ("--mfu", "1.5", "less than or equal to 1"),
        ("--mfu", "0", "greater than or equal to 0.01"),
        ("--node-link", "0", "greater than or equal to 0.01"),
        ("--teacher-engine", "vllm", "'vllm' is not one of"),
        ("--zero", "zero9", "'zero9' is not one of"),
    ],
)
def test_values_that_a_flag_cannot_have_are_named(flag, value, message):
    result = CliRunner().invoke(app, ["plan", "--pair", "tiny", flag, value])
    assert result.exit_code == 2
    assert f"'{flag}'" in result.output
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_folder_and_a_recipe_are_pairs_too(tmp_path):
    (tmp_path / "config.json").write_text(
        student_config("nanovlm-460m").to_json(), encoding="utf-8"
    )
    assert pair_shape(str(tmp_path)).student_weights == NANO.student_weights
    recipe = pair_shape("lingudistill")
    assert recipe.student_weights == NANO.student_weights
    assert (recipe.length, recipe.global_batch, recipe.steps) == (1024, 128, 4000)


def test_the_command_prints_tables_and_writes_json(tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["plan", "--pair", "llava-13b", "--gpus", "32", "--gpu-memory", "80"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "it fits" in text
    assert "deepspeed --hostfile hosts --num_nodes 4 ldistill/train.py" in text
    plan = json.loads(file.read_text(encoding="utf-8"))
    assert plan["chosen"]["memory_bytes"]["total"] <= 80 * GIB
    assert plan["command"].split()[0] == "deepspeed"
    markdown = CliRunner().invoke(app, [*arguments, "--markdown"]).output
    assert "| part | GiB |\n|---|---:|" in markdown
    assert plan["command"] in markdown


@pytest.mark.parametrize(
    ("pair", "flags"),
    [
        ("nanovlm-460m", []),
        ("llava-7b", ["--gpus", "8", "--steps", "100", "--mix", "uniform"]),
        ("smolvlm-256m", ["--teacher-engine", "none", "--seq", "2048"]),
        ("tiny", ["--lora", "4"]),
        ("llava-7b", ["--lora", "128"]),
    ],
)
def test_the_command_it_prints_can_be_pasted(pair, flags):
    """It parses whole, and says everything that the plan was made for."""
    printed = CliRunner().invoke(app, ["plan", "--pair", pair, *flags]).output.strip()
    words = shlex.split(printed.splitlines()[-1])
    assert words[words.index("ldistill/train.py") + 1] == "--deepspeed"
    recipe = parse(words[words.index("ldistill/train.py") + 3 :])
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert Path(REPO / words[words.index("--deepspeed") + 1]).is_file()
    assert recipe.data.shards == (None if pair == "tiny" else "shards/")
    assert recipe.training.output_dir == f"runs/{recipe_of(pair)}"
    assert recipe.training.max_steps == int(given.get("--steps", pair_shape(pair).steps))
    assert recipe.data.max_length == int(given.get("--seq", pair_shape(pair).length))
    assert recipe.pair.lora_rank == int(given.get("--lora", 0))
    if pair == "llava-7b":  # LLaVA-1.5's own rates, of full training and of LoRA
        rates = recipe.training.learning_rate, recipe.run.decoder_lr
        assert rates == (2e-5, 2e-4 if "--lora" in given else None)
    expected = {"none": "none", "uniform": "all"}
    asked = given.get("--teacher-engine") or given.get("--mix")
    assert recipe.distil.distil == expected.get(asked, "language")


def test_the_page_holds_the_tables_that_the_plan_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "docs"))
    import make_scaling

    page = Path(REPO / "docs/scaling.md").read_text(encoding="utf-8")
    assert make_scaling.filled(page) == page, "run docs/make_scaling.py"
