"""What `ldistill eval` makes of lmms-eval's files: which tasks are there, and their scores."""

from __future__ import annotations

import json

import pytest
from eval_results import ocrbench_sample, sample, write_results

from ldistill.evaluation import lmms_run
from ldistill.evaluation.commands import show
from ldistill.evaluation.lmms_run import Evaluation, merge, read_evaluation, read_results


def choices(count: int) -> list[dict]:
    return [sample(i, [["1", "True"], ["2", "False"]], 0, acc=1.0) for i in range(count)]


@pytest.fixture
def evaluate(tmp_path, pair_root, monkeypatch):
    """`evaluate` with another lmms-eval: one that writes these results at once."""

    def run(tasks, scores=None, samples=None, **fields):
        def stand_in(asked, config, give_up):
            (asked.out / lmms_run.LOG).write_text("")
            if scores:
                write_results(asked.out, scores, samples, **fields)
            return 0

        monkeypatch.setattr(lmms_run, "_run", stand_in)
        limit = 4 if "available" in fields else None
        asked = Evaluation(str(pair_root / "student"), tmp_path / "out", tasks=tasks, limit=limit)
        return lmms_run.evaluate(asked)

    monkeypatch.setattr(lmms_run, "check", lambda *asked: None)
    return run


def test_only_lmms_evals_own_files_are_results(tmp_path):
    """COCO's captions lie beside them, as a list, under a name of that ending."""
    other = tmp_path / "submissions" / "coco_captions_val2014_alg_results.json"
    other.parent.mkdir()
    other.write_text(json.dumps([{"image_id": 1, "caption": "a"}]))
    found = read_results(tmp_path, ("arc_easy",))
    assert (found["results"], found["missing"]) == (
        None,
        {"arc_easy": "lmms-eval wrote no results"},
    )
    path = write_results(tmp_path, {"arc_easy": {"acc,none": 1.0}}, {"arc_easy": choices(2)})
    other.write_text("[]")  # the newest
    found = read_results(tmp_path, ("arc_easy",))
    assert (found["results"], found["missing"]) == (str(path.relative_to(tmp_path)), {})


@pytest.mark.parametrize("asked", ["own", "mc_*", "o?n", "both", "mc_a"])
def test_groups_tags_and_wildcards_are_their_tasks(tmp_path, asked):
    tasks = {"mc_a": {"acc,none": 0.5}, "mc_b": {"acc,none": 0.5}}
    samples = {task: choices(2) for task in tasks}
    configs = {"mc_a": {"tag": "own"}, "mc_b": {"tag": ["other", "own"]}}
    path = write_results(tmp_path, tasks, samples, configs=configs)
    record = json.loads(path.read_text())
    record["group_subtasks"]["both"] = ["mc_a", "mc_b"]
    record["results"]["both"] = {"acc,none": 0.5}
    path.write_text(json.dumps(record))
    found = read_results(tmp_path, (asked,))
    assert found["missing"] == {}
    assert set(found["scores"]) == ({"mc_a"} if asked == "mc_a" else set(tasks))
    path.with_name(path.name.replace("results.json", "samples_mc_a.jsonl")).unlink()
    found = read_results(tmp_path, (asked, "nothing"))
    assert found["missing"][asked].endswith("0 samples of 2 in 20261101_120000_samples_mc_a.jsonl")
    assert found["missing"]["nothing"] == "not among the results"


def test_a_part_of_mme_may_be_of_one_kind(tmp_path):
    """The first documents are all of one category; of the whole, both scores are asked for."""
    score = {"mme": {"mme_cognition_score,none": 100.0}}
    samples = {"mme": [sample(i, "yes", "yes") for i in range(4)]}
    write_results(tmp_path, score, samples, available={"mme": 2374})
    found = read_results(tmp_path, ("mme",))
    assert found["missing"] == {}
    assert list(found["scores"]) == ["mme:mme_cognition_score"]
    write_results(tmp_path, score, samples)
    found = read_results(tmp_path, ("mme",))
    assert found["missing"] == {"mme": "no score mme_perception_score,none"}


