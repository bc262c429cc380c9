"""The protocol of checkpoints: killed between any two operations, a good one is always there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from ldistill.checkpoint import folder as folders

FILES = {
    "data.json": b"{}",
    "global_step2/rank0.pt": b"0" * 5000,
    "global_step2/rank1.pt": b"1" * 70,
}


def fill(folder: Path, salt: bytes = b"") -> None:
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + salt)


def write(root: Path, step: int, keep: int | None = None, parts: int = 2) -> Path:
    """A whole checkpoint, its files sealed by so many ranks."""
    folder = folders.begin(root, step)
    fill(folder, str(step).encode())
    files: folders.Files = {}
    for part in range(parts):
        files |= folders.seal(folder, part, parts)
    path = folders.publish(folder, step, files, {"run": "a"})
    folders.retire(root, keep)
    return path


def good(root: Path) -> list[int]:
    return [f.step for f in folders.survey(root) if f.problem is None]


def assert_sound(root: Path) -> None:
    """Every checkpoint that looks complete is, byte for byte."""
    for step in good(root):
        folder = root / f"checkpoint-{step}"
        assert folders.damaged(folder) == []
        for name, data in FILES.items():
            assert (folder / name).read_bytes() == data + str(step).encode()


def killed_at(event: int, work) -> bool:
    """Fork, run ``work``, kill -9 before its n-th file operation; whether it got to the end."""
    child = os.fork()
    if child == 0:
        count = [0]

        def hook(name: str, args: tuple) -> None:
            writes = name == "open" and args[1] is not None and set("wax+") & set(str(args[1]))
            if writes or name in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                count[0] += 1
                if count[0] == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


@pytest.mark.parametrize("again", [False, True])
def test_killed_before_any_operation_a_good_checkpoint_is_there(tmp_path, again):
    """``again``: the step is there already, damaged, and is written anew."""
    start = tmp_path / "start"
    start.mkdir()
    write(start, 1)
    if again:
        write(start, 2)
        (start / "checkpoint-2" / "data.json").write_bytes(b"other")
    event, ended, outcomes = 0, False, set()
    while not ended:
        event += 1
        assert event < 200
        root = tmp_path / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root)
        ended = killed_at(event, lambda root=root: write(root, 2, keep=1))
        assert_sound(root)
        outcomes.add(tuple(good(root)))
        assert good(root), f"nothing is left after operation {event}"
        # What a restarted run does next works whatever was left.
        write(root, 3, keep=1)
        assert good(root) == [3]
        assert_sound(root)
        assert not (root / folders.WRITING / "checkpoint-2").exists()
        assert not (root / folders.RETIRED).exists()
    assert event > 15
    assert outcomes == {(1,), (2, 1), (2,)}


def test_a_checkpoint_is_sealed_by_any_number_of_ranks(tmp_path):
    folder = folders.begin(tmp_path, 4)
    fill(folder)
    whole = folders.seal(folder)
    for parts in (1, 2, 3, 7):
        shares = [folders.seal(folder, part, parts) for part in range(parts)]
        assert sum(map(len, shares)) == len(whole)
        assert {k: v for share in shares for k, v in share.items()} == whole


def test_what_was_not_sealed_is_not_published(tmp_path):
    folder = folders.begin(tmp_path, 4)
    fill(folder)
    files = folders.seal(folder)
    (folder / "late.pt").write_bytes(b"late")
    with pytest.raises(OSError, match=r"changed while it was sealed \(late\.pt\)"):
        folders.publish(folder, 4, files, {})
    assert folders.survey(tmp_path) == []


@pytest.mark.parametrize("keep", [None, 0, 1, 2, 5])
def test_retention_keeps_the_newest_and_never_counts_the_broken(tmp_path, keep):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoint-4" / "data.json").unlink()
    (tmp_path / "checkpoint-9").mkdir()
    folders.retire(tmp_path, keep)
    assert good(tmp_path) == ([3, 2, 1][:keep] if keep else [3, 2, 1])
    assert (tmp_path / "checkpoint-4").exists()
    assert (tmp_path / "checkpoint-9").exists()


PROBLEMS = {
    "no manifest": (lambda f: (f / folders.MANIFEST).unlink(), "never finished"),
    "not JSON": (lambda f: (f / folders.MANIFEST).write_text('{"format": 1, "st'), "is damaged"),
    "nothing listed": (
        lambda f: (f / folders.MANIFEST).write_text(
            json.dumps({"format": 1, "step": 2, "files": {}, "about": {}})
        ),
        "lists no files",
    ),
    "another format": (
        lambda f: (f / folders.MANIFEST).write_text(
            json.dumps({"format": 9, "step": 2, "files": {}, "about": {}})
        ),
        "format 9, this version reads 1",
    ),
    "outside": (
        lambda f: (f / folders.MANIFEST).write_text(
            json.dumps({"format": 1, "step": 2, "files": {"../x": [1, ""]}, "about": {}})
        ),
        "outside",
    ),
    "missing": (lambda f: (f / "data.json").unlink(), r"data\.json is missing"),
    "link": (lambda f: (f / "global_step5").symlink_to(".."), "global_step5 is a symbolic link"),
    "cut": (lambda f: os.truncate(f / "global_step2/rank0.pt", 9), "has 9 bytes instead of 5001"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_is_said(tmp_path, name):
    spoil, message = PROBLEMS[name]
    spoil(write(tmp_path, 2))
    [found] = folders.survey(tmp_path)
    assert found.problem is not None
    assert re.search(message, found.problem)


def test_a_flipped_bit_is_found_by_its_hash_alone(tmp_path):
    path = write(tmp_path, 2) / "global_step2" / "rank0.pt"
    data = bytearray(path.read_bytes())
    data[4000] ^= 1
    path.write_bytes(bytes(data))
    assert good(tmp_path) == [2]
    shares = [folders.damaged(tmp_path / "checkpoint-2", part, 2) for part in range(2)]
    assert shares[0] + shares[1] == ["global_step2/rank0.pt"]


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path):
    for name in ("checkpoint-", "checkpoint-x", "old-checkpoint-3", "checkpoint-3.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert folders.survey(tmp_path) == []
    assert folders.survey(tmp_path / "none") == []
