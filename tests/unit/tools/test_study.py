"""The study: what its files say, what its report says, and one small study for real."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from runs import REPO
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.evaluation.suites import suite
from ldistill.recipe import parse
from ldistill.tools.study import cluster, running, scores
from ldistill.tools.study.files import Arm, Run, load_study
from ldistill.tools.study.report import write_report
from ldistill.tools.study.running import Workplace, run_study
from ldistill.tools.study.scores import WHOLE, Scores, holm, paired_tests

BASELINE, MAIN, START = "nanovlm-full", "lingudistill", "adapted"
TABLE3 = load_study("table3")


def test_every_arm_is_its_recipe_on_the_tiny_pair():
    for arm in TABLE3.arms:
        own = parse(arm.flags(None, {}) if arm.recipe is None else ["--recipe", arm.recipe])
        tiny = parse(arm.flags("tiny", {}))
        gate = arm.fields.get("gate", own.distil.gate)
        assert tiny.distil == replace(own.distil, gate=gate), arm.name
        assert tiny.data.sources == own.data.sources, arm.name
        assert tiny.pair.student.startswith("pkg://"), arm.name


def test_all_recipes_of_the_paper_and_both_gates_are_arms():
    recipes = [
        "nanovlm-full", "nanovlm-lang", "distill-full", "distill-lang", "lingudistill",
        "lingudistill-highkd", "lingudistill-lowkd",
    ]  # fmt: skip
    assert [arm.name for arm in TABLE3.arms] == [
        *recipes, f"{MAIN}-agreement", f"{MAIN}-confidence",
    ]  # fmt: skip
    assert [arm.recipe for arm in TABLE3.arms] == [*recipes, MAIN, MAIN]
    assert load_study("paper").arms == TABLE3.arms


def test_the_tiny_study_gives_every_arm_the_same_budget_and_as_many_settings():
    study = load_study("tiny")
    trained = [arm for arm in study.arms if arm.of is None]
    assert len(trained) == 20
    assert {len(arm.settings) for arm in trained} == {2}
    budgets = [arm.budget for arm in trained]
    assert (budgets.count({"steps": 60}), budgets.count({"flops": "labels"})) == (17, 3)


def test_an_unknown_arm_is_refused_by_name():
    with pytest.raises(ValueError, match="no variant 'lingudistil'; there are: nanovlm-full"):
        TABLE3.choose(["lingudistil"])


def study_file(tmp_path: Path, **fields) -> str:
    values = {
        "suite": "tiny",
        "recipe": "tiny",
        "groups": {"language": ["tiny_language"], "reading": ["tiny_reading"]},
        "baseline": "labels",
        "arms": {"labels": {"recipe": BASELINE}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values | fields, sort_keys=False), encoding="utf-8")
    return str(path)


LABELS = {"recipe": BASELINE}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 3}, r"unknown field 'seed' in the file. Did you mean 'seeds'\?"),
        ({"arms": {"labels": {"recipes": BASELINE}}}, "unknown field 'recipes' in arm 'labels'"),
        ({"arms": {"labels": {"fields": {"alpah": 1}}}}, "unknown flag --alpah. Did you mean"),
        ({"arms": {"labels": LABELS | {"grid": {"alpha": [2]}}}}, r"alpha must lie in \[0, 1\]"),
        ({"arms": {"a/b": {}}, "baseline": "a/b"}, "cannot be called 'a/b'"),
        ({"arms": ["labels"]}, "study '.*study.yaml': "),
        ({"baseline": "label"}, "baseline 'label' is no arm; there are: labels"),
        ({"suite": "tyni"}, "no suite 'tyni'"),
        ({"suite": None}, "give a suite or tasks"),
        ({"launch": "there"}, "launch must be one of here, commands"),
        ({"validation": 2}, "a share of the documents below 1"),
        ({"axes": ["language", "words"]}, "axes are two of the groups, got .'language', 'words'.;"),
        ({"grid": {"alpha": [0.1, 0.2]}}, "arm 'labels' has several settings: `validation`"),
        ({"budget": {"hours": 3}}, "a budget is one of steps, tokens, flops"),
        ({"budget": {"flops": "labels"}}, "names 'labels', which is no arm above it"),
        ({"arms": {"labels": LABELS, "m": {"merge": {"of": "x"}}}}, "no arm above it"),
        (
            {"arms": {"labels": LABELS, "c": {"command": {"of": "labels", "run": "mine {rat}"}}}},
            "the command of arm 'c' cannot be filled in .KeyError 'rat'",
        ),
        ({"measure": "mine {students}"}, "measure cannot be filled in .KeyError 'students'"),
        (
            {"arms": {"labels": LABELS, "m": {"merge": {"to": "x"}}}},
            "unknown field 'to' in arm 'm'",
        ),
    ],
)
def test_what_cannot_be_is_a_sentence(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_study(study_file(tmp_path, **fields))


def test_tasks_have_the_items_they_have(tmp_path):
    file = study_file(tmp_path, suite=None, tasks=["arc_easy"])
    assert load_study(file).items_per_task is None
    with pytest.raises(ValueError, match="no suite that makes items"):
        load_study(file, items_per_task=4)
    with pytest.raises(ValueError, match="no suite that makes items"):
        load_study("paper", items_per_task=4)
    assert load_study("table3", items_per_task=4).items_per_task == 4


def test_no_such_study_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no study 'tyni'\. Shipped: paper, table3, tiny; or"):
        load_study("tyni")
    broken = tmp_path / "broken.yaml"
    broken.write_text("arms: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"study '.*broken.yaml': while parsing"):
        load_study(str(broken))


def test_a_grid_is_every_combination_under_the_studys_own(tmp_path):
    arms = {
        "labels": LABELS | {"grid": {"alpha": None}},
        "selective": {"recipe": MAIN, "grid": {"temperature": [1, 2]}},
        "merged": {"merge": {"of": "labels"}, "grid": {"weight": [0.1, 0.3]}},
    }
    study = load_study(study_file(tmp_path, arms=arms, grid={"alpha": [0.3, 0.7]}, validation=0.5))
    labels, selective, merged = study.arms
    assert labels.settings == [{}]
    assert [Run(selective, setting, 1).name for setting in selective.settings] == [
        f"selective--alpha-{a}--temperature-{t}" for a in (0.3, 0.7) for t in (1, 2)
    ]
    assert merged.settings == [{"weight": 0.1}, {"weight": 0.3}]
    flags = selective.flags("tiny", {"alpha": 0.3})
    assert parse(flags).distil.alpha == 0.3


def test_the_paper_study_prints_commands_that_parse(tmp_path):
    study = load_study("paper")
    arms = study.choose([BASELINE, MAIN])
    jobs = cluster.ClusterStudy(study, tmp_path / "study", arms, ["--shards", "shards/"])
    lines = [shlex.split(line) for line in cluster.commands(jobs)]
    trained = [line for line in lines if line[0] == "deepspeed"]
    assert [parse(line[4:]).run.recipe for line in trained] == [BASELINE, MAIN]
    evaluated = [
        line[line.index("--out") + 1] for line in lines if line[:2] == ["ldistill", "eval"]
    ]
    compared = lines[-1]
    assert compared[:2] == ["ldistill", "compare"]
    for folder in evaluated:
        assert any(part.endswith(f"={folder}") for part in compared)
    with pytest.raises(ValueError, match="arm 'nanovlm-full' has no shards: give --shards"):
        next(cluster.commands(replace(jobs, overrides=())))


def test_submitting_without_job_scripts_says_so(tmp_path):
    study = load_study("paper")
    flags = ["--shards", "shards/"]
    jobs = cluster.ClusterStudy(study, tmp_path, study.choose([MAIN]), flags, slurm=tmp_path)
    with pytest.raises(FileNotFoundError, match="start this from the repository's folder"):
        list(cluster.submit(jobs))


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


def test_a_study_of_tasks_alone_is_submitted_with_them(tmp_path, monkeypatch):
    submitted = []
    job = lambda _, words, **environment: submitted.append((words, environment)) or "1"  # noqa: E731
    monkeypatch.setattr(cluster, "_sbatch", job)
    tasks = {"suite": None, "tasks": ["a", "b"], "include": ["own"], "launch": "commands"}
    study = load_study(study_file(tmp_path, **tasks))
    jobs = cluster.ClusterStudy(
        study, tmp_path, study.arms, ["--shards", "shards/"], slurm=tmp_path
    )
    list(cluster.submit(jobs))
    for arguments, environment in (submitted[0], submitted[2]):
        assert arguments[-3:] == [str(tmp_path / "eval.sh"), "--tasks=a,b", "--include-path=own"]
        assert environment["SUITE"] == ""


def made(**scores: float) -> Scores:
    """An evaluation in which each task has two documents of the same score."""
    of = {row.task: row for row in suite("tiny").rows}
    return Scores({of[task]: {0: score, 1: score} for task, score in scores.items()}, {})


SCORES = {
    START: [made(tiny_facts=1.0, tiny_statements=0.9, tiny_words=0.5)],
    BASELINE: [
        made(tiny_facts=0.8, tiny_statements=0.7, tiny_words=0.9),
        made(tiny_facts=0.6, tiny_statements=0.7, tiny_words=0.8),
    ],
    MAIN: [
        made(tiny_facts=0.9, tiny_statements=0.9, tiny_words=0.9),
        made(tiny_facts=0.9, tiny_statements=0.7, tiny_words=0.8),
    ],
}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A workplace in which SCORES were reached; gives a function to replace some of them."""
    folders = {tmp_path / START: SCORES[START][0]}
    for name in (BASELINE, MAIN):
        for seed, scored in enumerate(SCORES[name], 1):
            (tmp_path / f"seed-{seed}" / name).mkdir(parents=True)
            folders[tmp_path / f"seed-{seed}" / name] = scored
    read = lambda folder, share: folders.get(folder, Scores({}, {}))  # noqa: E731
    monkeypatch.setattr(running, "read_scores", read)
    return Workplace(TABLE3, tmp_path), folders


