"""The `ldistill` command: export, decoder-only export, generate, recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers_data import picture
from runs import environment
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.models.formats import load_processor, load_student
from ldistill.training.export import export_decoder

runner = CliRunner()


@pytest.fixture
def run_folder(pair_root, tmp_path):
    """A run folder with a checkpoint and no result yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("student: some/vlm\n")
    for step, name in ((2, "old"), (10, "new")):
        shutil.copytree(pair_root / "student", folder / f"checkpoint-{step}" / "student")
        (folder / f"checkpoint-{step}" / "data.json").write_text(name)
    path = folder / "checkpoint-10" / "student" / "config.json"
    path.write_text(path.read_text().replace('"hf_repo_name": "nanoVLM"', '"hf_repo_name": "ten"'))
    return folder


def test_export_takes_the_newest_checkpoint(run_folder, tmp_path):
    result = runner.invoke(app, ["export", str(run_folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "checkpoint-10" in result.output
    assert '"ten"' in (tmp_path / "out" / "config.json").read_text()
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "README.md"}
    assert "| steps | 10 |" in (tmp_path / "out" / "README.md").read_text()


def test_decoder_only_loads_in_transformers(run_folder, tmp_path):
    out = tmp_path / "out"
    command = ["export", str(run_folder), "--out", str(out)]
    for _ in range(2):  # again, over what it wrote
        result = runner.invoke(app, [*command, "--decoder-only"])
        assert result.exit_code == 0, result.output
    stale = runner.invoke(app, command)
    assert "other files (decoder)" in str(stale.exception)
    lm = AutoModelForCausalLM.from_pretrained(out / "decoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "decoder")
    student = load_student(out).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the fox?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nthe fox?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = student.lm_head(student(ids))
        torch.testing.assert_close(lm(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert lm.config.eos_token_id == tokenizer.eos_token_id == 2
    weights = load_file(out / "model.safetensors")
    assert torch.equal(lm.lm_head.weight, weights["decoder.head.weight"])


def test_a_decoder_keeps_the_type_of_the_checkpoint(pair_root, tmp_path):
    shutil.copytree(pair_root / "student", tmp_path / "half")
    path = tmp_path / "half" / "model.safetensors"
    stored = {key: tensor.bfloat16() for key, tensor in load_file(path).items()}
    stored["decoder.rotary_embd.inv_freq"] = stored["decoder.rotary_embd.inv_freq"].float()
    save_file(stored, path, metadata={"format": "pt"})
    export_decoder(tmp_path / "half", tmp_path / "decoder")
    weights = load_file(tmp_path / "decoder" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["model.embed_tokens.weight"], stored["decoder.head.weight"])
    assert json.loads((tmp_path / "decoder" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_of_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "ldistill.cli", "export", str(tmp_path / "empty")]
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert result.returncode == 2
    assert "no trained student" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_generate_answers_about_pictures_and_text(pair_root, tmp_path):
    image = tmp_path / "picture.png"
    image.write_bytes(picture())
    student = str(pair_root / "student")
    base = ["generate", "--student", student, "--max-new-tokens", "5"]
    asked = ["--prompt", "what is this?", "--image", str(image)]
    first = runner.invoke(app, [*base, *asked])
    assert first.exit_code == 0, first.output
    assert runner.invoke(app, [*base, *asked]).output == first.output
    assert runner.invoke(app, [*base, "--prompt", "what is this?"]).exit_code == 0
    model, processor = load_student(student).eval(), load_processor(student)
    seen = processor.load_image(image.read_bytes())
    ids = torch.as_tensor(processor.prompt([], "what is this?", [seen.size]), dtype=torch.long)[
        None
    ]
    new = []
    with torch.no_grad():  # without a cache, token by token
        for _ in range(5):
            logits = model.lm_head(model(ids, pictures=processor.pictures([seen]))[:, -1])
            new.append(int(logits.argmax()))
            if new[-1] == processor.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert first.output.strip() == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_generate_refuses_what_is_no_picture(pair_root, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    arguments = ["generate", "--student", str(pair_root / "student"), "--prompt", "x", "--image"]
    for path, message in ((tmp_path / "text.png", "undecodable"), (tmp_path / "no.png", "exist")):
        result = runner.invoke(app, [*arguments, str(path)])
        assert result.exit_code != 0
        assert message in result.output + str(result.exception)


def test_recipes_are_listed():
    result = runner.invoke(app, ["recipes"])
    assert result.exit_code == 0
    for name in ("lingudistill ", "nanovlm-full", "distill-lang", "tiny"):
        assert name in result.output


def test_bench_kernels_starts_the_benchmarks():
    command = [sys.executable, "-m", "ldistill.cli", "bench", "kernels"]
    result = subprocess.run(
        [*command, "loss", "--", "--help"], capture_output=True, text=True, env=environment()
    )
    assert result.returncode == 0, result.stderr
    assert "--csv" in result.stdout
    result = subprocess.run(
        [*command, "nothing"], capture_output=True, text=True, env=environment()
    )
    assert result.returncode == 2
    assert "'nothing' is not one of" in result.stderr


def test_command_answers_at_once():
    """`ldistill --help` must not import torch."""
    code = "import sys, ldistill.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr
