"""The study: what its variants are, what its report says, and one small study for real."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys

import pytest
from runs import REPO
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.recipe import parse
from ldistill.tools.study import paper
from ldistill.tools.study.variants import BASELINE, MAIN, ORIGINAL, RECIPES, variants


def test_every_variant_is_its_recipe_on_the_tiny_pair():
    for variant in variants():
        own = parse(["--recipe", variant.base, *variant.flags_beyond_base()])
        tiny = parse(["--recipe", "tiny", *variant.flags()])
        assert (tiny.distil, tiny.data.sources) == (own.distil, own.data.sources), variant.name
        assert tiny.pair.student.startswith("pkg://"), variant.name


def test_all_recipes_of_the_paper_and_both_gates_are_variants():
    names = [variant.name for variant in variants()]
    assert names == [*RECIPES, f"{MAIN}-agreement", f"{MAIN}-confidence"]
    gates = {v.name: v.beyond.get("gate") for v in variants()}
    assert gates[MAIN] is None
    assert gates[f"{MAIN}-agreement"] == "agreement"


def test_an_unknown_variant_is_refused_by_name():
    with pytest.raises(ValueError, match="no variant 'lingudistil'; there are: nanovlm-full"):
        variants(("lingudistil",))


def test_the_paper_study_prints_commands_that_parse(tmp_path):
    study = paper.PaperStudy("shards/", tmp_path / "study", variants((BASELINE, MAIN)))
    lines = [shlex.split(line) for line in paper.commands(study)]
    trained = [line for line in lines if line[0] == "deepspeed"]
    assert [parse(line[4:]).run.recipe for line in trained] == [BASELINE, MAIN]
    evaluated = [
        line[line.index("--out") + 1] for line in lines if line[:2] == ["ldistill", "eval"]
    ]
    compared = lines[-1]
    assert compared[:2] == ["ldistill", "compare"]
    for folder in evaluated:
        assert any(part.endswith(f"={folder}") for part in compared)


def test_submitting_without_job_scripts_says_so(tmp_path):
    study = paper.PaperStudy("shards/", tmp_path, variants((MAIN,)), slurm=tmp_path)
    with pytest.raises(FileNotFoundError, match="start this from the repository's folder"):
        list(paper.submit(study))


FAKE_SBATCH = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
log = Path(__file__).with_name("jobs.jsonl")
number = len(log.read_text().splitlines()) + 1 if log.exists() else 1
names = ("RECIPE", "OUTPUT_DIR", "SHARDS", "STUDENT", "SUITE", "EVAL_DIR")
env = {name: os.environ[name] for name in names if name in os.environ}
with log.open("a") as file:
    file.write(json.dumps({"args": sys.argv[1:], "env": env}) + "\\n")
print(f"{number};cluster")
"""