def test_the_report_holds_means_over_seeds_and_shares(finished, tmp_path):
    place, _ = finished
    metrics = [
        {"step": 1, "tokens": 100, "tokens_per_second": 50, "flops": 2e9, "ce": 2.0, "kd": 1.0},
        {"step": 2, "tokens": 300, "tokens_per_second": 50, "flops": 4e9, "ce": 1.0, "kd": 0.5},
    ]
    text = "".join(json.dumps(record) + "\n" for record in metrics)
    (tmp_path / "seed-1" / MAIN / "metrics.jsonl").write_text(text, encoding="utf-8")
    files = write_report(place, ["x: it diverged."], tmp_path, "ldistill study tiny --seeds 2")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results) == [START, BASELINE, MAIN]
    assert results[BASELINE]["language"]["mean"] == pytest.approx((0.75 + 0.65) / 2)
    assert results[BASELINE]["language"]["std"] == pytest.approx(statistics.stdev([0.75, 0.65]))
    assert results[MAIN]["language"] == {
        "mean": pytest.approx(0.85),
        "std": pytest.approx(statistics.stdev([0.9, 0.8])),
        "seeds": 2,
    }
    # Means over the seeds, of which the second has no metrics.
    assert results[MAIN]["cost"] == {"steps": 1, "tokens": 200, "flops": 3e9, "seconds": 4}
    said = files[0].read_text(encoding="utf-8")
    # (0.85 - 0.7) of (0.95 - 0.7) regained; reading as good as with labels alone.
    assert "language 0.850 (60% of it), reading 0.850 (100.0% of `nanovlm-full`'s)" in said
    assert "Seeds: 2." in said
    assert "| lingudistill | its own | 1 | 200 | 3.00e+09 | 0.1 |" in said
    assert "- x: it diverged." in said
    assert {file.name for file in files[2:]} == {"language_vs_reading.png", "loss_curves.png"}
    assert all(file.stat().st_size > 1000 for file in files[2:])


