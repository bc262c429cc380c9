"""Two gloo ranks that write together, fail together and find out together."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from ldistill.checkpoint import folder as checkpoint_folder
from ldistill.checkpoint import logs, resuming
from ldistill.checkpoint.folder import read_manifest, survey
from ldistill.checkpoint.saver import CheckpointError, Saver
from ldistill.common import ranks, run_files
from ldistill.common.errors import TransientError
from ldistill.training import run_folder
from ldistill.training.result import copy_student


def on_two_ranks(work: Callable[[Path], object], root: Path) -> list[str]:
    """Run ``work(root)`` on two ranks; what each returned, or the error it raised, as text."""
    multiprocessing.spawn(_rank, args=(work, root), nprocs=2)
    return [(root / f"result-{rank}").read_text() for rank in range(2)]


def _rank(rank: int, work: Callable[[Path], object], root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    try:
        text = str(work(root))
    except (ValueError, OSError) as error:
        text = f"{type(error).__name__}: {error}"
    (root / f"result-{rank}").write_text(text)
    dist.destroy_process_group()


def write_part(saver: Saver, step: int, fail: bool = False) -> Path:
    def write() -> None:
        path = saver.root / f"checkpoint-{step}" / f"rank{ranks.index()}.bin"
        path.write_bytes(bytes(1000))
        if fail and ranks.index() == 1:
            raise OSError(28, "No space left on device", str(path))

    return saver.save(step, write)


def save_then_fail(root: Path) -> str:
    saver = Saver(root, {"run": "a"}, keep=1)
    first = write_part(saver, 1).name
    assert set(read_manifest(root / first).files) == {"rank0.bin", "rank1.bin"}
    try:
        write_part(saver, 2, fail=True)
    except CheckpointError as error:
        failed = str(error)
    dist.barrier()
    left = [f.step for f in survey(root) if f.problem is None]
    dist.barrier()
    again = write_part(saver, 2).name  # there is room again
    return json.dumps([first, failed, left, os.listdir(saver.root), again])  # noqa: PTH208


def test_a_full_disk_on_one_rank_is_an_error_on_both(tmp_path):
    results = [json.loads(text) for text in on_two_ranks(save_then_fail, tmp_path)]
    assert results[0] == results[1]
    first, failed, left, leftovers, again = results[0]
    assert (first, left, leftovers, again) == ("checkpoint-1", [1], [], "checkpoint-2")
    assert "checkpoint-2 could not be written" in failed
    assert "rank 1: OSError: [Errno 28] No space left on device" in failed
    assert "checkpoint-1 is complete and untouched" in failed
    assert [f.step for f in survey(tmp_path)] == [2]


def read_alone(root: Path) -> str:
    def read() -> str:
        if ranks.index() == 1:
            raise FileNotFoundError("no shards: the folder /data does not exist")
        return "there"

    return ranks.everywhere(read)


def test_what_one_rank_lacks_stops_both(tmp_path):
    results = on_two_ranks(read_alone, tmp_path)
    assert results[0] == results[1]
    assert results[0].startswith("ValueError: on ")
    assert "(rank 1), but not elsewhere" in results[0]
    assert "no shards: the folder /data does not exist" in results[0]


def test_alone_an_error_is_what_it_was():
    def broken() -> None:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        ranks.everywhere(broken)
    assert ranks.everywhere(lambda: 3) == 3


def test_a_run_folder_that_nodes_do_not_share_is_refused(tmp_path):
    run_folder.claim(tmp_path / "run", {"alpha": 1}, None, False)
    run_id = run_files.run_id(tmp_path / "run")
    run_folder.check_shared(tmp_path / "run", run_id)
    with pytest.raises(OSError, match="that all nodes share"):
        run_folder.check_shared(tmp_path / "elsewhere", run_id)


def keep_checkpoint(root: Path, step: int) -> Path:
    saver = Saver(root, {}, keep=None)
    return saver.save(
        step, lambda: (saver.root / f"checkpoint-{step}" / "a").write_bytes(bytes(99))
    )


def test_a_checkpoint_from_elsewhere_does_not_go_into_another_run(tmp_path):
    recipe = {"alpha": 1}
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        run_folder.claim(folder, recipe, None, False)
    resume = keep_checkpoint(old, 4)
    assert not run_folder.claim(old, recipe, resume, False)
    assert not run_folder.claim(new, recipe, resume, False), "the same, killed before it saved"
    keep_checkpoint(new, 9)
    with pytest.raises(ValueError, match="new already holds a run, which is not the one of"):
        run_folder.claim(new, recipe, resume, False)
    assert survey(new)
    assert run_folder.claim(new, recipe, resume, overwrite=True)
    assert survey(new) == []
    with pytest.raises(ValueError, match=r"--overwrite would rename .*checkpoint-4"):
        run_folder.claim(old, recipe, resume, overwrite=True)


def test_the_newest_run_of_a_recipe_is_its_own(tmp_path):
    for number, (name, recipe) in enumerate(
        {"foo": "my/foo.yaml", "foo-3": "foo.yaml", "foo-2": "foo-2.yaml", "foo-b": "foo-b"}.items()
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"recipe: {recipe}\n")
        os.utime(tmp_path / name / "recipe.yaml", (number, number))
    assert run_folder.newest_folder("foo.yaml", tmp_path) == tmp_path / "foo-3"
    assert run_folder.newest_folder("foo-2", tmp_path) == tmp_path / "foo-2"
    assert run_folder.newest_folder("bar", tmp_path) is None


def test_a_linked_folder_is_renamed_behind_its_link(tmp_path):
    target, link = tmp_path / "disk", tmp_path / "run"
    target.mkdir()
    link.symlink_to(target)
    (target / run_files.JOB).write_text("4711")  # by the script that started the run
    run_folder.claim(link, {}, None, False)
    keep_checkpoint(link, 1)
    assert run_folder.claim(link, {}, None, overwrite=True)
    assert [f.step for f in survey(tmp_path / "disk.old-1")] == [1]
    assert link.is_symlink()
    names = ["environment.json", "recipe.yaml", "run.json", run_files.JOB]
    assert sorted(p.name for p in target.iterdir()) == names
    run_folder.release(link, run_files.run_id(link))
    assert [f.step for f in survey(link)] == [1]
    assert not (tmp_path / "disk.old-1").exists()


def test_what_a_run_has_written_counts_as_its_room(tmp_path, monkeypatch):
    """1000 trained parameters: 18,000 bytes a checkpoint, 4,000 a student."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 20_000))
    saver = Saver(tmp_path, {}, keep=None)
    for step in (1, 2, 3):
        part = saver.root / f"checkpoint-{step}" / "a"
        saver.save(step, lambda part=part: part.write_bytes(bytes(17_900)))
    with pytest.raises(OSError, match="Make room"):
        run_folder.check_disk(tmp_path, 1000, 1000, 2)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(bytes(4000))
    run_folder.check_disk(tmp_path, 1000, 1000, 2)
    with pytest.raises(OSError, match="Make room"):
        run_folder.check_disk(tmp_path, 1000, 1000, 4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.distributed.DistError])
