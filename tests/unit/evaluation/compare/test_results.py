"""Reading lmms-eval's files: what is in them, which count, what is said about bad ones."""

from __future__ import annotations

import copy
import json

import pytest
from eval_results import ocrbench_sample, sample, write_results

from ldistill.evaluation.compare.comparison import sample_categories, sample_score
from ldistill.evaluation.compare.results import read_variants
from ldistill.evaluation.suites import ROWS, Row

ROW = {row.id: row for row in ROWS}


def test_a_variant_is_its_folder(tmp_path):
    write_results(
        tmp_path / "lingudistill" / "eval",
        {"arc_easy": {"acc,none": 0.5, "acc_norm,none": 0.75}},
        {"arc_easy": [sample(0, [["3.0", "False"], ["1.5", "True"]], 1, acc=1.0, acc_norm=1.0)]},
        available={"arc_easy": 2376},
    )
    (variant,) = read_variants([str(tmp_path / "lingudistill" / "eval")])
    assert variant.name == "lingudistill"
    task = variant.tasks["arc_easy"]
    assert dict(task.scores) == {"acc,none": 0.5, "acc_norm,none": 0.75}
    assert (task.expected, task.available, task.limited) == (1, 2376, True)
    only = task.samples()[0]
    assert (only.answer, only.target, only.question) == ("choice 1", "1", "Question 0?")
    assert only.metrics == {"acc": 1.0, "acc_norm": 1.0}
    (named,) = read_variants([f"best={tmp_path / 'lingudistill'}"])
    assert named.name == "best"


def test_files_of_a_glob_are_passed_over(tmp_path):
    write_results(tmp_path / "kd", {"arc_easy": {"acc,none": 0.5}})
    (tmp_path / "kd.train.log").write_text("step 1")
    found = read_variants(map(str, sorted(tmp_path.iterdir())))
    assert [variant.name for variant in found] == ["kd"]
    with pytest.raises(FileNotFoundError, match="no folder among the arguments"):
        read_variants([str(tmp_path / "kd.train.log")])


def test_the_newest_result_of_a_task_counts(tmp_path):
    write_results(tmp_path / "a", {"arc_easy": {"acc,none": 0.1}, "ai2d": {"x,none": 1}})
    write_results(tmp_path / "a", {"arc_easy": {"acc,none": 0.9}}, time="20261102_080000")
    (variant,) = read_variants([str(tmp_path / "a")])
    assert variant.tasks["arc_easy"].scores == {"acc,none": 0.9}
    assert set(variant.tasks) == {"arc_easy", "ai2d"}
    assert any("arc_easy evaluated more than once" in note for note in variant.notes)


def test_a_folder_of_variants(tmp_path):
    root = tmp_path / "results"
    for name, value in (("ce", 0.1), ("kd", 0.2)):
        write_results(root / name, {"arc_easy": {"acc,none": value}}, model=f"runs/{name}/student")
    variants = read_variants([str(root)])
    assert {v.name: v.tasks["arc_easy"].scores["acc,none"] for v in variants} == {
        "ce": 0.1,
        "kd": 0.2,
    }
    write_results(
        root / "ce", {"arc_easy": {"acc,none": 0.3}}, model="elsewhere", time="20270101_000001"
    )
    with pytest.raises(ValueError, match=r"results/ce holds results of several models"):
        read_variants([str(root)])


def test_a_run_evaluated_while_it_trained(tmp_path):
    """The run's own student counts; without results of it, the last step evaluated."""
    run = tmp_path / "run"
    for step in (5, 10):
        folder = run / "eval" / f"step-{step}"
        score = {"arc_easy": {"acc,none": step / 100}}
        write_results(folder, score, model=str(folder / "student"))
    (variant,) = read_variants([str(run)])
    assert variant.name == "run"
    assert variant.tasks["arc_easy"].scores == {"acc,none": 0.1}
    assert variant.notes == ("run: evaluated during training, at step 10.",)
    student = {"arc_easy": {"acc,none": 0.4}}
    write_results(run / "eval" / "end", student, model=str(run / "student"))
    (variant,) = read_variants([str(run)])
    assert variant.tasks["arc_easy"].scores == {"acc,none": 0.4}
    assert "2 other evaluations" in variant.notes[0]