def test_without_any_reading_there_is_still_a_report(finished, tmp_path):
    place, folders = finished
    for folder, scored in folders.items():
        blind = {r: d if r.task != "tiny_words" else {0: 0.0} for r, d in scored.rows.items()}
        folders[folder] = Scores(blind, {})
    said = write_report(place, [], tmp_path, "ldistill study tiny")[0].read_text(encoding="utf-8")
    assert f"reading 0.000 (`{BASELINE}` has none)" in said


def test_likelihoods_have_a_front_and_differences(finished, tmp_path, monkeypatch):
    """Groups below 0, which the file puts on the axes."""
    place, folders = finished
    for folder, scored in folders.items():
        below = {row: {n: s - 4 for n, s in docs.items()} for row, docs in scored.rows.items()}
        folders[folder] = Scores(below, {})
    fronts = []

    def plot(axis, *values, **how) -> None:
        if how.get("zorder") == 0:
            fronts.append(values)

    monkeypatch.setattr("matplotlib.axes.Axes.plot", plot)
    likely = replace(place, study=replace(place.study, axes=("language", "reading")))
    said = write_report(likely, [], tmp_path, "")[0].read_text(encoding="utf-8")
    assert "reading -3.150 (nothing was lost), language -3.150 (+0.150 against `nanovlm" in said
    [(along, up)] = fronts
    assert [*along, *up] == pytest.approx([-3.05, -3.15, -3.5, -3.15])


