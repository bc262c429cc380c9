"""`ldistill models`: every family holds its contracts, by the check that users run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.distill.distiller import Distiller
from ldistill.distill.teacher import Teacher
from ldistill.models.pair import load_pair
from ldistill.models.zoo import FAMILIES, write_pair
from ldistill.tools import models as check
from ldistill.tools.models import families_table, refused_table

DOCS = Path(__file__).parents[3] / "docs" / "models.md"


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["models", *arguments])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_holds_its_contracts(family, tmp_path):
    write_pair(family, tmp_path)
    verdicts = list(check.check_folders(tmp_path / "student", tmp_path / "teacher"))
    assert [verdict for verdict in verdicts if verdict[1]] == []
    assert len(verdicts) >= 6


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_other_weights_and_a_leak_do_not_pass(family, tmp_path, monkeypatch):
    """The check can fail: an LM that moved a little, and documents that see one another."""
    write_pair(family, tmp_path)
    pair = load_pair(str(tmp_path / "student"), str(tmp_path / "teacher"))
    documents = check._documents(pair)
    batch = check._packed(pair, [documents[:2], documents[2:]])
    made = Distiller(pair.student.eval(), Teacher(pair.lm, "reference"), check._WEIGHTS)
    assert "differ by" in check._identity(made, batch)
    alone = [check._packed(pair, [[d]]) for d in documents]
    assert check._packing(made, batch, alone) == ""
    joined = dict(batch, position_ids=torch.arange(batch["input_ids"].shape[1]).expand(2, -1))
    assert "packed and alone, differ" in check._packing(made, joined, alone)


def test_the_command_says_what_holds_and_exits_with_it(monkeypatch):
    result = invoke("--check", "llava", "smolvlm")
    assert result.exit_code == 0
    assert "2 of 2 hold" in result.output
    monkeypatch.setattr(check, "TOLERANCE", 0.0)
    result = invoke("--check", "llava")
    assert result.exit_code == 1
    assert re.search(r"llava +fails.*\n +identity, full: logits .* differ by", result.output)
    assert "0 of 1 hold; not llava" in result.output


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3", "internvl", "kimi"])
def test_a_pair_of_ones_own_whole_and_reduced(family, tmp_path):
    write_pair(family, tmp_path)
    pair = ("--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"))
    for options in (pair, (*pair, "--reduced")):
        result = invoke("--check", *options)
        assert result.exit_code == 0, result.output
        assert "1 of 1 hold" in result.output


def test_a_students_own_decoder_is_exported_as_its_lm(tmp_path):
    """No LM of Gemma 3's sizes is published: of a bare student the decoder alone is written."""
    student, out = write_pair("gemma3", tmp_path / "pair"), tmp_path / "out"
    command = ["export", str(student), "--decoder-only", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert [path.name for path in out.iterdir()] == ["decoder"]
    pair = load_pair(str(student), str(out / "decoder"))
    batch = check._packed(pair, [check._documents(pair)])
    made = Distiller(pair.student.eval(), Teacher(pair.lm, "reference"), check._WEIGHTS)
    assert check._identity(made, batch) == ""
    command[1] = str(tmp_path / "nowhere")
    assert "does not exist" in str(CliRunner().invoke(app, command).exception)


def test_a_pair_that_does_not_fit_is_refused_with_its_reason(tmp_path):
    write_pair("llava", tmp_path / "a")
    write_pair("internvl", tmp_path / "b")
    student, teacher = tmp_path / "a" / "student", tmp_path / "b" / "teacher"
    result = invoke("--check", "--student", str(student), "--teacher", str(teacher))
    assert result.exit_code == 1
    assert "do not fit" in result.output
    result = invoke("--student", str(student))
    assert isinstance(result.exception, ValueError)
    result = invoke("--check", "lava")
    assert "Did you mean" in str(result.exception)


def test_the_documented_table_is_the_programs():
    text = DOCS.read_text(encoding="utf-8")
    for table in (families_table(FAMILIES), refused_table()):
        assert table.markdown() in text, "docs/models.md: run `ldistill models --markdown`"


def test_a_prompt_read_both_ways_has_no_scope_visual(tmp_path):
    write_pair("paligemma2", tmp_path)
    where = (str(tmp_path / "student"), str(tmp_path / "teacher"))
    pair = load_pair(*where, max_length=256)
    with pytest.raises(ValueError, match="reads its prompt both ways"):
        Distiller(pair.student, Teacher(pair.lm), check._WEIGHTS, kv_scope="visual")
    with pytest.raises(ValueError, match="--max_length 512 or less"):
        load_pair(*where, max_length=1024)