def test_a_limited_ocrbench_is_a_share_of_its_samples(evaluate):
    """lmms-eval divides by 1000 whatever the limit."""
    lines = [ocrbench_sample(i, "Digit String Recognition", ["1"], "1", i < 3) for i in range(4)]
    score = {"ocrbench": {"ocrbench_accuracy,none": 0.003}}
    result = evaluate(("ocrbench",), score, {"ocrbench": lines}, available={"ocrbench": 1000})
    assert result["scores"]["ocrbench"]["value"] == 0.75
    assert result["groups"] == {"document": 0.75}


def test_tasks_of_no_suite_have_their_score_too(evaluate, tmp_path, capsys):
    scores = {"mine": {"f1,none": 0.25, "acc,none": 0.5}, "arc_easy": {"acc,none": 0.75}}
    result = evaluate(("mine", "arc_easy"), scores, {task: choices(3) for task in scores})
    assert result["scores"]["mine"]["metric"] == "f1,none"
    assert result["scores"]["mine"]["documents"] == 3
    assert result["groups"] == {"language": 0.75}
    show(result, tmp_path / "out")
    said = capsys.readouterr().out
    assert "Other tasks" in said
    assert "0.250" in said


def test_an_evaluation_of_another_student_is_not_mixed_in(tmp_path, pair_root):
    earlier = {"model_args": "pretrained=/other", "limit": None, "complete": True}
    earlier["scores"] = {"own": {}}
    (tmp_path / "eval.json").write_text(json.dumps(earlier))
    asked = Evaluation(str(pair_root / "student"), tmp_path, tasks=("own",))
    with pytest.raises(ValueError, match=r"evaluation of pretrained=/other.*choose another --out"):
        lmms_run._earlier(asked, "pretrained=/this")
    assert lmms_run._earlier(asked, "pretrained=/other") == earlier


def test_one_that_left_nothing_keeps_no_folder(evaluate, tmp_path):
    with pytest.raises(ValueError, match="not complete"):
        evaluate(("arc_easy",), available={})
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["limit"] == 4
    result = evaluate(("arc_easy",), {"arc_easy": {"acc,none": 1.0}}, {"arc_easy": choices(2)})
    assert (result["complete"], result["limit"]) == (True, None)


def test_other_tasks_of_an_earlier_evaluation_are_kept():
    def score(value: float, top: float = 1.0) -> dict:
        return {"group": "general", "value": value, "top": top}

    earlier = {
        "samples": {"mme": "old.jsonl", "mmstar": "star.jsonl"},
        "scores": {"mme:mme_cognition_score": score(400, 800), "mmstar": score(0.3)},
        "missing": {"mme": "no score", "mmmu_val": "not among the results"},
    }
    result = {"tasks": ["mme"], "samples": {}, "scores": {}, "groups": {}, "missing": {}}
    merge(result, earlier)  # mme was asked again and failed: its old score must not stay
    assert result["scores"] == {"mmstar": score(0.3)}
    assert result["samples"] == {"mmstar": "star.jsonl"}
    result["scores"]["mme:mme_cognition_score"] = score(600, 800)
    merge(result, {})
    assert result["groups"] == {"general": pytest.approx((0.3 + 0.75) / 2)}
    assert result["missing"] == {"mmmu_val": "not among the results"}  # and not asked again
    assert not result["complete"]
    again = {"tasks": ["mmmu_v*"], "samples": {"mmmu_val": "m.jsonl"}, "missing": {}}
    again |= {"scores": {}, "groups": {}}
    merge(again, result)
    assert again["complete"]


@pytest.mark.parametrize("text", ['{"model_a', "[]", '{"complete": true}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/eval.json is damaged .*: remove it"):
        read_evaluation(tmp_path)
    (tmp_path / "eval.json").unlink()
    assert read_evaluation(tmp_path) is None


@pytest.mark.parametrize("character", [*",'\"{}[]"])
def test_paths_that_lmms_eval_would_split_are_refused(tmp_path, pair_root, character):
    """It takes them for the bounds of an argument: what follows of --tiling or --dtype is lost."""
    folder = tmp_path / f"it{character}s"
    folder.mkdir()
    asked = Evaluation(str(pair_root / "student"), folder / "out", tasks=("x",))
    with pytest.raises(ValueError, match="lmms-eval cannot take a path with"):
        lmms_run.evaluate(asked)
    with pytest.raises(ValueError, match="lmms-eval cannot take a path with"):
        lmms_run.check(Evaluation("student", tmp_path, tasks=("x",)), folder)
    assert not (folder / "out").exists()