def test_arms_with_fewer_seeds_are_reported_too(finished, tmp_path):
    """`--variant` and fewer seeds say what is to be run, not what is reported."""
    place, folders = finished
    del folders[tmp_path / "seed-2" / MAIN]
    few = Workplace(replace(TABLE3, seeds=1), tmp_path)
    said = write_report(few, [], tmp_path, "")[0].read_text(encoding="utf-8")
    assert "Seeds: 1 to 2." in said
    folders.clear()
    with pytest.raises(ValueError, match=r"nothing was evaluated\. x: why"):
        write_report(place, ["x: why"], tmp_path, "")


def test_the_setting_that_is_best_on_the_validation_part_is_chosen(monkeypatch):
    words, facts = (row for row in suite("tiny").rows if row.task in ("tiny_words", "tiny_facts"))
    arm = Arm("a", grid={"alpha": [0.1, 0.2]})
    study = replace(TABLE3, arms=(arm,), baseline="a", main="", validation=0.5)
    best_reported = Scores({words: {0: 1.0}}, {words: {1: 0.2}, facts: {1: 0.5}})
    best_validated = Scores({words: {0: 0.0}}, {words: {1: 0.3}, facts: {1: 0.5}})
    runs = [Run(arm, setting, 1) for setting in arm.settings]
    assert scores.best_setting(study, list(zip(runs, [best_reported, best_validated]))) == runs[1]
    assert scores.best_setting(study, list(zip(runs, [Scores({}, {})] * 2))) == runs[0]


def test_holm_corrects_the_smallest_p_by_all_tests():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_document_counts_once_however_many_seeds():
    words = next(row for row in suite("tiny").rows if row.task == "tiny_words")
    base = [Scores({words: dict.fromkeys(range(10), 0.0)}, {}) for _ in range(3)]
    better = [Scores({words: {n: float(n < 8) for n in range(10)} | {WHOLE: 1.0}}, {})] * 3
    arms = {BASELINE: base, MAIN: better, "same": base}
    (main, group, pair, p), (same, *_, one) = paired_tests(TABLE3, arms)
    assert (main, group, same) == (MAIN, "reading", "same")
    assert (pair.samples, pair.won, pair.lost) == (10, 8, 0)
    assert pair.p == pytest.approx(2 / 2**8)
    assert (p, one) == (pytest.approx(4 / 2**8), 1.0)


