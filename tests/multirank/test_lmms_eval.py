"""Our models through the real lmms-eval, and what `ldistill eval` says when something is wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from helpers_data import picture

pytest.importorskip("lmms_eval", reason="needs lmms-eval (pip install 'ldistill[eval]')")

from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.evaluation import lmms_run
from ldistill.evaluation.items import evaluate
from ldistill.evaluation.lmms_run import Evaluation, clean_environment, read_results
from ldistill.evaluation.scorer import model_folder
from ldistill.evaluation.suites import ROWS, SUITES, suite
from ldistill.models.formats import load_processor, load_student
from ldistill.tiny.benchmark import benchmark
from ldistill.tiny.world import DEFAULT_SEED, World

STUDENT = "pkg://ldistill.tiny/pair/student"
TEACHER = "pkg://ldistill.tiny/pair/teacher"
PER_TASK = 8
needs_entry_point = pytest.mark.skipif(
    not any(
        ep.name == "ldistill" for ep in lmms_run.metadata.entry_points(group="lmms_eval.models")
    ),
    reason="ldistill is not installed, so lmms-eval cannot find its models",
)


def write_own_tasks(folder: Path) -> None:
    """Tasks as a user writes them: JSON, functions beside the YAML, no pictures or two."""
    folder.mkdir()
    lines = [
        {"question": f"creature {n} likes", "answers": ["red", "blue moss"], "gold": n % 2}
        for n in range(3)
    ]
    data = folder / "data.json"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "one.png").write_bytes(picture(seed=1))
    (folder / "two.png").write_bytes(picture(seed=2))
    (folder / "utils.py").write_text(
        "from pathlib import Path\n"
        "from PIL import Image\n"
        "HERE = Path(__file__).parent\n"
        "def two_pictures(doc):\n"
        "    return [Image.open(HERE / name) for name in ('one.png', 'two.png')]\n"
    )
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    plain = {
        "task": "own_plain",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "answers",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    pictures = (
        "task: own_pictures\noutput_type: generate_until\ndoc_to_visual: !function"
        " utils.two_pictures\ndoc_to_text: '{{question}}?'\ndoc_to_target: '{{answers[0]}}'\n"
        "generation_kwargs: {max_new_tokens: 12, until: ['e']}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "own_plain.yaml").write_text(yaml.safe_dump(shared | plain))
    (folder / "own_pictures.yaml").write_text(yaml.safe_dump(shared) + pictures)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Caches of its own, and the variables of a launcher, which must do no harm."""
    root = tmp_path_factory.mktemp("lmms")
    values = {
        "LDISTILL_CACHE": str(root / "cache"),
        "HF_HOME": str(root / "hf"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield root


@pytest.fixture(scope="module")
def result(environment):
    """The tiny suite and two tasks of one's own, one invocation."""
    write_own_tasks(environment / "own")
    asked = Evaluation(
        STUDENT,
        environment / "out",
        suite="tiny",
        tasks=("own_plain", "own_pictures"),
        batch_size=5,
        include_paths=(environment / "own",),
        items_per_task=PER_TASK,
        environment={"HF_HUB_OFFLINE": "1"},
    )
    return lmms_run.evaluate(asked), environment / "out"


@needs_entry_point
@pytest.mark.slow
def test_accuracies_are_those_of_the_items(result):
    """lmms-eval's scores equal our own scorer's on the same items: every task, same student."""
    scores = result[0]["scores"]
    items = benchmark(World(DEFAULT_SEED), PER_TASK)
    expected = evaluate(load_student(STUDENT), load_processor(STUDENT), items, 16)
    for row in suite("tiny").rows:
        task = row.task.removeprefix("tiny_")
        assert scores[row.id]["value"] == pytest.approx(expected[task]), task
        assert scores[row.id]["documents"] == PER_TASK
    for group in ("language", "reading", "vision"):
        assert result[0]["groups"][f"tiny_{group}"] == pytest.approx(expected[group])
    assert 0 < sum(score["value"] for score in scores.values()) < len(scores)


@needs_entry_point
@pytest.mark.slow
def test_results_are_complete_and_samples_logged(result):
    record, out = result
    assert record["complete"]
    assert record["missing"] == {}
    assert json.loads((out / "eval.json").read_text()) == record
    assert set(record["samples"]) == {*SUITES["tiny"].tasks, "own_plain", "own_pictures"}
    for task, path in record["samples"].items():
        samples = [json.loads(line) for line in (out / path).read_text().splitlines()]
        assert [sample["doc_id"] for sample in samples] == list(range(len(samples))), task
    pictures = (out / record["samples"]["own_pictures"]).read_text().splitlines()
    answers = [json.loads(line)["filtered_resps"] for line in pictures]
    assert all("e" not in answer[0] for answer in answers)
    plain = [json.loads(x) for x in (out / record["samples"]["own_plain"]).read_text().splitlines()]
    for sample in plain:
        losses = [float(loss) for loss, _ in sample["filtered_resps"]]
        assert len(losses) == 2
        assert min(losses) > 0
        assert sample["acc"] == float(int(losses[1] < losses[0]) == int(sample["target"]))


@needs_entry_point
@pytest.mark.slow
def test_two_processes_share_the_work_and_give_the_same(result, environment):
    """`--processes 2`: unequal shares (three documents), every answer there, once and as before."""
    tasks = ("tiny_facts", "tiny_words", "own_plain")
    asked = Evaluation(
        STUDENT,
        environment / "two",
        tasks=tasks,
        batch_size=5,
        include_paths=(environment / "own",),
        items_per_task=PER_TASK,
        environment={"HF_HUB_OFFLINE": "1"},
        processes=2,
    )
    found, (expected, out) = lmms_run.evaluate(asked), result
    log = (asked.out / lmms_run.LOG).read_text()
    assert "--nproc-per-node=2" in log.splitlines()[0]
    assert found["complete"]
    for row in found["scores"]:
        assert found["scores"][row] == expected["scores"][row]
    for task in tasks:
        one, two = (_answers(*of, task) for of in ((out, expected), (asked.out, found)))
        assert two.keys() == one.keys()
        if task == "tiny_words":  # text; the others are sums that may differ in the last digits
            assert two == one


def _answers(out: Path, record: dict, task: str) -> dict[int, list]:
    """Document → what was answered; two processes write theirs one behind the other."""
    lines = (out / record["samples"][task]).read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len({answer["doc_id"] for answer in answers}) == len(answers)
    return {answer["doc_id"]: answer["filtered_resps"] for answer in answers}


@needs_entry_point
@pytest.mark.slow
def test_what_is_missing_is_found(result, tmp_path):
    """Results without a task, without a score, or with fewer samples than documents."""
    record, out = result
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    assert read_results(copy, ("tiny_facts", "own_plain"))["missing"] == {}
    samples = copy / record["samples"]["tiny_facts"]
    samples.write_text("\n".join(samples.read_text().splitlines()[:-1]))
    results = json.loads((copy / record["results"]).read_text())
    del results["results"]["tiny_words"]["exact_match,none"]
    results["results"]["tiny_codes"]["exact_match,none"] = float("nan")
    (copy / record["results"]).write_text(json.dumps(results))
    missing = read_results(copy, (*SUITES["tiny"].tasks, "hellaswag"))["missing"]
    assert set(missing) == {"tiny_facts", "tiny_words", "tiny_codes", "hellaswag"}
    assert missing["tiny_facts"].startswith(f"{PER_TASK - 1} samples of {PER_TASK}")
    assert "exact_match,none" in missing["tiny_words"]


@needs_entry_point
@pytest.mark.slow
def test_an_exception_is_a_failure_that_names_the_document(environment):
    """A language model is shown a picture: no score, no empty answer, a sentence."""
    out = environment / "failed"
    asked = Evaluation(TEACHER, out, tasks=("tiny_facts", "tiny_words"), items_per_task=PER_TASK)
    with pytest.raises(ValueError, match=r"task tiny_words, document \d.*cannot see") as error:
        lmms_run.evaluate(asked)
    assert "lmms_eval.log" in str(error.value)
    record = json.loads((out / "eval.json").read_text())
    assert not record["complete"]
    assert set(record["missing"]) == {"tiny_facts", "tiny_words"}
    assert record["scores"] == {}


# ---- the model class, without the evaluator ----


def instances(count: int, seen: bool) -> tuple[dict, list]:
    """Requests as lmms-eval makes them, and the data they point to."""
    from lmms_eval.api.instance import Instance
    from PIL import Image

    docs = [{"image": Image.open(io.BytesIO(picture(seed=n)))} for n in range(count)]
    options = {"until": ["\n\n"], "max_new_tokens": 6, "temperature": 0}

    def visual(doc):
        return [doc["image"]] if seen else None

    made = [
        Instance(
            request_type="generate_until",
            arguments=(f"What is this? {'Really? ' * (n % 3)}", options, visual, n, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": n, "repeats": 1},
        )
        for n in range(count)
    ]
    return {"t": {"test": docs}}, made


def test_the_model_gives_the_same_answers_in_any_batch_and_order():
    from ldistill.evaluation.lmms_model import ScoredModel

    for seen in (True, False):
        answers = []
        for size in (1, 4):
            model = ScoredModel(STUDENT, batch_size=size, device="cpu")
            model.task_dict, requests = instances(5, seen)
            answers.append(model.generate_until(requests))
            turned = model.generate_until(requests[::-1])
            assert turned[::-1] == answers[-1]
        assert answers[0] == answers[1]


def test_a_broken_answer_stops_the_run(monkeypatch):
    from ldistill.evaluation.lmms_model import ScoredModel

    model = ScoredModel(STUDENT, batch_size=2, device="cpu")
    model.task_dict, requests = instances(3, seen=True)

    def broken(*args, **kwargs):
        raise FloatingPointError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr(model.scorer, "generate", broken)
        with pytest.raises(RuntimeError, match=r"task t, document \d.*not finite"):
            model.generate_until(requests)
    with pytest.raises(ValueError, match="batch_size"):
        ScoredModel(STUDENT, batch_size="auto", device="cpu")
    monkeypatch.setitem(model.task_dict["t"]["test"][0], "image", "film.mp4")
    with pytest.raises(ValueError, match="no picture"):
        model.generate_until(requests)


def test_generation_options_of_tasks():
    from ldistill.evaluation.lmms_model import read_options

    assert read_options({}, 128) == (128, [], {})
    options = {"until": "\n\n", "max_new_tokens": 16, "temperature": 0, "top_p": 1.0}
    assert read_options(options | {"do_sample": False, "num_beams": 1}, 128) == (
        16,
        ["\n\n"],
        {"num_beams": 1},
    )
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert read_options({"until": ["a", "b"]} | sampled, 9) == (9, ["a", "b"], sampled)


# ---- suites, environment, faults: no lmms-eval needed to run ----


def test_suites_are_the_papers_tables():
    assert [row.name for row in suite("paper").rows][:2] == ["AI2D", "COCO 2017 Captioning"]
    assert len(suite("paper").rows) == 14
    assert set(suite("document").tasks) == {"docvqa_val", "infovqa_val", "ocrbench"}
    assert suite("general").tasks == ("realworldqa", "mme", "mmmu_val", "mmstar")
    assert len({row.id for row in ROWS}) == len(ROWS)
    with pytest.raises(ValueError, match="Did you mean 'language'"):
        suite("langauge")


def test_lmms_eval_knows_the_papers_tasks_and_metrics():
    """The names in our table are lmms-eval's own: its YAML files are asked."""
    root = Path(lmms_run.find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"
    folders = {
        "coco2017_cap_val": "coco_cap", "docvqa_val": "docvqa", "infovqa_val": "infovqa",
        "mmmu_val": "mmmu", "arc_easy": "arc", "arc_challenge": "arc",
    }  # fmt: skip
    for row in suite("paper").rows:
        folder = root / folders.get(row.task, row.task)
        text = (folder / f"{row.task}.yaml").read_text()
        if include := [x.split(":")[1].strip() for x in text.splitlines() if "include:" in x]:
            text += (folder / include[0]).read_text()
        assert f"metric: {row.metric}" in text, row
        assert row.filter == "none" or f'name: "{row.filter}"' in text, row


def test_a_launchers_variables_do_not_reach_lmms_eval(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_DEEPSPEED", "TORCHELASTIC_X"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    env = clean_environment({"CUDA_VISIBLE_DEVICES": "3"}, offline=True)
    assert not {k for k in env if "RANK" in k or k.startswith(("ACCELERATE", "TORCHELASTIC"))}
    assert env["PYTHONPATH"].split(os.pathsep)[1:] == ["/elsewhere"]
    assert (env["CUDA_VISIBLE_DEVICES"], env["HF_HUB_OFFLINE"]) == ("3", "1")


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "ValueError: Tasks not found: hellasvag. Try `lmms-eval --tasks ...",
            ["no task hellasvag", "Did you mean hellaswag?", "--include-path"],
        ),
        (
            "ConnectionError: Couldn't reach 'lmms-lab-encoder/DocVQA' on the Hub (Offline)",
            ["The data of docvqa_val", "--tasks hellaswag"],
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", ["lower --batch-size"]),
        ("Traceback\nKeyError: 'image'", ["KeyError: 'image'"]),
        (
            "RuntimeError: task t, document 4: ValueError: no eyes",
            ["The model failed on task t, document 4: ValueError: no eyes"],
        ),
    ],
)
def test_causes_are_read_from_the_log(log, words):
    said = lmms_run.explain(log, ("docvqa_val", "hellaswag"))
    assert all(word in said for word in words), said
    assert lmms_run.explain("all is well", ()) is None


@needs_entry_point
def test_what_cannot_run_is_refused_before_it_starts(tmp_path, monkeypatch):
    def refused(match: str, **fields) -> None:
        with pytest.raises((ValueError, OSError), match=match):
            lmms_run.evaluate(Evaluation(**{"student": STUDENT, "out": tmp_path / "o"} | fields))

    refused("nothing to evaluate")
    refused("no suite 'tinny'.*'tiny'", suite="tinny")
    refused("does not exist", student=str(tmp_path / "none"), suite="tiny")
    refused("limit must be at least 1", suite="tiny", limit=0)
    for asked in ({"suite": "general"}, {"tasks": ("mm*",)}):
        refused("mme asks in pairs.*must be even, got 3", limit=3, **asked)
    refused("not a folder", tasks=("x",), include_paths=(tmp_path / "none",))
    monkeypatch.setattr(lmms_run.shutil, "which", lambda name: None)
    refused("coco2017_cap_val.*Java", suite="language")
    monkeypatch.setattr(lmms_run.metadata, "entry_points", lambda group: ())
    refused("pip install -e", suite="tiny")
    assert not (tmp_path / "o").exists()


def test_the_command_passes_on_what_it_is_given(tmp_path, monkeypatch, pair_root):
    seen = []

    def fake(asked):
        seen.append(asked)
        score = {"name": "Facts", "group": "tiny_language", "value": 0.5, "documents": 3}
        return {
            "student": asked.student,
            "scores": {"tiny_facts": score},
            "groups": {"tiny_language": 0.5},
            "limit": asked.limit,
            "results": "m/results.json",
        }

    monkeypatch.setattr(lmms_run, "evaluate", fake)
    run = tmp_path / "run"
    shutil.copytree(pair_root / "student", run / "student")
    flags = ["--suite", "tiny", "--tasks", "a, b", "--limit", "3", "--batch-size", "2", "--tiling"]
    command = ["eval", "--student", str(run), "--out", str(tmp_path / "o"), *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "0.500" in result.output
    assert "Only the first 3 documents" in result.output
    assert seen[0].all_tasks == (*SUITES["tiny"].tasks, "a", "b")
    assert (seen[0].limit, seen[0].batch_size) == (3, 2)
    assert seen[0].options == {"dtype": "auto", "tiling": True}
    result = CliRunner().invoke(app, [*command, "--drop-pictures"])
    assert "--drop-pictures is for a bare LM" in str(result.exception)
    assert model_folder(str(run)) == run / "student"
