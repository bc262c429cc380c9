"""What a user sees when something is wrong: a sentence, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from pairs import write_pair
from runs import launch, write_recipe, write_shards
from upload_hub import UploadHub

from ldistill.checkpoint.folder import begin, publish, seal
from ldistill.recipe import parse
from ldistill.train import main
from ldistill.training.run import open_data


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write_pair(root / "pair")
    write_shards(root / "shards", root / "pair", count=12)
    write_recipe(root / "recipe.yaml", root / "pair", root / "shards")
    return root


def fails(capsys, world, *args: str, out: Path | None = None) -> str:
    """Message of a command line that must fail before the first step."""
    folder = out or world / "never"
    argv = ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(folder), *args]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert "error: " in message
    assert "Traceback" not in message
    assert not list(folder.glob("checkpoint-*"))
    if out is None:
        assert not folder.exists(), "the corrected command may take the same folder"
    return message


def test_no_shards(capsys, world, tmp_path):
    assert "shards" in fails(capsys, world, "--shards", str(tmp_path / "none"))


def test_unknown_source(capsys, world):
    assert "Did you mean 'docvqa'" in fails(capsys, world, "--sources", "docvqua")


def test_source_without_shards(capsys, world):
    assert "textvqa" in fails(capsys, world, "--sources", "docvqa,textvqa")


def test_shards_of_own_sources_alone(capsys, world):
    """The recipe asks for the paper's 17: one remedy, before anything is loaded; and it works."""
    message = fails(capsys, world, "--sources", "full", "--student", "no/where")
    assert "it has docvqa, vqav2. Train on what is there with --sources all" in message
    recipe = parse(["--recipe", str(world / "recipe.yaml"), "--sources", "all"])
    assert open_data(recipe).index.sources == ["docvqa", "vqav2"]


def test_data_seed_alone_decides_the_order(world):
    def order(*flags: str) -> list[list[int]]:
        recipe = parse(["--recipe", str(world / "recipe.yaml"), *flags])
        return [pack.tolist() for pack in open_data(recipe).order.epoch(0)]

    assert order("--data_seed", "7") == order() == order("--data_seed", "7", "--seed", "8")
    assert order("--data_seed", "8") == order("--seed", "8") != order()


def test_a_crash_in_the_first_step_leaves_the_folder_free(world, tmp_path, monkeypatch):
    """Whatever was written by then, samples and an empty metrics file among it."""
    out = tmp_path / "crashed"
    argv = ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(out)]

    def crash(*args: object) -> None:
        assert (out / "metrics.jsonl").is_file()
        raise RuntimeError("sizes as lists")

    with monkeypatch.context() as patched:
        patched.setattr("ldistill.training.trainer.count_step", crash)
        with pytest.raises(RuntimeError, match="sizes as lists"):
            main([*argv, "--log_samples", "true"])
    assert not out.exists()
    assert main([*argv, "--max_steps", "1"]) == 0


def test_shards_of_another_tokenizer(capsys, world, tmp_path):
    write_pair(tmp_path, mp_pixel_shuffle_factor=1, mp_image_token_length=16)
    args = ("--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"))
    assert "another student" in fails(capsys, world, *args)


def test_limit_below_every_document(capsys, world):
    assert "limit" in fails(capsys, world, "--max_length", "8")


def test_long_document_where_the_recipe_forbids_it(capsys, world):
    assert "longer than" in fails(capsys, world, "--max_length", "40", "--on_long", "error")


def test_pair_that_does_not_fit(capsys, world, tmp_path):
    write_pair(tmp_path, lm_n_blocks=2)
    message = fails(capsys, world, "--teacher", str(tmp_path / "teacher"))
    assert "num_hidden_layers: student 3, teacher 2" in message


def test_truncated_shard(capsys, world, tmp_path):
    shutil.copytree(world / "shards", tmp_path / "shards")
    tar = next((tmp_path / "shards").glob("docvqa/*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    assert tar.name in fails(capsys, world, "--shards", str(tmp_path / "shards"))


def test_corrupt_sample_is_named(capsys, world, tmp_path):
    shutil.copytree(world / "shards", tmp_path / "shards")
    for tar in (tmp_path / "shards").glob("*/*.tar"):
        data = bytearray(tar.read_bytes())
        for place in range(600, len(data), 700):
            data[place] ^= 0xFF
        tar.write_bytes(bytes(data))
    out = tmp_path / "out"
    message = fails(capsys, world, "--shards", str(tmp_path / "shards"), out=out)
    assert ".tar" in message


def test_output_folder_that_holds_a_run(capsys, world, tmp_path):
    out = tmp_path / "taken"
    out.mkdir()
    (out / "recipe.yaml").write_text("alpha: 0.1\n")
    message = fails(capsys, world, out=out)
    assert "already holds a run" in message
    assert (out / "recipe.yaml").read_text() == "alpha: 0.1\n"


def test_resuming_another_recipes_run(capsys, world, tmp_path):
    out = tmp_path / "other"
    folder = begin(out, 2)
    (folder / "data.json").write_text("{}")
    publish(folder, 2, seal(folder), {})
    recipe = yaml.safe_load((world / "recipe.yaml").read_text()) | {"alpha": 0.1}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    args = ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(out)]
    assert main([*args, "--resume_from_checkpoint", "true"]) == 2
    assert "alpha: then 0.1, now 0.7" in capsys.readouterr().err


def test_nothing_to_resume(capsys, world, tmp_path):
    out = tmp_path / "empty"
    message = fails(capsys, world, "--resume_from_checkpoint", "true", out=out)
    assert "nothing to resume" in message


def test_full_disk(capsys, world, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "ldistill.training.run_folder.shutil.disk_usage", lambda path: usage(1, 1, 1000)
    )
    assert "GiB free" in fails(capsys, world)


def test_unknown_flag(capsys, world):
    assert "Did you mean --alpha" in fails(capsys, world, "--alhpa", "1")


def test_deepspeed_config_that_contradicts_the_flags(world, tmp_path):
    config = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero2.json").read_text())
    config["train_micro_batch_size_per_gpu"] = 64
    path = tmp_path / "contradicts.json"
    path.write_text(json.dumps(config))
    result = launch(
        "--recipe", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "out"),
        "--deepspeed", str(path), check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "train_micro_batch_size_per_gpu" in result.stderr
    assert not (tmp_path / "out").exists(), "the corrected command may take the same folder"


def test_help_is_readable(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--alpha" in text
    assert "lingudistill" in text
    assert len(text.splitlines()) < 90


def test_push_to_hub_makes_the_repository_first_and_uploads_at_the_end(
    world, capsys, monkeypatch, tmp_path
):
    """Card and curves included; a token that is missing is found before the first step."""
    flags = ("--push_to_hub", "true", "--hub_model_id", "me/mine", "--hub_private_repo", "true")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "")
    assert "hf auth login" in fails(capsys, world, *flags)
    monkeypatch.setenv("HF_TOKEN", UploadHub.TOKEN)
    with UploadHub() as hub:
        settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        argv = ["--recipe", str(world / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
        assert main([*argv, "--max_steps", "1", "--logging_steps", "1", *flags]) == 0
    assert f"on the hub: {hub.url}/me/mine" in capsys.readouterr().out
    assert hub.private == {"me/mine": True}
    files = hub.repos["me/mine"]
    assert set(files) == {"config.json", "model.safetensors", "README.md", "loss_curves.png"}
    assert files["model.safetensors"] == (tmp_path / "run/student/model.safetensors").read_bytes()
    assert "| vqav2 | language |" in files["README.md"].decode()
    assert [request for request in hub.requests if "/commit/" in request][1:] == []