def test_a_runs_eval_folder_wherever_it_lies(tmp_path):
    """`NAME=RUN/eval`, which also holds what was evaluated while the run trained."""
    run = tmp_path / "run"
    for place, value in ((run / "eval", 0.4), (run / "eval" / "step-5", 0.1)):
        student = run / "student" if value == 0.4 else place / "student"
        write_results(place, {"arc_easy": {"acc,none": value}}, model=str(student))
    moved = run.rename(tmp_path / "moved")
    for argument in (f"x={moved / 'eval'}", str(moved)):
        (variant,) = read_variants([argument])
        assert variant.tasks["arc_easy"].scores == {"acc,none": 0.4}
        assert "1 other evaluations" in variant.notes[0]
    write_results(moved / "eval" / "teacher", {"arc_easy": {"acc,none": 0.9}}, model="a/teacher")
    with pytest.raises(ValueError, match="results of several models"):
        read_variants([f"x={moved / 'eval'}"])
    moved.rename(run)
    (variant,) = read_variants([f"x={run / 'eval'}"])
    assert variant.tasks["arc_easy"].scores == {"acc,none": 0.4}
    write_results(tmp_path / "other" / "eval", {"arc_easy": {"acc,none": 0.7}}, model="other")
    found = {v.name: v.tasks["arc_easy"].scores["acc,none"] for v in read_variants([str(tmp_path)])}
    assert found == {"run": 0.4, "other": 0.7}


def test_what_tasks_submit_is_no_result(tmp_path):
    write_results(tmp_path / "kd", {"arc_easy": {"acc,none": 0.5}})
    other = tmp_path / "kd" / "submissions" / "coco_captions_val2014_alg_results.json"
    other.parent.mkdir()
    other.write_text("[]")
    (variant,) = read_variants([str(tmp_path / "kd")])
    assert set(variant.tasks) == {"arc_easy"}


def test_filters_take_turns(tmp_path):
    lines = [
        sample(i, answer, "A", exact_match=float(answer == "A"))
        for answers in (["A.", "B"], ["A", "B"])
        for i, answer in enumerate(answers)
    ]
    scores = {"exact_match,none": 0.0, "exact_match,flexible-extract": 0.5}
    write_results(tmp_path / "v", {"ai2d": scores}, {"ai2d": lines})
    (variant,) = read_variants([str(tmp_path / "v")])
    task = variant.tasks["ai2d"]
    assert [s.answer for s in task.samples("none").values()] == ["A.", "B"]
    assert [s.answer for s in task.samples("flexible-extract").values()] == ["A", "B"]


