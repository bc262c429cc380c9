"""`ldistill compare` from the outside, on recorded results: numbers, gaps, bad input."""

from __future__ import annotations

import csv
import json

import pytest
from eval_results import ocrbench_sample, ocrbench_samples, sample, write_results
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.evaluation.compare import task_data

runner = CliRunner()
SUBJECTS = ["natural science", "natural science", "language science", "social science"]


def science(scores, question="Question {}?"):
    return [
        sample(i, "A", "A", question.format(i), exact_match=float(score))
        for i, score in enumerate(scores)
    ]


def science_data(folder):
    """The task's data beside the results, with the category that lmms-eval doesn't log."""
    lines = [{"question": f"Question {i}?", "subject": s} for i, s in enumerate(SUBJECTS)]
    path = folder / "science.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kwargs = {"data_files": {"test": str(path)}}
    return {"dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Three variants: scienceqa with data, OCRBench as in Table 6, one task missing."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = {"scienceqa": science_data(tmp_path)}
    for name, science_scores, column, arc in (
        ("nanovlm", [1, 1, 1, 0], 2, 0.60),
        ("nanovlm-full", [1, 0, 0, 0], 2, 0.50),
        ("lingudistill", [0, 1, 1, 0], 1, None),
    ):
        scores = {
            "scienceqa": {"exact_match,none": sum(science_scores) / 4},
            "ocrbench": {"ocrbench_accuracy,none": 0.726 if column == 2 else 0.6},
        }
        if arc is not None:
            scores["arc_easy"] = {"acc,none": arc}
        samples = {"scienceqa": science(science_scores), "ocrbench": ocrbench_samples(column)}
        write_results(
            tmp_path / "runs" / name / "eval", scores, samples, configs=config, model=name
        )
    return tmp_path


def run(results, *words, names=("nanovlm", "nanovlm-full", "lingudistill")):
    folders = [str(results / "runs" / name) for name in names]
    command = ["compare", *folders, "--out", str(results / "report"), "--no-read-pictures", *words]
    return runner.invoke(app, command)


def test_everything(results):
    done = run(results)
    assert done.exit_code == 0, done.output
    assert "baseline nanovlm-full, original nanovlm" in done.output
    assert "different" not in done.output
    names = {p.name for p in (results / "report").iterdir()}
    assert names == {
        "report.md",
        "comparison.json",
        "scores.csv",
        "table.tex",
        "paired.csv",
        "recovery.png",
        "ocrbench.csv",
        "failures.html",
    }
    report = (results / "report" / "report.md").read_text()
    assert "| ScienceQA | 0.750 (+0.500) | 0.250 | **0.500** (+0.250) |" in report
    # Every row of a group is there, found or not, and never as a hole.
    assert "| HellaSwag | missing <sup>1</sup> | missing <sup>1</sup> | missing" in report
    assert "| ScienceQA | 50% |" in report
    assert "| ARC Easy | missing |" in report
    assert (
        "| **Layout extraction** | **Subtotal** | **263/400** | **263/400** | **174/400** |"
        in report
    )
    assert "loses its 126 points" in report
    assert "Layout extraction -89 (71%)" in report
    found = json.loads((results / "report" / "comparison.json").read_text())
    assert found["recovered"]["lingudistill"]["language"]["value"] == pytest.approx(0.5)
    assert found["ocrbench"]["lingudistill"]["Doc-oriented VQA"] == {"right": 90, "of": 200}
    assert {pair["variant"] for pair in found["paired"]} == {"nanovlm", "lingudistill"}


def test_won_and_lost_by_task_and_category(results):
    assert run(results).exit_code == 0
    with (results / "report" / "paired.csv").open() as file:
        lines = {(r["variant"], r["task"], r["category"]): r for r in csv.DictReader(file)}
    whole = lines["lingudistill", "scienceqa", ""]
    assert (whole["won"], whole["lost"], whole["samples"], whole["p"]) == ("2", "1", "4", "1")
    assert float(whole["difference"]) == pytest.approx(0.25)
    natural = lines["lingudistill", "scienceqa", "natural science"]
    assert (natural["won"], natural["lost"], natural["samples"]) == ("1", "1", "2")
    language = lines["lingudistill", "scienceqa", "language science"]
    assert (language["won"], language["lost"]) == ("1", "0")
    # Table 6: every sub-task but one loses; the net of KIE is 63.
    kie = lines["lingudistill", "ocrbench", "Key Information Extraction"]
    assert (kie["won"], kie["lost"]) == ("0", "63")
    assert float(kie["p"]) == pytest.approx(2 / 2**63)


def test_without_the_data_categories_are_named_missing(results):
    (results / "science.jsonl").unlink()
    done = run(results)
    assert done.exit_code == 0
    assert "ScienceQA: categories are missing: data set json, split test, is not on" in done.output


def test_other_samples(results):
    """Fewer samples, and one with another prompt: paired on what is common, and said so."""
    lines = science([1, 0, 1], "Question {}?")
    lines[2] = sample(2, "A", "A", "Another question?", exact_match=1.0)
    folder = results / "runs" / "short" / "eval"
    write_results(
        folder,
        {"scienceqa": {"exact_match,none": 0.667}},
        {"scienceqa": lines},
        expected={"scienceqa": 4},
        available={"scienceqa": 4241},
    )
    done = run(results, names=("nanovlm-full", "short"))
    assert done.exit_code == 0, done.output
    report = (results / "report" / "report.md").read_text()
    assert "On 4 of the task's 4,241 samples; partial: 3 of 4 samples are logged." in report
    assert "1 samples of nanovlm-full are not among short's: ScienceQA" in report
    assert "1 samples have another prompt or expected answer in short than in" in report
    with (results / "report" / "paired.csv").open() as file:
        assert {r["samples"] for r in csv.DictReader(file) if r["category"] == ""} == {"2"}
    assert "No original" in done.output
    assert "OCRBench: short has no results: its sub-tasks are missing." in done.output


def test_unlike_options_and_limits_are_said(tmp_path):
    """Not what was trained differs then, but how it was asked."""
    everyone = (
        ("nanovlm-full", "a,dtype=float32,tiling=True", 4),
        ("lingudistill", "b,dtype=auto,tiling=False", 4),
        ("nanovlm", "c", 2),
    )
    for name, model, count in everyone:
        write_results(
            tmp_path / name,
            {"scienceqa": {"exact_match,none": count / 5}},
            {"scienceqa": science([1] * count)},
            model=model,
            available={"scienceqa": 4},
        )
    folders = [str(tmp_path / name) for name, _, _ in everyone]
    done = runner.invoke(app, ["compare", *folders, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (
        "Evaluated with different model options: nanovlm-full dtype=float32, tiling=True; "
        "lingudistill without; nanovlm without (scienceqa)."
    ) in done.output
    report = (tmp_path / "out" / "report.md").read_text()
    mixed = (
        "ScienceQA: scores of different samples (2 for nanovlm, 4 for nanovlm-full, 4 for "
        "lingudistill), also in its group."
    )
    assert f"- {mixed}" in report
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["recovered_notes"] == [mixed]


def test_limited_ocrbench_is_recomputed(tmp_path):
    """lmms-eval divides by 1000 whatever the limit."""
    lines = [ocrbench_sample(i, "Digit String Recognition", ["1"], "1", i < 2) for i in range(4)]
    write_results(
        tmp_path / "a",
        {"ocrbench": {"ocrbench_accuracy,none": 0.002}},
        {"ocrbench": lines},
        available={"ocrbench": 1000},
    )
    done = runner.invoke(app, ["compare", str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "| OCRBench | **0.500** <sup>2</sup> |" in done.output
    assert "recomputed from the samples" in done.output
    assert "No baseline" in done.output
    assert not (tmp_path / "out" / "paired.csv").exists()


def test_an_ocrbench_whose_samples_are_not_its_results(tmp_path):
    lines = [ocrbench_sample(0, "Key Information Extraction", ["1"], "1", True)]
    for name, told in (("a", 0.001), ("b", 0.002)):
        score = {"ocrbench": {"ocrbench_accuracy,none": told}}
        write_results(tmp_path / name, score, {"ocrbench": lines})
    folders = [str(tmp_path / name) for name in ("a", "b")]
    done = runner.invoke(app, ["compare", *folders, "--out", str(tmp_path / "out")])
    assert "OCRBench: b's samples add up to 1, its results file says 2" in done.output
    assert "a's samples add up" not in done.output


def test_an_ocrbench_of_another_kind(tmp_path):
    lines = [ocrbench_sample(0, "Emoji", ["1"], "1", True)]
    score = {"ocrbench": {"ocrbench_accuracy,none": 0.5}}
    write_results(tmp_path / "a", score, {"ocrbench": lines})
    done = runner.invoke(app, ["compare", str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "no known sub-task ('Emoji')" in done.output
    assert "a's sub-tasks are missing." in done.output


def test_no_samples(results):
    for path in (results / "runs" / "lingudistill").rglob("*_samples_*"):
        path.unlink()
    done = run(results)
    assert done.exit_code == 0, done.output
    assert (
        "lingudistill has no samples file (evaluate with samples logged): ScienceQA, OCRBench"
        in (done.output)
    )
    assert "| ScienceQA | 0.750 (+0.500) | 0.250 | **0.500** (+0.250) |" in done.output


def test_captions_have_no_scores_per_sample(tmp_path):
    for name in ("nanovlm-full", "v"):
        lines = [sample(0, "a cat", ["cat"], coco_CIDEr={"pred": "a cat", "answer": ["cat"]})]
        key = {"coco_CIDEr,none": 0.8}
        write_results(tmp_path / name, {"coco2017_cap_val": key}, {"coco2017_cap_val": lines})
    folders = [str(tmp_path / "nanovlm-full"), str(tmp_path / "v")]
    done = runner.invoke(app, ["compare", *folders, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "v's samples carry no score of their own, only the whole has one: COCO" in done.output
    assert "not compared sample by sample, scores are." in done.output


def test_tasks_of_no_suite(tmp_path):
    for name, value in (("nanovlm-full", 0.25), ("v", 0.5)):
        write_results(tmp_path / name, {"my_task": {"f1,none": value}})
    folders = [str(tmp_path / "nanovlm-full"), str(tmp_path / "v")]
    done = runner.invoke(app, ["compare", *folders, "--out", str(tmp_path / "out")])
    assert "| **Other tasks** |" in done.output
    assert "| my_task | 0.250 | **0.500** (+0.250) |" in done.output


def test_a_run_that_was_not_evaluated_is_left_out_and_said(results):
    (results / "runs" / "distill-full" / "student").mkdir(parents=True)
    done = run(results, names=("nanovlm", "nanovlm-full", "lingudistill", "distill-full"))
    assert done.exit_code == 0, (done.output, done.exception)
    assert "distill-full is left out:" in done.stderr
    assert "| lingudistill" in done.stdout
    assert "distill-full" not in done.stdout.split("\n\n")[0]
    assert "distill-full is left out:" in (results / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--baseline", "CE"], "baseline 'CE' is none of the variants; there are: nanovlm,"),
        (["--original", "LM"], "original 'LM' is none of the variants"),
        (["--baseline", "nanovlm", "--original", "nanovlm"], "must differ"),
        (["--tasks", "arc_easy,xyz"], "no results for task xyz; there are results for: scienceqa"),
        (["--suite", "tiny"], "no results for any task of suite tiny"),
        (["--suite", "papers"], "Did you mean 'paper'"),
    ],
)
def test_bad_input(results, words, message):
    done = run(results, *words)
    assert done.exit_code != 0
    assert message in str(done.exception)
    assert not (results / "report").exists()


def test_suites_and_tasks_choose_rows(results):
    assert "MMStar" in run(results, "--suite", "paper").output
    done = run(results, "--tasks", "scienceqa")
    assert "ScienceQA" in done.output
    assert "OCRBench" not in done.output


def test_data_are_never_downloaded(tmp_path, monkeypatch):
    """A data set that is not here is a reason, with the hub switched off while looking."""
    import datasets
    import huggingface_hub.constants as hub

    seen = []

    def load(*args, **kwargs):
        seen.append((datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE))
        raise FileNotFoundError("Couldn't find it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = hub.HF_HUB_OFFLINE
    write_results(
        tmp_path / "v",
        {"ai2d": {"exact_match,none": 0.5}},
        configs={"ai2d": {"dataset_path": "lmms-lab/ai2d", "test_split": "test"}},
    )
    from ldistill.evaluation.compare.results import read_variants

    result = read_variants([str(tmp_path / "v")])[0].tasks["ai2d"]
    data = task_data.load_task_data(result)
    assert data.documents is None
    assert "data set lmms-lab/ai2d, split test, is not on this machine" in data.reason
    assert seen == [(True, True)]
    assert before == hub.HF_HUB_OFFLINE
