"""The page of won and lost samples: pictures from the data, filters in a real browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess

import pytest
from eval_results import ocrbench_sample, sample, write_results
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.evaluation.compare.results import read_variants
from ldistill.evaluation.compare.task_data import inline_picture, load_task_data, read_text

KIE, WORDS = "Key Information Extraction", "Non-Semantic Text Recognition"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def receipt(lines):
    image = Image.new("RGB", (900, 90 * len(lines) + 40), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((30, 20 + 90 * i), line, fill="black", font_size=56)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


DOCUMENTS = [
    ("What is the total amount?", KIE, ["14.20"], "14.20", "13.40"),  # lost, wrong spot
    ("What is the subtotal?", KIE, ["13.40"], "13.40", "13.40"),  # both right
    ("What is the price of <b>tea</b>?", KIE, ["5.04"], "5.04", "5"),  # lost, shortened
    ("What does the sign say?", WORDS, ["PEAEC"], "PEAEC", "peace"),  # lost, corrected
    ("What is the date?", KIE, ["06/03/18"], "13.40", "06/03/18"),  # won, wrong spot
]


@pytest.fixture
def results(tmp_path, monkeypatch):
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    bill = receipt(["Sub total 13.40", "Total RM 14.20", "Date 06/03/18"])
    pictures = [bill, bill, bill, receipt(["PEAEC"]), bill]
    data = Dataset.from_dict(
        {
            "question": [d[0] for d in DOCUMENTS],
            "image": [{"bytes": p, "path": None} for p in pictures],
        },
        features=Features({"question": Value("string"), "image": Picture()}),
    )
    data.to_parquet(str(tmp_path / "bench.parquet"))
    config = {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "bench.parquet")}},
        "test_split": "test",
    }
    for name, place in (("nanovlm-full", 3), ("lingudistill", 4)):
        lines = [
            ocrbench_sample(i, d[1], d[2], d[place], d[place] == d[2][0], f"{d[0]}\nBe brief.")
            for i, d in enumerate(DOCUMENTS)
        ]
        write_results(
            tmp_path / "runs" / name,
            {"ocrbench": {"ocrbench_accuracy,none": 0.004}},
            {"ocrbench": lines},
            configs={"ocrbench": config},
        )
    (tmp_path / "words.txt").write_text("peace\ntotal\n")
    return tmp_path


def compare(results, *words):
    folders = [str(results / "runs" / name) for name in ("nanovlm-full", "lingudistill")]
    options = ["--out", str(results / "report"), "--words", str(results / "words.txt")]
    done = CliRunner().invoke(app, ["compare", *folders, *options, *words])
    assert done.exit_code == 0, done.output
    return (results / "report" / "failures.html").read_text()


def page_data(text):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])


def test_modes_by_the_answers_to_other_questions(results):
    data = page_data(compare(results, "--no-read-pictures"))
    found = {(e["doc_id"], e["outcome"]): e["mode"] for e in data["examples"]}
    assert found == {
        (0, "lost"): "elsewhere",
        (2, "lost"): "shortened",
        (3, "lost"): "corrected",
        (4, "won"): "elsewhere",
    }
    report = (results / "report" / "report.md").read_text()
    assert "| lingudistill | OCRBench | lost | 1 | 1 | 1 | 0 | 0 | 3 |" in report
    assert "| lingudistill | OCRBench | won | 0 | 1 | 0 | 0 | 0 | 1 |" in report


def test_the_page_needs_nothing_else(results):
    text = compare(results, "--no-read-pictures")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    assert not re.search(r"@import|url\(", text)
    data = page_data(text)
    assert all(
        uri.startswith("data:image/jpeg;base64,") for p in data["pictures"].values() for uri in p
    )
    assert set(data["pictures"]) == {"ocrbench/0", "ocrbench/2", "ocrbench/3", "ocrbench/4"}
    assert "</b>" not in text.split('type="application/json">')[1].split("</script>")[0]


def test_few_examples_are_said_to_be_few(results):
    data = page_data(compare(results, "--no-read-pictures", "--examples", "1"))
    assert "all 4 samples" in data["lead"]


def test_without_data_the_page_says_so(results):
    (results / "bench.parquet").unlink()
    data = page_data(compare(results, "--no-read-pictures"))
    assert "is not on this machine" in data["bare"]["OCRBench"]
    assert {e["doc_id"]: e["mode"] for e in data["examples"]}[0] == "undecided"
    report = (results / "report" / "report.md").read_text()
    assert "OCRBench: pictures and their text are missing: data set parquet" in report


def test_shuffled_data_are_not_taken_for_the_evaluated(results):
    """A document whose text is not in the prompt belongs to another sample."""
    task = read_variants([str(results / "runs" / "lingudistill")])[0].tasks["ocrbench"]
    samples, data = task.samples(), load_task_data(task)
    assert data.document(samples[0])["question"] == DOCUMENTS[0][0]
    data.documents = data.documents.select([1, 0, 2, 3, 4])
    assert data.document(samples[0]) is None
    assert data.pictures(samples[0]) == []
    assert data.document(samples[2]) is not None


def test_text_columns_of_the_data(tmp_path):
    ocr = json.dumps({"PAGE": [], "LINE": [{"Text": "Total 9.50", "Geometry": {"x": 1}}]})
    lines = [
        {"question": "How much?", "ocr": ocr},
        {"question": "Who is it?", "words": ["Ann", "Lee"]},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kwargs = {"data_files": {"test": str(tmp_path / "d.jsonl")}, "cache_dir": str(tmp_path / "c")}
    config = {"dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
    questions = [
        sample(0, "9", "9.50", "How much?", anls=0.0),
        sample(1, "Lee", "Ann", "Who is it?", anls=0.0),
    ]
    write_results(
        tmp_path / "v",
        {"infovqa_val": {"anls,none": 0.0}},
        {"infovqa_val": questions},
        configs={"infovqa_val": config},
    )
    task = read_variants([str(tmp_path / "v")])[0].tasks["infovqa_val"]
    data, samples = load_task_data(task, read=False), task.samples()
    first, second = (data.text(samples[i], samples) for i in (0, 1))
    assert (first.texts, first.whole) == (("Total 9.50",), True)
    assert second.holds("ann lee")


def named_results(tmp_path, config):
    answers = [sample(i, "5", str(i), f"How many in {i}?", exact_match=0.0) for i in range(3)]
    scores = {"own": {"exact_match,none": 0.0}}
    write_results(tmp_path / "v", scores, {"own": answers}, configs={"own": config})
    task = read_variants([str(tmp_path / "v")])[0].tasks["own"]
    return load_task_data(task, read=False), task.samples()


def test_pictures_are_found_by_file_and_in_the_text(tmp_path):
    picture = receipt(["Total 9.50"])
    (tmp_path / "one.png").write_bytes(picture)
    given = ["one.png", f"data:image/png;base64,{base64.b64encode(picture).decode()}", "gone.png"]
    lines = [{"question": f"How many in {i}?", "image": name} for i, name in enumerate(given)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kwargs = {"data_files": {"test": str(tmp_path / "d.jsonl")}, "cache_dir": str(tmp_path / "c")}
    config = {"dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
    data, samples = named_results(tmp_path, config)
    assert [data.pictures(samples[i]) for i in range(3)] == [[picture], [picture], []]


def test_a_saved_data_set_whose_pictures_are_files(tmp_path):
    from datasets import Dataset, DatasetDict, Features, Sequence, Value
    from datasets import Image as Picture

    picture = receipt(["Total 9.50"])
    (tmp_path / "one.png").write_bytes(picture)
    columns = {
        "question": [f"How many in {i}?" for i in range(3)],
        "image_id": [["a", "b"], ["c"], []],  # no text, but it is what tells pictures apart
        "image": [{"bytes": None, "path": str(tmp_path / "one.png")}] * 3,
    }
    kinds = {"question": Value("string"), "image_id": Sequence(Value("string"))}
    made = Dataset.from_dict(columns, features=Features({**kinds, "image": Picture(decode=False)}))
    DatasetDict(test=made).save_to_disk(str(tmp_path / "saved"))
    kwargs = {"load_from_disk": True}
    config = {"dataset_path": str(tmp_path / "saved"), "dataset_kwargs": kwargs}
    data, samples = named_results(tmp_path, config | {"test_split": "test"})
    assert [data.pictures(samples[i]) for i in range(3)] == [[picture]] * 3
    assert not data.text(samples[0], samples).texts


def test_pictures_that_are_none():
    assert inline_picture(b"not a picture") is None


@pytest.mark.skipif(not shutil.which("tesseract"), reason="needs the tesseract program")
def test_tesseract_reads_the_picture(results):
    assert "14.20" in read_text(receipt(["Sub total 13.40", "Total RM 14.20"]))
    data = page_data(compare(results))
    reason = next(e["reason"] for e in data["examples"] if e["doc_id"] == 0)
    assert reason == "it stands in the picture's text (as tesseract reads it)"


def dump(path, profile, fragment=""):
    """The document after its script ran, as Chromium sees it."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, path.as_uri() + fragment], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian package of that name)")
def test_filters_in_a_browser(results, tmp_path):
    compare(results, "--no-read-pictures")
    path = results / "report" / "failures.html"
    every = dump(path, tmp_path / "profile")
    assert 'data-shown="4"' in every
    assert every.count("<article") == 4
    assert every.count("<img") == 4
    assert "What is the price of &lt;b&gt;tea&lt;/b&gt;?" in every  # text stays text
    some = dump(path, tmp_path / "profile", "#mode=elsewhere&outcome=lost")
    assert 'data-shown="1"' in some
    card = re.search(r"<article.*?</article>", some, re.S)[0]
    shown = html.unescape(re.sub("<[^>]+>", "\n", card))
    for text in ("Right text from the wrong spot", "14.20", "13.40", "What is the total amount?"):
        assert text in shown
    none = dump(path, tmp_path / "profile", "#mode=other")
    assert 'data-shown="0"' in none
    assert "No sample fits these filters." in none
