"""Which checkpoint a run goes on from, what it refuses, and what it says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import Evil
from test_checkpoint_folder import write

from ldistill.checkpoint import folder as checkpoint_folder
from ldistill.checkpoint import resuming
from ldistill.checkpoint.folder import begin, publish, seal
from ldistill.checkpoint.universal import check_convertible
from ldistill.common.errors import exit_code
from ldistill.data import archive


def save(root: Path, step: int, **objects) -> Path:
    folder = begin(root, step)
    for name, value in objects.items():
        torch.save(value, folder / f"{name}.pt")
    return publish(folder, step, seal(folder), {})


def test_the_newest_complete_one_is_taken_and_the_others_are_named(tmp_path, capsys):
    for step in (9, 10, 11, 12):
        write(tmp_path, step)
    (tmp_path / "checkpoint-12" / "manifest.json").unlink()
    data = tmp_path / "checkpoint-11" / "data.json"
    data.write_bytes(bytes(len(data.read_bytes())))
    # global_step2/*.pt of these folders are no torch files: give the one to be found none.
    for path in (tmp_path / "checkpoint-10").rglob("*.pt"):
        path.unlink()
    folder = begin(tmp_path, 10)
    (folder / "data.json").write_text("{}")
    publish(folder, 10, seal(folder), {})
    assert resuming.find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-10"
    said = capsys.readouterr().out
    assert "checkpoint-12 skipped: it has no manifest.json: it was never finished" in said
    assert "checkpoint-11 skipped: data.json is not what was written" in said
    assert f"going on from {tmp_path / 'checkpoint-10'}" in said
    assert "checkpoint-9" not in said


def test_auto_begins_where_there_is_nothing_and_true_does_not(tmp_path, capsys):
    assert resuming.find_checkpoint("auto", tmp_path / "new") is None
    assert "beginning at step 0" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        resuming.find_checkpoint("true", tmp_path)
    assert resuming.find_checkpoint("false", tmp_path) is None
    assert resuming.find_checkpoint(None, tmp_path) is None


def test_auto_does_not_begin_anew_over_checkpoints_that_broke(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "data.json").unlink()
    with pytest.raises(ValueError, match=r"none of the checkpoints(.|\n)*data\.json is missing"):
        resuming.find_checkpoint("auto", tmp_path)


def fails(monkeypatch, at, times: int) -> None:
    """Let reading fail so many times with an I/O error; ``at``: an owner and a name."""
    owner, name = at
    read, left = getattr(owner, name), [times]

    def failing(*args):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*args)

    monkeypatch.setattr(archive, "PAUSES", (0.001, 0.001))
    monkeypatch.setattr(owner, name, failing)


READS = {
    "hashes": (checkpoint_folder, "hash_file"),
    "manifest": (Path, "read_bytes"),
    "pickles": (torch.serialization, "get_unsafe_globals_in_checkpoint"),
}


@pytest.mark.parametrize("read", READS)
def test_a_disk_that_stumbles_is_no_reason_to_skip_a_checkpoint(tmp_path, monkeypatch, read):
    save(tmp_path, 1, state=torch.ones(1))
    newest = save(tmp_path, 2, state=torch.ones(1))
    with monkeypatch.context() as patch:
        fails(patch, READS[read], times=2)
        assert resuming.find_checkpoint("auto", tmp_path) == newest
    fails(monkeypatch, READS[read], times=99)
    with pytest.raises(OSError, match="Input/output error") as caught:
        resuming.find_checkpoint("auto", tmp_path)
    assert exit_code(caught.value) == 75


def test_a_named_checkpoint_is_that_one_or_nothing(tmp_path):
    path = save(tmp_path, 3, weights=torch.ones(2))
    write(tmp_path, 8)
    assert resuming.find_checkpoint(str(path), tmp_path) == path
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resuming.find_checkpoint(str(tmp_path / "checkpoint-4"), tmp_path)
    (path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes instead of"):
        resuming.find_checkpoint(str(path), tmp_path)


def test_plain_states_pass_and_code_is_refused_without_running(tmp_path):
    plain = {"step": 3, "rng": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    assert resuming.foreign_code(save(tmp_path, 1, state=plain, more=[torch.ones(3)])) is None
    evil = save(tmp_path, 2, state={"deep": [Evil()]})
    reason = resuming.foreign_code(evil)
    assert reason is not None
    assert "state.pt would run code of its own" in reason
    assert "system" in reason
    (evil / "state.pt").write_bytes(b"\x80\x04not a torch file")
    assert "not a plain torch file" in str(resuming.foreign_code(evil))


def test_auto_skips_a_checkpoint_that_holds_code(tmp_path, capsys):
    first = save(tmp_path, 1, state=torch.ones(1))
    save(tmp_path, 2, state=Evil())
    assert resuming.find_checkpoint("auto", tmp_path) == first
    assert "checkpoint-2 skipped: state.pt would run code" in capsys.readouterr().out


ABOUT = {"run": "r", "student": "s", "teacher": None, "data": "d"}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("run", "belongs to another run"),
        ("student", "began from another student"),
        ("teacher", "a run with another teacher"),
        ("data", "over other shards, or in another order"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, key, words):
    resuming.check_belongs(tmp_path, dict(ABOUT), ABOUT)
    with pytest.raises(ValueError, match=words):
        resuming.check_belongs(tmp_path, ABOUT | {key: "x"}, ABOUT)


def test_a_model_is_known_by_its_weights(tmp_path):
    from safetensors.torch import save_file

    prints = set()
    for number, tensor in enumerate(
        (torch.zeros(50_000), torch.zeros(50_000).index_fill(0, torch.tensor([49_999]), 1.0))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({"w": tensor}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        prints.add(resuming.model_fingerprint(folder))
        assert resuming.model_fingerprint(folder) in prints
    (folder / "config.json").write_text('{"a": 1}')
    prints.add(resuming.model_fingerprint(folder))
    assert len(prints) == 3


def test_a_model_without_safetensors_is_known_by_its_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    prints = set()
    for number in (1, 2):
        torch.save({"w": torch.full((4,), number)}, tmp_path / "pytorch_model.bin")
        prints.add(resuming.model_fingerprint(tmp_path))
    assert len(prints) == 2


def test_layouts_without_zero_are_not_mixed_with_those_that_have_it(tmp_path):
    check_convertible(tmp_path, {"engine": "zero2"}, {"engine": "zero3"})
    with pytest.raises(ValueError, match="was written with zero2, this run has no DeepSpeed"):
        check_convertible(tmp_path, {"engine": "zero2"}, {"engine": "none"})
    old, new = ({"engine": "zero0", "ranks": n} for n in (2, 1))
    with pytest.raises(ValueError, match="only as it began; ranks: then 2, now 1"):
        check_convertible(tmp_path, old, new)
