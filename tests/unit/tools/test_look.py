"""`ldistill look` shows what training compares, and what the models say by themselves."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from helpers_data import picture
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.common.samples import Turn
from ldistill.data.collate import Collate, LoadedDocument, LoadedPack
from ldistill.distill.distiller import Distiller
from ldistill.distill.objective import COLUMNS
from ldistill.distill.teacher import Teacher
from ldistill.models.pair import load_pair
from ldistill.sources import SourceWeights
from ldistill.tools.look import look

ASKED = "what is the total?", "the fox jumps over 12"


def loaded(root, **more):
    return load_pair(str(root / "student"), str(root / "teacher"), **more)


def plain_logits(student, processor, image):
    """[n, vocabulary] of a plain forward over question and answer, and the ids."""
    seen = processor.load_image(image)
    document, tiles = processor.encode([Turn(*ASKED)], [seen.size]), processor.pictures([seen])
    ids = torch.as_tensor(document.input_ids, dtype=torch.long)
    with torch.no_grad():
        return student.lm_head(student(ids[None], pictures=tiles))[0], document, tiles


def test_equal_weights_say_the_same_and_the_student_says_what_it_says_alone(same_pair_root):
    pair = loaded(same_pair_root)
    logits, document, _ = plain_logits(pair.student.eval(), pair.processor, picture())
    seen = look(pair, *ASKED, [picture()])
    assert max(token.kl for token in seen.tokens) < 1e-6
    answer = torch.as_tensor(document.labels)
    label = answer[answer >= 0].long()[:, None]
    for vocabulary, found in (
        (logits.shape[1], [t.p_student for t in seen.tokens]),
        (pair.lm.config.vocab_size, [t.p_teacher for t in seen.tokens]),  # it knows no image tokens
    ):
        expected = logits[answer >= 0, :vocabulary].softmax(-1).gather(1, label)[:, 0]
        assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert "".join(t.text for t in seen.tokens).startswith(ASKED[1])


def test_the_kl_is_the_one_that_training_lowers(pair_root):
    pair = loaded(pair_root)
    seen = look(pair, *ASKED, [picture()], temperature=3.0)
    _, document, tiles = plain_logits(pair.student.eval(), pair.processor, picture())
    pack = LoadedPack([LoadedDocument(0, 0, document, tiles)])
    batch = Collate(pair.processor.pad_token_id)([pack])
    weights = SourceWeights(("vqav2",), ("language",), (0.7,), (3.0,))
    distiller = Distiller(pair.student, Teacher(pair.lm), weights)
    sums = distiller(batch, distiller.supervise(batch), 1.0, True)["metrics"][0]
    assert seen.kl == pytest.approx(float(sums[COLUMNS.index("kl")]) / len(seen.tokens), rel=1e-5)
    assert seen.kl > 0.01
    assert len(seen.tokens) == int(sums[COLUMNS.index("kd_rows")])


def test_the_blind_lm_is_the_lm_as_transformers_runs_it_without_the_picture(pair_root):
    pair = loaded(pair_root)
    seen = look(pair, *ASKED, [picture()], top=1)
    document = plain_logits(pair.student, pair.processor, picture())[1]
    ids = torch.as_tensor(document.input_ids, dtype=torch.long)
    labels = torch.as_tensor(document.labels)[ids < pair.lm.config.vocab_size]
    lm = AutoModelForCausalLM.from_pretrained(pair_root / "teacher").eval()
    with torch.no_grad():
        logits = lm(ids[ids < lm.config.vocab_size][None]).logits[0][labels >= 0]
    best = logits.softmax(-1).max(-1)
    assert [t.blind[0][1] for t in seen.tokens] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_refusals(pair_root):
    with pytest.raises(ValueError, match="load_pair a teacher"):
        look(load_pair(str(pair_root / "student"), None), *ASKED)
    with pytest.raises(ValueError, match="2 pictures"):
        look(loaded(pair_root), *ASKED, [picture(), picture()])


@pytest.mark.parametrize("of_run", [True, False])
def test_the_page_opens_from_the_disk_and_shows_every_token(pair_root, tmp_path, of_run):
    run = tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(pair_root / "student")
    student = ["--student", str(run)]
    if of_run:  # which knows its teacher
        (run / "recipe.yaml").write_text(yaml.safe_dump({"teacher": str(pair_root / "teacher")}))
    (tmp_path / "p.png").write_bytes(picture())
    command = ["look", *student, "--prompt", "<script>what?", "--answer", "the fox & 12"]
    command += ["--image", str(tmp_path / "p.png"), "--out", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, command)
    if not of_run:
        assert "--teacher" in str(done.exception)
        return
    assert done.exit_code == 0, done.exception
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;what?" in page
    assert "http" not in page  # it fetches nothing
    assert page.count("<tr>") - 1 == done.output.count("teacher: ") == page.count("title=")
    assert re.search(r"mean KL \d+\.\d+ nats", done.output)
