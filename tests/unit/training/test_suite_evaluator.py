"""Evaluation during training: it changes nothing, says everything, and cannot end a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from pairs import write_pair
from runs import REPO, environment, launch, losses, write_recipe, write_shards
from safetensors.torch import load_file

from ldistill.checkpoint.logs import read_metrics
from ldistill.evaluation import lmms_run
from ldistill.evaluation.lmms_run import Evaluation, metadata
from ldistill.models.formats import load_student
from ldistill.training import validation
from ldistill.training.metrics import Meter
from ldistill.training.stopping import STOPPED_EXIT_CODE
from ldistill.training.validation import SuiteEvaluator, evaluator_of, visible_device

CPU = torch.device("cpu")
installed = any(ep.name == "ldistill" for ep in metadata.entry_points(group="lmms_eval.models"))


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="lmms-eval or our entry point is not installed")
def test_a_run_with_evaluation_is_the_run_without(tmp_path):
    """Two ranks, attention dropout on: losses and weights are bit-identical; scores are logged."""
    pytest.importorskip("lmms_eval")
    write_pair(tmp_path / "pair", lm_dropout=0.1)
    write_shards(tmp_path / "shards", tmp_path / "pair")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "pair", tmp_path / "shards")
    folders = {}
    asked = ("--eval_suite", "tiny", "--eval_steps", "2", "--eval_limit", "2")
    env = {"LDISTILL_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    for name, flags in (("without", ()), ("with", asked)):
        folders[name] = tmp_path / name
        out = ("--output_dir", str(folders[name]), "--max_steps", "3", "--save_strategy", "no")
        launch("--recipe", str(recipe), *out, *flags, ranks=2, env=env)
    quiet, loud = (read_metrics(folders[name] / "metrics.jsonl") for name in ("without", "with"))
    scores = [record for record in loud if "eval_tiny_facts" in record]
    assert [r["loss"] for r in loud if "loss" in r] == losses(folders["without"])
    assert len(quiet) == 3
    one, other = (
        load_file(folders[n] / "student" / "model.safetensors") for n in ("without", "with")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [record["step"] for record in scores] == [2, 3]
    for step in (2, 3):
        folder = folders["with"] / "eval" / f"step-{step}"
        result = json.loads((folder / "eval.json").read_text())
        assert result["complete"]
        assert {s["documents"] for s in result["scores"].values()} == {2}
        logged = next(r for r in scores if r["step"] == step)
        assert logged["eval_tiny_words"] == result["scores"]["tiny_words"]["value"]
        assert logged["eval_tiny_reading"] == result["groups"]["tiny_reading"]
        assert not (folder / "student").exists()


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="lmms-eval or our entry point is not installed")
def test_a_run_that_is_to_stop_gives_its_evaluation_up(tmp_path):
    """The checkpoint lies before an evaluation begins, which ends when a stop is asked for."""
    pytest.importorskip("lmms_eval")
    write_pair(tmp_path / "pair")
    write_shards(tmp_path / "shards", tmp_path / "pair")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "pair", tmp_path / "shards")
    folder, stop = tmp_path / "run", tmp_path / "stop"
    command = [sys.executable, "ldistill/train.py", "--recipe", str(recipe)]
    command += ["--output_dir", str(folder), "--stop_file", str(stop), "--max_steps", "200"]
    command += ["--eval_suite", "tiny", "--eval_steps", "2"]
    env = environment() | {"LDISTILL_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        said = []
        for line in run.stdout:
            said.append(line)
            if line.startswith("evaluating step 2"):
                saved_first = (folder / "checkpoint-2").is_dir()
                stop.touch()
    assert run.returncode == STOPPED_EXIT_CODE, "".join(said)
    assert saved_first
    assert any("the evaluation of step 2 was given up" in line for line in said)
    assert sum("evaluating step" in line for line in said) == 1
    assert json.loads((folder / "stopped.json").read_text())["step"] == 3


@pytest.fixture
def evaluator(tmp_path, pair_root):
    asked = Evaluation(student="", out=tmp_path, suite="tiny")
    return SuiteEvaluator(asked, pair_root / "student")


def test_the_weights_of_that_moment_are_evaluated(evaluator, monkeypatch, pair_root, capsys):
    student = load_student(pair_root / "student")
    trained = {n: p.detach() + 1 for n, p in student.named_parameters() if "projector" in n}
    seen = {}

    def fake(asked, give_up):
        loaded = load_student(asked.student)
        seen["projector"] = loaded.projector.proj.weight.detach()
        seen["decoder"] = loaded.decoder.model.norm.weight.detach()
        seen["asked"] = asked
        return {"scores": {"tiny_facts": {"value": 0.5}}, "groups": {"tiny_language": 0.25}}

    monkeypatch.setattr(validation, "evaluate", fake)
    assert evaluator(7, trained) == {"tiny_facts": 0.5, "tiny_language": 0.25}
    assert torch.equal(seen["projector"], trained["projector.proj.weight"])
    assert torch.equal(seen["decoder"], student.decoder.model.norm.weight)
    assert seen["asked"].out.name == "step-7"
    assert not seen["asked"].out.joinpath("student").exists()
    assert "step 7" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("no space"), OSError("no lmms-eval")])
def test_a_failed_evaluation_is_a_message_and_the_run_goes_on(
    evaluator, monkeypatch, capsys, error
):
    def fail(asked, give_up):
        raise error

    monkeypatch.setattr(validation, "evaluate", fail)
    assert evaluator(1, {}) == {"failed": 1.0}
    assert f"training goes on: {error}" in capsys.readouterr().out


def recipe(suite, given=(), limit=3):
    args = SimpleNamespace(device=CPU, per_device_eval_batch_size=8)
    run = SimpleNamespace(eval_suite=suite, eval_limit=limit)
    pair, data = SimpleNamespace(tokenizer=None), SimpleNamespace(tiling=True)
    return SimpleNamespace(run=run, training=args, pair=pair, data=data, given=given)


def test_an_odd_limit_of_mme_is_refused_before_training(tmp_path, pair_root, monkeypatch):
    pytest.importorskip("lmms_eval")
    entry = SimpleNamespace(name="ldistill")
    monkeypatch.setattr(lmms_run.metadata, "entry_points", lambda group: [entry])
    pair = SimpleNamespace(student_folder=pair_root / "student")
    with pytest.raises(ValueError, match="mme asks in pairs"):
        evaluator_of(recipe("general", limit=5), pair, tmp_path, bool)


def test_evaluation_takes_no_training_time():
    meter = Meter(SimpleNamespace(names=(), categories=()), CPU, 1.0)
    since = meter._since
    with meter.paused():
        time.sleep(0.05)
    assert meter._since - since >= 0.05


def test_the_evaluation_runs_on_the_first_ranks_device(monkeypatch):
    assert visible_device(CPU) == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_device(torch.device("cuda:1")) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert visible_device(torch.device("cuda", 1)) == "GPU-abc"


def test_what_a_recipe_asks_for(pair_root, tmp_path, monkeypatch):
    pair = SimpleNamespace(student_folder=pair_root / "student")
    monkeypatch.setattr(validation, "check", lambda asked: None)
    assert evaluator_of(recipe(None), pair, tmp_path, bool) is None
    made = evaluator_of(recipe("tiny"), pair, tmp_path, bool).asked
    assert (made.limit, made.batch_size, made.options["tiling"]) == (3, None, True)
    given = recipe("tiny", given={"per_device_eval_batch_size"})
    assert evaluator_of(given, pair, tmp_path, bool).asked.batch_size == 8