def evaluation(folder: Path, values: list[float], complete: bool = True) -> None:
    """What lmms-eval and `ldistill eval` leave of one task."""
    folder.mkdir(parents=True)
    mean, name = statistics.fmean(values), "20260101_000000"
    (folder / "m").mkdir()
    results = {"tiny_facts": {"acc,none": mean, "alias": "tiny_facts"}}
    counts = {"tiny_facts": {"original": len(values), "effective": len(values)}}
    record = {"results": results, "configs": {"tiny_facts": {}}, "n-samples": counts}
    (folder / "m" / f"{name}_results.json").write_text(json.dumps(record))
    samples = [
        {"doc_id": n, "target": "0", "filtered_resps": [""], "acc": value, "input": "?"}
        for n, value in enumerate(values)
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "m" / f"{name}_samples_tiny_facts.jsonl").write_text(lines)
    entry = {"name": "Facts", "group": "tiny_language", "metric": "acc,none", "value": mean}
    entry |= {"top": 1.0, "documents": len(values)}
    fields = {"model_args": "", "limit": None, "complete": complete, "results": "m"}
    text = json.dumps(fields | {"scores": {"tiny_facts": entry}})
    (folder / "eval.json").write_text(text)


def test_both_parts_together_are_all_documents(tmp_path):
    values = [float(n % 3 == 0) for n in range(100)]
    evaluation(tmp_path / "eval", values)
    (row,) = scores.read_scores(tmp_path, 0.0).rows
    assert row.task == "tiny_facts"
    split = scores.read_scores(tmp_path, 0.3)
    chosen, reported = split.validation[row], split.rows[row]
    assert chosen.keys().isdisjoint(reported)
    assert {**chosen, **reported} == dict(enumerate(values))
    assert 15 < len(chosen) < 45
    # A score that is no mean over the samples counts whole.
    record = json.loads((tmp_path / "eval" / "eval.json").read_text())
    record["scores"]["tiny_facts"]["value"] = 0.5
    (tmp_path / "eval" / "eval.json").write_text(json.dumps(record))
    assert scores.read_scores(tmp_path, 0.3).rows == {row: {WHOLE: 0.5}}
    assert scores.read_scores(tmp_path / "none", 0.3).rows == {}
    # What the study measures itself is split by document as well.
    (tmp_path / "measured.json").write_text('{"nearness": {"0": -0.25, "7": -0.75}}')
    nearness = [r for r in scores.read_scores(tmp_path, 0.0).rows if r.task == "nearness"]
    assert scores.read_scores(tmp_path, 0.0).of(*nearness) == -0.5
    (tmp_path / "eval" / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval/eval.json is damaged"):
        scores.read_scores(tmp_path, 0.3)


class Shortcut:
    """Stands for train.py, lmms-eval and the merge: each writes what the study looks for."""

    def __init__(self, monkeypatch):
        self.trained: list[dict[str, str]] = []
        self.merged: list[tuple[str, str, str]] = []
        self.called: list[list[str]] = []
        monkeypatch.setattr(Workplace, "programs", self)
        monkeypatch.setattr(running, "evaluate", self.evaluate)

    def run(self, module, words, log):
        """The status of a merge, or of a training, which diverges with learning_rate 1."""
        words = [*map(str, words)]
        pairs = words[1:] if words[0] == "merge" else words
        flags = dict(zip(pairs[::2], pairs[1::2]))
        if words[0] == "merge":
            self.merged.append((flags["--student"], Path(flags["--lm"]).name, flags["--weight"]))
            self.student(Path(flags["--out"]))
            return 0
        self.trained.append(flags)
        rate = flags.get("--learning_rate")
        if rate == "1":
            log.write_text("error: the loss of step 3 is nan\n")
            return 2
        folder, steps = Path(flags["--output_dir"]), int(flags.get("--max_steps", 10))
        self.student(folder / "student")
        flops = 3e6 if flags.get("--distil") == "language" else 1e6
        record = {"tokens": 50, "tokens_per_second": 10, "flops": flops, "ce": 1.0}
        lines = [json.dumps({"step": n + 1} | record) for n in range(steps)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        return 0

    def call(self, words, log):
        self.called.append(words)
        self.student(Path(words[-1]))
        return 0

    @staticmethod
    def student(folder):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    @staticmethod
    def evaluate(asked, run):
        """Better with a higher alpha or weight in the name."""
        quality = 8 if "0.7" in asked.student or "0.5" in asked.student else 4
        evaluation(asked.out, [float(n % 10 < quality) for n in range(60)])


ARMS = {
    "labels": {"recipe": BASELINE, "grid": {"alpha": None}},
    "selective": {"recipe": MAIN, "budget": {"flops": "labels"}},
    "broken": {"recipe": MAIN, "grid": {"learning_rate": [1]}},
    "merged": {"merge": {"of": "selective"}, "grid": {"weight": [0.1, 0.5]}},
    "lost": {"merge": {"of": "labels", "weight": 0.2}},
    "other": {
        "command": {"of": "labels", "run": "mine --from {student} -r {rate} {lm} {seed} {out}"},
        "grid": {"rate": [0.3]},
    },
}


def test_a_study_chooses_goes_on_after_failures_and_resumes(tmp_path, monkeypatch):
    shortcut = Shortcut(monkeypatch)
    fields = {"grid": {"alpha": [0.3, 0.7]}, "validation": 0.4, "seeds": 2}
    study = load_study(study_file(tmp_path, arms=ARMS, **fields))
    place = Workplace(study, tmp_path / "out")
    problems = run_study(place, study.arms, show=False)
    failed = [f"broken--alpha-{alpha}--learning_rate-1" for alpha in (0.3, 0.7)]
    assert [p.split(":")[0] for p in problems] == [
        *(f"{name}, seed 1" for name in failed), f"{failed[0]}, seed 2",
    ]  # fmt: skip
    assert "status 2 (the loss of step 3 is nan); its output is in" in problems[0]
    # The budget: labels took 10 steps of 1e6, a step of selective takes 3e6.
    real = [flags for flags in shortcut.trained if ".probe" not in flags["--output_dir"]]
    chosen = [flags for flags in real if "selective" in flags["--output_dir"]]
    assert [flags["--max_steps"] for flags in chosen] == ["4"] * 3
    assert [flags["--alpha"] for flags in chosen] == ["0.3", "0.7", "0.7"]
    assert not list(tmp_path.rglob("*.probe"))
    best = place.out / "seed-1" / "selective--alpha-0.7" / "student"
    other = str(best).replace("seed-1", "seed-2")
    labels = [str(place.out / f"seed-{seed}" / "labels" / "student") for seed in (1, 2)]
    assert shortcut.merged == [
        (str(best), "teacher", "0.1"), (str(best), "teacher", "0.5"), (labels[0], "teacher", "0.2"),
        (other, "teacher", "0.5"), (labels[1], "teacher", "0.2"),
    ]  # fmt: skip
    others = [place.out / f"seed-{seed}" / "other--rate-0.3" / "student" for seed in (1, 2)]
    lm = study.shared["teacher"]
    assert shortcut.called == [
        ["mine", "--from", source, "-r", "0.3", lm, seed, str(out)]
        for source, seed, out in zip(labels, "12", others, strict=True)
    ]
    said = write_report(place, problems, tmp_path / "report", "")[0].read_text(encoding="utf-8")
    results = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
    assert list(results) == [START, "labels", "selective", "merged", "lost", "other"]
    assert results["selective"]["setting"] == {"alpha": 0.7}
    assert results["selective"]["language"]["seeds"] == 2
    assert "of which 40% chose the settings" in said
    assert "## Document by document" in said
    assert f"- {failed[0]}, seed 1: training ended with status 2" in said
    # The same command does again only what failed.
    before = len(shortcut.trained)
    run_study(place, study.arms, show=False)
    again = [flags["--output_dir"] for flags in shortcut.trained[before:]]
    assert again
    assert all("broken" in folder for folder in again)
    # An arm that is another now is not taken for what it was.
    arms = ARMS | {"labels": {"recipe": "nanovlm-lang", "grid": {"alpha": None}}}
    other = load_study(study_file(tmp_path, arms=arms, **fields))
    again = run_study(replace(place, study=other), other.choose(["labels"]), show=False)
    assert [text.split(": remove")[0] for text in again] == [
        f"labels, seed {seed}: it was made otherwise" for seed in (1, 2)
    ]


def test_a_study_measures_what_no_task_scores_and_goes_on_where_that_failed(tmp_path, monkeypatch):
    shortcut = Shortcut(monkeypatch)
    study = load_study(study_file(tmp_path, seeds=1, measure="mine {student} {out}"))
    place = Workplace(study, tmp_path / "out")
    monkeypatch.setattr(shortcut, "call", lambda words, log: 1)
    problems = run_study(place, study.arms, show=False)
    assert [p.partition("; ")[0] for p in problems] == [
        f"{name}: mine ended with status 1" for name in (START, "labels, seed 1")
    ]

    def mine(words, log):
        Path(words[-1]).write_text('{"nearness": {"0": -0.25}}')
        return 0

    monkeypatch.setattr(shortcut, "call", mine)
    assert run_study(place, study.arms, show=False) == []
    assert "nearness" in {row.task for row in place.scores().rows}
    write_report(place, [], tmp_path, "")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["labels"]["nearness"]["mean"] == -0.25


def test_another_study_may_not_share_the_folder(tmp_path, monkeypatch):
    Shortcut(monkeypatch)
    study = load_study(study_file(tmp_path))
    run_study(Workplace(study, tmp_path / "out"), study.arms, show=False)
    other = Workplace(study, tmp_path / "out", ["--max_steps", "3"])
    with pytest.raises(ValueError, match="a study with other settings"):
        run_study(other, study.arms, show=False)


def test_a_task_without_data_is_named_and_the_rest_reported(tmp_path, monkeypatch):
    shortcut = Shortcut(monkeypatch)

    def lacking(asked, run):
        shortcut.evaluate(asked, run)
        raise ValueError("tiny_words: no data")

    monkeypatch.setattr(running, "evaluate", lacking)
    study = load_study(study_file(tmp_path, seeds=1))
    place = Workplace(study, tmp_path / "out")
    problems = run_study(place, study.arms, show=False)
    assert problems == [f"{START}: tiny_words: no data", "labels, seed 1: tiny_words: no data"]
    said = write_report(place, problems, tmp_path, "")[0].read_text(encoding="utf-8")
    assert "| Facts | 0.400 (+0.000) | **0.400** |" in said
    assert "missing" in said


@pytest.mark.slow
def test_a_small_study_runs_resumes_and_reports(tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="evaluates through lmms-eval")
    arguments = ["study", "table3", "--out", str(tmp_path), "--seeds", "1", "--items", "4"]
    arguments += ["--variant", MAIN, "--max_steps", "2", "--logging_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["ldistill", *arguments])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {START, MAIN}
    assert {"language", "reading", "tiny_facts"} <= set(results[MAIN])
    assert results[MAIN]["cost"]["flops"] > 1e9
    assert results[MAIN]["cost"]["steps"] == 2
    assert (tmp_path / "loss_curves.png").is_file()
    student = tmp_path / "seed-1" / MAIN / "student" / "model.safetensors"
    before = student.stat().st_mtime_ns
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert student.stat().st_mtime_ns == before
    other = CliRunner().invoke(app, [*arguments[:-4], "--max_steps", "3"])
    assert isinstance(other.exception, ValueError)
    assert "a study with other settings" in str(other.exception)
