"""Tables and shares recovered, with answers worked out by hand."""

from __future__ import annotations

import csv
import io
import statistics

import numpy as np
import pytest
from PIL import Image

from ldistill.evaluation.compare.tables import (
    Cell,
    order,
    plot_recovery,
    recovery,
    recovery_markdown,
    score_table,
    share,
)
from ldistill.evaluation.suites import suite

ROWS = {row.id: row for row in suite("paper").rows}
ARC, HELLA, DOC = ROWS["arc_easy"], ROWS["hellaswag"], ROWS["docvqa_val"]
MME = ROWS["mme:mme_perception_score"]
SCORES = {
    "lingudistill": {"arc_easy": 0.621, "hellaswag": 0.394, "docvqa_val": 0.740, MME.id: 1173},
    "nanovlm-full": {"arc_easy": 0.540, "hellaswag": 0.326, "docvqa_val": 0.767, MME.id: 1027},
    "distill-full": {"arc_easy": 0.548, "docvqa_val": 0.640, MME.id: 1046},
    "nanovlm": {"arc_easy": 0.605, "hellaswag": 0.405, "docvqa_val": 0.769, MME.id: 1259},
}
CHOSEN = (ARC, HELLA, DOC, MME)


@pytest.fixture
def table():
    notes = {("lingudistill", "docvqa_val"): "On 10 of the task's 20 samples."}
    return score_table(SCORES, CHOSEN, baseline="nanovlm-full", original="nanovlm", notes=notes)


def test_markdown(table):
    lines = table.markdown().splitlines()
    head = "| Task | nanovlm (original) | nanovlm-full (baseline) | distill-full | lingudistill |"
    assert lines[0] == head
    assert "| **Language and knowledge-heavy** |  |  |  |  |" in lines
    assert "| ARC Easy | 0.605 (+0.065) | 0.540 | 0.548 (+0.008) | **0.621** (+0.081) |" in lines
    hella = "| HellaSwag | 0.405 (+0.079) | 0.326 | missing <sup>1</sup> | **0.394** (+0.068) |"
    assert hella in lines
    # The original does not take the bold of a row, whose best is the baseline here.
    doc = "| DocVQA | 0.769 (+0.002) | **0.767** | 0.640 (-0.127) | 0.740 (-0.027) <sup>2</sup> |"
    assert doc in lines
    assert "| MME Perception | 1259 (+232) | 1027 | 1046 (+19) | **1173** (+146) |" in lines
    assert lines[-2:] == [
        "1. No result for this task and variant.",
        "2. On 10 of the task's 20 samples.",
    ]
    assert all(line.count("|") == 6 for line in lines if line.startswith("|"))


def test_csv(table):
    records = list(csv.DictReader(io.StringIO(table.csv())))
    assert [r["task"] for r in records] == ["ARC Easy", "HellaSwag", "DocVQA", "MME Perception"]
    assert records[0]["lingudistill"] == "0.621"
    assert records[1]["distill-full"] == "missing"
    assert "distill-full: No result" in records[1]["notes"]


def test_latex(table):
    text = table.latex()
    assert r"\multicolumn{2}{c}{Fine-tuning} & \multicolumn{1}{c}{Uniform KD}" in text
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-4}\cmidrule(lr){5-5}" in text
    easy = r"ARC Easy & 0.605 {\scriptsize($+0.065$)} & 0.540 & 0.548 {\scriptsize($+0.008$)}"
    assert easy in text
    assert r"\textbf{0.621}" in text
    assert r"missing\textsuperscript{1}" in text
    assert text.count(r"\begin") == text.count(r"\end") == 2
    body = [
        line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line
    ]
    assert {line.count("&") for line in body} == {4}


def test_names_are_escaped():
    text = score_table({"a_b%|c": {"arc_easy": 0.5}}, [ARC])
    assert r"a\_b\%|c" in text.latex()
    assert r"a_b%\|c" in text.markdown()


def test_seeds():
    table = score_table(
        {"a": {"arc_easy": [0.5, 0.6, 0.7]}, "b": {"arc_easy": [0.4]}}, [ARC], baseline="b"
    )
    assert table.cell("a", ARC) == Cell(pytest.approx(0.6), pytest.approx(0.1), 3)
    assert "| ARC Easy | **0.600 ± 0.100** (+0.200) | 0.400 |" in table.markdown()
    assert r"$\pm$0.100" in table.latex()
    record = next(csv.DictReader(io.StringIO(table.csv())))
    assert float(record["a std"]) == pytest.approx(statistics.stdev([0.5, 0.6, 0.7]))


def test_ties_are_all_bold():
    table = score_table({"a": {"arc_easy": 0.50004}, "b": {"arc_easy": 0.5}}, [ARC])
    assert table.best(ARC) == {"a", "b"}


def test_order_is_the_papers():
    assert order(["x", "lingudistill", "distill-full", "ce", "nanovlm-full"], "ce") == (
        "ce",
        "nanovlm-full",
        "distill-full",
        "lingudistill",
        "x",
    )


def test_shares_by_hand(table):
    found = recovery(table)
    assert set(found) == {"lingudistill", "distill-full"}
    # (.621 - .540 + .394 - .326) / (.605 - .540 + .405 - .326)
    assert found["lingudistill"]["language"].value == pytest.approx(0.149 / 0.144)
    assert found["lingudistill"]["language"].lost == pytest.approx(0.072)
    # HellaSwag is missing: ARC Easy alone, and said so.
    alone = found["distill-full"]["language"]
    assert alone.value == pytest.approx(0.008 / 0.065)
    assert alone.left_out == ("HellaSwag",)
    # DocVQA lost .002 of 1: nothing to recover.
    assert found["lingudistill"]["document"].text == "nothing lost"
    assert found["lingudistill"]["general"].value == pytest.approx(146 / 232)
    text = recovery_markdown(table)
    assert "| **Language and knowledge-heavy** | **12%** | **103%** |" in text
    assert "- distill-full, Language and knowledge-heavy: without HellaSwag (missing)." in text


def test_scales_weigh_alike():
    """MME's points must not drown accuracies: each score counts on its row's own scale."""
    other = ROWS["realworldqa"]
    scores = {
        "o": {MME.id: 1200, "realworldqa": 0.5},
        "b": {MME.id: 1000, "realworldqa": 0.4},
        "v": {MME.id: 1200, "realworldqa": 0.4},
    }
    table = score_table(scores, [MME, other], baseline="b", original="o")
    assert share(table, "v", [MME, other]).value == pytest.approx(0.5)


def test_picture(table, tmp_path):
    assert plot_recovery(table, tmp_path / "recovery.png")
    assert (tmp_path / "recovery.png").read_bytes().startswith(b"\x89PNG")
    nothing = score_table({"o": {}, "b": {}, "v": {}}, CHOSEN, baseline="b", original="o")
    assert not plot_recovery(nothing, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_wide_title_is_not_cut(tmp_path):
    """One panel, and names of a length that runs have: the picture is as wide as its title."""
    base, original = "nanovlm-full-cauldron-seed-1", "smollm2-460m-before-training"
    scores = {original: {"arc_easy": 0.9}, base: {"arc_easy": 0.5}, "x": {"arc_easy": 0.7}}
    table = score_table(scores, [ARC], baseline=base, original=original)
    assert plot_recovery(table, tmp_path / "recovery.png")
    with Image.open(tmp_path / "recovery.png") as picture:
        dark = np.asarray(picture.convert("L")) < 128
    title = dark[: dark.shape[0] // 8]
    assert title.any()
    assert not title[:, -8:].any()