def test_bad_input_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_variants([str(tmp_path / "nothing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no lmms-eval results"):
        read_variants([str(tmp_path / "empty")])
    (tmp_path / "empty" / "1_samples_ocrbench.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="did not finish"):
        read_variants([str(tmp_path / "empty")])
    for name in ("a", "b"):
        write_results(tmp_path / name / "run", {"arc_easy": {"acc,none": 0.1}})
    with pytest.raises(ValueError, match="two variants are called 'run'"):
        read_variants([str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")])
    path = write_results(tmp_path / "c", {"arc_easy": {"acc,none": 0.1}})
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match="not a results file of lmms-eval"):
        read_variants([str(tmp_path / "c")])


def test_a_folder_without_results_is_told_of_and_left_out(tmp_path):
    write_results(tmp_path / "kd", {"arc_easy": {"acc,none": 0.5}})
    (tmp_path / "new" / "student").mkdir(parents=True)
    told = []
    found = read_variants(map(str, (tmp_path / "new", tmp_path / "kd")), told.append)
    assert [variant.name for variant in found] == ["kd"]
    (sentence,) = told
    assert sentence.startswith(f"new is left out: {tmp_path / 'new'} holds no lmms-eval results")
    assert f"--student {tmp_path / 'new'} --out {tmp_path / 'new' / 'eval'}" in sentence
    with pytest.raises(FileNotFoundError, match=r"nothing to compare[\s\S]*new is left out"):
        read_variants([str(tmp_path / "new")], told.append)
    assert len(told) == 1
    read_variants([f"gone={tmp_path / 'gone'}", str(tmp_path / "kd")], told.append)
    assert told[1].startswith(f"gone is left out: {tmp_path / 'gone'} is no folder")


def test_a_cut_off_samples_file_is_counted(tmp_path):
    lines = [sample(i, "x", "x", anls=1.0) for i in range(3)]
    path = write_results(tmp_path / "v", {"docvqa_val": {"anls,none": 1.0}}, {"docvqa_val": lines})
    samples = next(path.parent.glob("*_samples_*"))
    samples.write_text(samples.read_text()[:-40])
    task = read_variants([str(tmp_path / "v")])[0].tasks["docvqa_val"]
    assert len(task.samples()) == 2
    assert task.unreadable == 1


@pytest.mark.parametrize(
    ("row", "metrics", "score", "categories"),
    [
        (ROW["arc_easy"], {"acc": 1.0}, 1.0, ()),
        (ROW["docvqa_val"], {"anls": 0.6}, 0.6, ()),
        (
            ROW["ocrbench"],
            {"ocrbench_accuracy": {"question_type": "Digit String Recognition", "score": 1}},
            1.0,
            ("Digit String Recognition",),
        ),
        (
            ROW["mme:mme_perception_score"],
            {"mme_perception_score": {"question_id": "1", "category": "count", "score": 0.0}},
            0.0,
            ("count",),
        ),
        (
            ROW["mmstar"],
            {"math": {"l2_category": "geometry", "score": 1.0}, "average": {"score": 1.0}},
            1.0,
            ("math",),
        ),
        (
            ROW["mmmu_val"],
            {
                "mmmu_acc": {
                    "question_type": "multiple-choice",
                    "subdomain": "Art",
                    "answer": "B",
                    "parsed_pred": ["B"],
                }
            },
            1.0,
            ("Art",),
        ),
        (ROW["coco2017_cap_val"], {"coco_CIDEr": {"pred": "a cat", "answer": ["cat"]}}, None, ()),
        (ROW["arc_easy"], {"acc": float("nan")}, None, ()),
    ],
)
def test_scores_and_categories_of_samples(row: Row, metrics, score, categories, tmp_path):
    line = sample(0, "B", "B", **metrics)
    write_results(tmp_path / "v", {row.task: {row.key: 0.5}}, {row.task: [line]})
    (only,) = read_variants([str(tmp_path / "v")])[0].tasks[row.task].samples().values()
    assert sample_score(only, row) == score
    assert sample_categories(only, row) == categories


@pytest.mark.slow
def test_the_files_are_those_that_lmms_eval_writes(tmp_path):
    """Documents scored by lmms-eval's own code, written by its own tracker, read back."""
    pytest.importorskip("lmms_eval", reason="needs the extra: pip install ldistill[eval]")
    from lmms_eval.api.instance import Instance
    from lmms_eval.evaluator import _process_document_results
    from lmms_eval.loggers import EvaluationTracker
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    class Task:
        config = type("Config", (), {"repeats": 1})

        def process_results(self, doc, results):
            return ocrbench_process_results(doc, results)

        def doc_to_target(self, doc):
            return doc["answer"]

    kind = "Key Information Extraction"
    docs = [
        {"dataset": "SROIE", "question_type": kind, "question": "total?", "answer": ["14.20"]},
        {"dataset": "SROIE", "question_type": kind, "question": "date?", "answer": ["02/02/18"]},
    ]
    logged = []
    for doc_id, (doc, answer) in enumerate(zip(docs, ["14.20", "13.40"])):
        arguments = (doc["question"], {}, None, doc_id, "ocrbench", "test")
        metadata = {"task": "ocrbench", "doc_id": doc_id, "repeats": 1}
        instance = Instance("generate_until", arguments, 0, metadata=metadata)
        instance.doc = doc
        instance.resps, instance.filtered_resps = [answer], {"none": answer}
        done = _process_document_results(
            (doc_id, doc, [instance]),
            task=Task(),
            filter_key="none",
            reasoning_tags=None,
            log_samples=True,
        )
        logged.append(done.logged_sample)
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.general_config_tracker.log_experiment_args("m", "pretrained=a/b", "", "", False)
    results = {
        "results": {"ocrbench": {"alias": "ocrbench", "ocrbench_accuracy,none": 0.001}},
        "configs": {"ocrbench": {"task": "ocrbench"}},
        "config": {"model_args": "pretrained=a/b"},
    }
    tracker.save_results_aggregated(results, {"ocrbench": copy.deepcopy(logged)}, "20261101_120000")
    tracker.save_results_samples("ocrbench", logged)
    ours = [
        ocrbench_sample(0, kind, ["14.20"], "14.20", True, "total?"),
        ocrbench_sample(1, kind, ["02/02/18"], "13.40", False, "date?"),
    ]
    write_results(
        tmp_path / "ours", {"ocrbench": {"ocrbench_accuracy,none": 0.001}}, {"ocrbench": ours}
    )
    (theirs,), (mine,) = (read_variants([str(tmp_path / n)]) for n in ("theirs", "ours"))
    assert theirs.model == "a/b"
    assert theirs.tasks["ocrbench"].scores == mine.tasks["ocrbench"].scores
    assert theirs.tasks["ocrbench"].samples() == mine.tasks["ocrbench"].samples()
    written = theirs.tasks["ocrbench"].samples_path.read_text().splitlines()
    assert set(json.loads(written[0])) == set(ours[0])
