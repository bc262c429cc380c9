"""`ldistill merge` against the formula on the checkpoints' own tensors, for every family."""

from __future__ import annotations

import shutil

import pytest
import torch
from hf_pairs import write_llava, write_smolvlm
from pairs import VOCAB, write_pair
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.models.formats import load_student

LAYERS = 3  # of the nanoVLM pair
FAMILIES = {"nanovlm": write_pair, "llava": write_llava, "smolvlm": write_smolvlm}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for name, write in FAMILIES.items():
        (root / name).mkdir()
        write(root / name)
    return root


def merge(root, out, *words):
    command = ["merge", "--student", str(root / "student"), "--lm", str(root / "teacher")]
    done = CliRunner().invoke(app, [*command, "--out", str(out), *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return out


def decoder(folder) -> dict[str, torch.Tensor]:
    """A student's decoder by the names that its LM has."""
    return dict(load_student(folder).causal_lm().state_dict())


def lm(root) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.float32)
    return model.state_dict()


def rest(folder) -> dict[str, torch.Tensor]:
    """Everything of a student that is not its decoder."""
    student = load_student(folder)
    own = {id(p) for p in student.causal_lm().parameters()}
    return {name: p for name, p in student.named_parameters() if id(p) not in own}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_0_is_the_student_byte_for_byte(roots, family, tmp_path):
    root = roots / family
    out = merge(root, tmp_path / "out", "--weight", "0")
    files = {path.name: path.read_bytes() for path in (root / "student").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_1_puts_the_lms_decoder_in(roots, family, tmp_path):
    """Bit for bit; what the student added to the vocabulary, and all that sees, stay its own."""
    root = roots / family
    out = merge(root, tmp_path / "out", "--weight", "1")
    merged, student, theirs = decoder(out), decoder(root / "student"), lm(root)
    assert merged.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(merged[name][: len(tensor)], tensor), name
        assert torch.equal(merged[name][len(tensor) :], student[name][len(tensor) :]), name
    assert len(merged["lm_head.weight"]) > VOCAB
    assert same(rest(out), rest(root / "student"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_averages(roots, family, tmp_path):
    root = roots / family
    merged = decoder(merge(root, tmp_path / "out", "--weight", "0.3"))
    student, theirs = decoder(root / "student"), lm(root)
    for name, tensor in theirs.items():
        own = student[name][: len(tensor)]
        torch.testing.assert_close(merged[name][: len(tensor)], 0.7 * own + 0.3 * tensor)
        assert torch.equal(merged[name][len(tensor) :], student[name][len(tensor) :])


def test_the_result_has_the_students_type(roots, tmp_path):
    root = tmp_path / "pair"
    shutil.copytree(roots / "nanovlm", root)
    path = root / "student" / "model.safetensors"
    tensors = {name: t.bfloat16() for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    out = merge(root, tmp_path / "out", "--weight", "1")
    stored = load_file(out / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    expected = lm(root)["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(stored["decoder.blocks.1.mlp.up_proj.weight"], expected)


def layer_weights(root, out) -> list[float]:
    """How far each layer went from the student to the LM."""
    merged, student, theirs = decoder(out), decoder(root / "student"), lm(root)
    found = []
    for i in range(LAYERS):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        step = (merged[name] - student[name]) / (theirs[name] - student[name])
        found.append(step.median().item())
    return found


def test_a_weight_may_grow_with_depth_and_spare_layers(roots, tmp_path):
    root = roots / "nanovlm"
    out = merge(root, tmp_path / "deep", "--weight", "0.2:1")
    assert layer_weights(root, out) == pytest.approx([0.2, 0.6, 1.0], abs=1e-4)
    student, theirs = decoder(root / "student"), lm(root)
    assert torch.equal(decoder(out)["model.norm.weight"], theirs["model.norm.weight"])
    table = decoder(out)["lm_head.weight"][:VOCAB]  # tied: with the first layer
    own = student["lm_head.weight"][:VOCAB]
    torch.testing.assert_close(table, 0.8 * own + 0.2 * theirs["lm_head.weight"])
    out = merge(root, tmp_path / "some", "--weight", "0.5", "--layers", "0,2-2")
    assert layer_weights(root, out) == pytest.approx([0.5, 0, 0.5], abs=1e-4)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(decoder(out)[name], student[name])


def test_a_sweep_is_each_weight_alone(roots, tmp_path):
    root = roots / "nanovlm"
    out = merge(root, tmp_path / "sweep", "--weights", "0.1,0.4:0.6")
    assert {path.name for path in out.iterdir()} == {"0.1", "0.4-0.6"}
    alone = merge(root, tmp_path / "alone", "--weight", "0.4:0.6")
    one, other = ((f / "model.safetensors").read_bytes() for f in (out / "0.4-0.6", alone))
    assert one == other


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_that_was_exported_keeps_no_image_token(roots, family, tmp_path):
    """An LM with a student's whole vocabulary: image tokens stay the student's all the same."""
    root = tmp_path / "pair"
    shutil.copytree(roots / family / "student", root / "student")
    student = load_student(root / "student")
    plain = student.causal_lm()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    plain.lm_head.__class__ = torch.nn.Linear
    plain.save_pretrained(root / "teacher")
    merged = decoder(merge(root, tmp_path / "out", "--weight", "1"))
    before, theirs = decoder(root / "student"), lm(root)
    token, name = student.image_token_id, "model.embed_tokens.weight"
    assert torch.equal(merged[name][token], before[name][token])
    assert torch.equal(merged[name][:VOCAB], theirs[name][:VOCAB])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "either --weight"),
        (("--weight", "1", "--weights", "0,1"), "either --weight"),
        (("--weight", "1.5"), r"0 to 1.*got '1\.5'"),
        (("--weights", "0.1,a"), "got 'a'"),
        (("--weight", "0.1:0.2:0.3"), "got '0.1:0.2:0.3'"),
        (("--weight", "1", "--layers", "2-3"), "from 0 to 2"),
        (("--weight", "1", "--layers", "x"), "got 'x'"),
    ],
)
def test_what_cannot_be_asked(roots, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        merge(roots / "nanovlm", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_one_sentence(roots, tmp_path):
    root = tmp_path / "pair"
    shutil.copytree(roots / "nanovlm", root)
    model = AutoModelForCausalLM.from_pretrained(root / "teacher")
    narrow = type(model.config)(**(model.config.to_dict() | {"num_attention_heads": 3}))
    type(model)(narrow).save_pretrained(root / "teacher")
    with pytest.raises(ValueError, match=r"num_attention_heads: student 6, LM 3.*") as error:
        merge(root, tmp_path / "out", "--weight", "0.5")
    assert "\n" not in str(error.value)
    untied = type(model.config)(**(model.config.to_dict() | {"tie_word_embeddings": False}))
    type(model)(untied).save_pretrained(root / "teacher")
    with pytest.raises(ValueError, match="the LM has a head of its own"):
        merge(root, tmp_path / "out", "--weight", "0.5")
    larger = type(model.config)(**(model.config.to_dict() | {"vocab_size": 999}))
    type(model)(larger).save_pretrained(root / "teacher")
    with pytest.raises(ValueError, match=r"embed_tokens.weight: student \[386, 48\], LM \[999"):
        merge(root, tmp_path / "out", "--weight", "0.5")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        merge(roots / "nanovlm", tmp_path / "out", "--weight", "0.5")
