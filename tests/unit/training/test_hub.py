"""Model cards, and `ldistill push`: against a hub on loopback that keeps what it is sent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from runs import environment
from typer.testing import CliRunner
from upload_hub import UploadHub

from ldistill.cli import app
from ldistill.common.errors import exit_code
from ldistill.training.card import card
from ldistill.training.export import push

PNG = b"\x89PNG curves"


@pytest.fixture
def run(pair_root, tmp_path) -> Path:
    """A run's folder with everything that a card tells."""
    folder = tmp_path / "receipts"
    shutil.copytree(pair_root / "student", folder / "student")
    recipe = {"recipe": "/home/me/mine.yaml", "student": "/home/me/vlm", "teacher": "some/lm"}
    recipe |= {"distil": "language", "alpha": 0.7, "temperature": 4.0, "shards": "/home/me/shards"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    origins = {
        "student": {"name": "lusxvr/vlm", "hub": "lusxvr/vlm", "licence": "apache-2.0"},
        "teacher": {"name": "some/lm", "hub": "some/lm", "licence": "mit"},
        "sources": [
            {"source": "docvqa", "category": "document", "samples": 40, "licence": "cc-by-4.0",
             "homepage": "https://docvqa.org", "dataset": "some/cauldron"},
            {"source": "own", "category": "language", "samples": 7},
        ],
    }  # fmt: skip
    (folder / "origins.json").write_text(json.dumps(origins))
    state = {"packages": {"torch": "2.11"}, "git": {"commit": "abc123", "changed": False}}
    (folder / "environment.json").write_text(json.dumps(state))
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 12, "loss": 1.0}\n')
    scores = {"before": {"facts": 0.25}, "after": {"facts": 0.5}}
    (folder / "evaluation.json").write_text(json.dumps(scores))
    (folder / "eval").mkdir()
    entry = {"name": "AI2D", "group": "general", "value": 0.61, "documents": 10}
    suite = {"scores": {"ai2d": entry}, "limit": 10}
    (folder / "eval" / "eval.json").write_text(json.dumps(suite))
    (folder / "loss_curves.png").write_bytes(PNG)
    return folder


def test_a_card_tells_what_the_run_knows_and_no_path_of_the_machine(run):
    text = card(run, run / "student", "me/mine")
    found = ModelCard(text)  # as the hub reads it
    assert found.data.base_model == ["lusxvr/vlm", "some/lm"]
    assert found.data.license == "apache-2.0"
    assert found.data.datasets == ["some/cauldron"]
    assert found.data.pipeline_tag == "image-text-to-text"
    results = {r.dataset_type: r.metric_value for r in found.data.eval_results}
    assert results == {"facts": 0.5, "AI2D": 0.61}
    for told in (
        "| α | 0.7 |", "| τ | 4.0 |", "| steps | 12 |", "| recipe | mine |", "abc123",
        "| docvqa | document | 40 | cc-by-4.0 | some/cauldron |",
        "| own | language | 7 | not stated in the shards |  |",
        "| facts | 0.250 | 0.500 | held-out items |", "| AI2D |  | 0.610 | lmms-eval, first 10 |",
        'VisionLanguageModel.from_pretrained("me/mine")', "(licence: mit)",
    ):  # fmt: skip
        assert told in text, told
    assert "/home/me" not in text
    assert "loss_curves.png" not in text  # there is none beside this one


def test_a_run_on_labels_alone_has_no_teacher_in_its_card(run):
    path = run / "origins.json"
    origins = json.loads(path.read_text())
    del origins["teacher"]
    path.write_text(json.dumps(origins))
    text = card(run, run / "student")
    assert "labels alone" in text
    assert "α" not in text


def test_an_export_carries_its_card_which_keeps_the_licence_of_the_bases_own(run, tmp_path):
    """A transformers checkpoint brings a README.md of its own: replaced, but for its licence."""
    (run / "student" / "README.md").write_text("---\nlicense: llama2\n---\n# The base\n")
    for _ in range(2):  # again, over what it wrote
        done = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.license == "llama2"
    assert "# The base" not in text
    for name in ("model.safetensors", "config.json"):
        exported = (tmp_path / "out" / name).read_bytes()
        assert exported == (run / "student" / name).read_bytes()


# ---- to the hub ----


@pytest.fixture
def hub(monkeypatch) -> Iterator[UploadHub]:
    with UploadHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.TOKEN)
        yield server


def test_push_uploads_export_card_and_curves_in_one_commit(run, hub):
    command = ["push", str(run), "--repo", "mine", "--private"]
    for _ in range(2):  # again, to the repository that is there
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert f"{hub.url}/me/mine/commit/1" in done.stdout
    assert sum("/commit/" in request for request in hub.requests) == 2
    assert hub.private == {"me/mine": True}
    files = hub.repos["me/mine"]
    assert set(files) == {"config.json", "model.safetensors", "README.md", "loss_curves.png"}
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (run / "student" / name).read_bytes()
    assert files["loss_curves.png"] == PNG
    assert "![CE and KD by category](loss_curves.png)" in files["README.md"].decode()
    assert 'from_pretrained("me/mine")' in files["README.md"].decode()


@pytest.mark.parametrize(("repo", "changes", "code", "told"), [
    ("me/mine", {"HF_TOKEN": ""}, 2, "hf auth login"),
    ("me/mine", {"HF_TOKEN": "hf_old"}, 2, "refuses the token"),
    ("others/theirs", {}, 2, "don't have the rights"),
    ("a b/c", {}, 2, "--repo a b/c"),
    ("me/mine", {"HF_HUB_OFFLINE": True}, 2, "HF_HUB_OFFLINE is set"),
    ("me/mine", {"ENDPOINT": "http://127.0.0.1:9"}, 75, "does not answer"),
    ("me/mine", {"failing": "/commit/main"}, 75, "failed (503"),
    ("me/mine", {"failing": "/info/lfs/objects/batch"}, 2, "refuses me/mine (403"),
])  # fmt: skip
def test_what_keeps_a_run_from_the_hub_is_one_sentence(
    run, hub, monkeypatch, repo, changes, code, told
):
    for name, value in changes.items():
        if name == "failing":
            hub.failing[value] = (code == 75 and 503) or 403
        elif name == "HF_TOKEN":
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.setattr(constants, name, value)
    with pytest.raises((ValueError, OSError), match=re.escape(told)) as raised:
        push(run, repo)
    assert "\n" not in str(raised.value)
    assert exit_code(raised.value) == code


def test_only_a_run_can_be_pushed(run, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(run / "student", alone / "student")
    with pytest.raises(FileNotFoundError, match="hf upload"):
        push(alone, "me/mine")


def test_the_command_line_says_it_and_ends_with_its_status(run):
    env = environment() | {"HF_TOKEN": "", "HF_HUB_OFFLINE": "0", "HF_HOME": str(run / "home")}
    command = [sys.executable, "-m", "ldistill", "push", str(run), "--repo", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch("error: no token for .*hf auth login.*\n", done.stderr)