def test_what_is_no_failure_of_the_disk_ends_the_rank_at_once(tmp_path, error):
    """Collectives are out of step by then: nothing can be agreed upon."""

    def write() -> None:
        raise error("of the GPU")

    with pytest.raises(error, match="of the GPU"):
        Saver(tmp_path, {}, keep=None).save(1, write)


def test_a_log_is_durable_before_the_checkpoint_that_counts_on_it(tmp_path, monkeypatch):
    done = []
    for place, name in ((logs, "sync"), (checkpoint_folder, "publish")):
        real = getattr(place, name)
        noted = lambda *args, real=real: (done.append(args[0].name), real(*args))[1]  # noqa: E731
        monkeypatch.setattr(place, name, noted)
    log = logs.StepLog(tmp_path / "log.jsonl")
    log.append({"step": 1})
    write_part(Saver(tmp_path, {}, None, [log]), 1)
    assert done == ["log.jsonl", tmp_path.name, "checkpoint-1"]


def test_a_checkpoint_is_not_published_over_a_log_that_lacks_lines(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = logs.StepLog(tmp_path / "log.jsonl")
    log.append({"step": 1})
    with pytest.raises(CheckpointError, match=r"log\.jsonl could not be written \(No space left"):
        write_part(Saver(tmp_path, {}, None, [log]), 1)
    assert survey(tmp_path) == []


def test_a_disk_that_cannot_be_cleared_still_tells_why_nothing_was_saved(tmp_path, monkeypatch):
    saver = Saver(tmp_path, {}, keep=None)
    write_part(saver, 1)

    def fail(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def write() -> None:
        monkeypatch.setattr(checkpoint_folder, "clear", fail)
        fail()

    with pytest.raises(CheckpointError, match="checkpoint-1 is complete and untouched"):
        saver.save(2, write)


def test_an_earlier_result_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpoint, result = tmp_path / "checkpoint-2", tmp_path / "student"
    for folder, text in ((checkpoint / "student" / "inner", "new"), (result, "old")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(TransientError, match="student could not be written"):
            copy_student(checkpoint / "student", result)
    assert (result / "config.json").read_text() == "old"
    copy_student(checkpoint / "student", result)
    assert [p.name for p in result.rglob("*.json")] == ["config.json"]
    assert (result / "inner" / "config.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "student"]


def test_a_start_that_failed_releases_what_it_began_alone(tmp_path):
    folder = tmp_path / "run"
    assert run_folder.claim(folder, {"alpha": 1}, None, False)
    own = run_files.run_id(folder)
    assert not run_folder.claim(folder, {"alpha": 1}, None, False, restart=True), "begun before"
    run_folder.release(folder, "another")
    assert run_files.run_id(folder) == own
    (folder / "checkpoint-2").mkdir()
    run_folder.release(folder, own)
    assert run_files.run_id(folder) == own
    (folder / "checkpoint-2").rmdir()
    (folder / "notes.txt").write_text("mine")
    run_folder.release(folder, own)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_going_back_gives_up_what_came_later(tmp_path, capsys):
    saver = Saver(tmp_path, {}, keep=None)
    paths = [write_part(saver, step) for step in (1, 2, 3)]
    (paths[2] / "rank0.bin").unlink()
    moved = resuming.give_up_later(tmp_path, paths[0])
    assert [path.name for path in moved] == ["given-up-checkpoint-2"]
    assert "checkpoint-2 is later than checkpoint-1" in capsys.readouterr().out
    assert [f.step for f in survey(tmp_path)] == [3, 1]
