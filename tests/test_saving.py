"""Two gloo ranks that write together, fail together and find out together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from ldistill import ranks, resuming, run_folder
from ldistill.checkpoint_folder import read_manifest, survey
from ldistill.saving import CheckpointError, Saver


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
    run_id = run_folder.run_id(tmp_path / "run")
    run_folder.check_shared(tmp_path / "run", run_id)
    with pytest.raises(OSError, match="that all nodes share"):
        run_folder.check_shared(tmp_path / "elsewhere", run_id)


def test_a_start_that_failed_releases_what_it_began_alone(tmp_path):
    folder = tmp_path / "run"
    assert run_folder.claim(folder, {"alpha": 1}, None, False)
    own = run_folder.run_id(folder)
    assert not run_folder.claim(folder, {"alpha": 1}, None, False, restart=True), "begun before"
    run_folder.release(folder, "another")
    assert run_folder.run_id(folder) == own
    (folder / "checkpoint-2").mkdir()
    run_folder.release(folder, own)
    assert run_folder.run_id(folder) == own
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