def test_what_is_submitted_is_what_is_printed(tmp_path, monkeypatch):
    """The start's evaluation, a training and an evaluation each, and the comparison behind all."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(FAKE_SBATCH, encoding="utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(REPO)
    options = ["--shards", "s3://a,b/shards", "--out", "runs/s", "--deepspeed", "my/zero1.json"]
    options += ["--variant", BASELINE, "--variant", f"{MAIN}-confidence"]
    done = CliRunner().invoke(app, ["study", "paper", *options, "--submit"])
    assert done.exit_code == 0, (done.output, done.exception)
    lines = (sbatch.parent / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    jobs = [json.loads(line) for line in lines]
    assert [line.split()[1] for line in done.output.splitlines()] == list("123456")
    printed = CliRunner().invoke(app, ["study", "paper", *options]).output.splitlines()
    commands = [shlex.split(line) for line in printed]
    for index in (0, 2, 4):
        env, words = jobs[index]["env"], commands[index]
        expected = ["--student", env["STUDENT"], "--suite", env["SUITE"], "--out", env["EVAL_DIR"]]
        assert words[2:] == expected
        assert jobs[index]["args"][-1] == "slurm/eval.sh"
    assert not any("--dependency" in word for word in jobs[0]["args"])
    for index in (1, 3):
        env, words = jobs[index]["env"], commands[index]
        script, *flags = jobs[index]["args"][2:]
        assert script == "slurm/selective.sh"
        own = ["--recipe", env["RECIPE"], "--shards", env["SHARDS"]]
        own += ["--output_dir", env["OUTPUT_DIR"]]
        assert sorted(words[2:]) == sorted([*flags, *own])
        assert f"--dependency=afterok:{index + 1}" in jobs[index + 1]["args"]
    *options, wrap, script = jobs[5]["args"]
    assert "--dependency=afterany:1:3:5" in options
    assert wrap == "--wrap"
    assert f"on_one {printed[-1]}" in shlex.split(script)[2]


SCORES = {
    ORIGINAL: {"tiny_facts": [1.0], "tiny_statements": [0.9], "tiny_words": [0.5]},
    BASELINE: {
        "tiny_facts": [0.8, 0.6],
        "tiny_statements": [0.7, 0.7],
        "tiny_words": [0.9, 0.8],
    },
    MAIN: {"tiny_facts": [0.9, 0.9], "tiny_statements": [0.9, 0.7], "tiny_words": [0.9, 0.8]},
}


def test_the_report_holds_means_over_seeds_and_shares(tmp_path):
    from ldistill.tools.study.report import summarise, write_report

    results = summarise(SCORES)
    assert results[BASELINE]["language"]["mean"] == pytest.approx((0.75 + 0.65) / 2)
    assert results[BASELINE]["language"]["std"] == pytest.approx(statistics.stdev([0.75, 0.65]))
    assert results[MAIN]["language"] == {
        "mean": pytest.approx(0.85),
        "std": pytest.approx(statistics.stdev([0.9, 0.8])),
        "seeds": 2,
    }
    files = write_report(SCORES, {}, tmp_path, "ldistill study tiny --seeds 2")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    text = files[0].read_text(encoding="utf-8")
    # (0.85 - 0.7) of (0.95 - 0.7) regained; reading as good as with labels alone.
    assert "language 0.850 (60% of it), reading 0.850 (100.0% of `nanovlm-full`'s)" in text
    assert (tmp_path / "language_vs_reading.png").stat().st_size > 1000


def test_without_any_reading_there_is_still_a_report(tmp_path):
    from ldistill.tools.study.report import write_report

    blind = {
        name: of | {"tiny_words": [0.0] * len(of["tiny_words"])} for name, of in SCORES.items()
    }
    files = write_report(blind, {}, tmp_path, "ldistill study tiny")
    said = files[0].read_text(encoding="utf-8")
    assert f"reading 0.000 (`{BASELINE}` has none)" in said


def test_what_earlier_commands_finished_stays_in_the_report(tmp_path):
    """`--variant` and fewer seeds say what is to be run, not what is reported."""
    from ldistill.tools.study.report import markdown, summarise
    from ldistill.tools.study.tiny import TinyStudy, collect, metrics_files

    def record(complete: bool) -> str:
        score = {"tiny_facts": {"value": 0.5}}
        fields = {"model_args": "", "limit": None, "complete": complete, "scores": score}
        return json.dumps(fields)

    done = (ORIGINAL, f"seed-1/{BASELINE}", f"seed-2/{BASELINE}", f"seed-1/{MAIN}")
    for place in (*done, "seed-1/distill-full"):
        folder = tmp_path / place / "eval"
        folder.mkdir(parents=True)
        (folder / "eval.json").write_text(record(complete=place in done))
        (folder.parent / "metrics.jsonl").write_text("")
    study = TinyStudy(tmp_path, variants((MAIN,)), seeds=1)
    scores = collect(study)
    assert {name: len(of["tiny_facts"]) for name, of in scores.items()} == {
        ORIGINAL: 1, BASELINE: 2, MAIN: 1,
    }  # fmt: skip
    assert metrics_files(study).keys() == {BASELINE, MAIN}
    (tmp_path / "seed-1" / MAIN / "eval" / "eval.json").write_text(record(complete=True)[:9])
    with pytest.raises(ValueError, match=rf"{MAIN}/eval/eval.json is damaged"):
        collect(study)
    results = summarise(SCORES | {MAIN: {row: of[:1] for row, of in SCORES[MAIN].items()}})
    assert "Seeds: 1 to 2." in markdown(SCORES, results, "", drawn=False, curves=False)


@pytest.mark.slow
def test_a_small_study_runs_resumes_and_reports(tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="evaluates through lmms-eval")
    arguments = ["study", "tiny", "--out", str(tmp_path), "--seeds", "1", "--items", "4"]
    arguments += ["--variant", MAIN, "--max_steps", "2", "--logging_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["ldistill", *arguments])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {ORIGINAL, MAIN}
    assert {"language", "reading", "tiny_facts"} <= set(results[MAIN])
    assert (tmp_path / "loss_curves.png").is_file()
    student = tmp_path / "seed-1" / MAIN / "student" / "model.safetensors"
    before = student.stat().st_mtime_ns
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert student.stat().st_mtime_ns == before
    other = CliRunner().invoke(app, [*arguments[:-4], "--max_steps", "3"])
    assert isinstance(other.exception, ValueError)
    assert "a study with other settings" in str(other.exception)
