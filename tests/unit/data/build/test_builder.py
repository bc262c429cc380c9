"""Building shards: what stock webdataset sees, same bytes every time, resuming, refusals."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from helpers_data import die, digests, make_processor, make_samples, picture
from PIL import Image

from ldistill.common.samples import Drop, Sample, Turn
from ldistill.data.build.build_types import BuildOptions, SourceInput
from ldistill.data.build.builder import build, build_shards
from ldistill.data.build.workers import keep
from ldistill.data.index import ShardIndex

SMALL = BuildOptions(shard_bytes=30_000)
TURN = (Turn("q", "a"),)


def entry(samples, identity="v1", fail_at=None, source="vsr"):
    """A resumable input of samples at hand; `fail_at` calls a function before that row."""

    def rows(start):
        for number in range(start, len(samples)):
            if fail_at and number == fail_at[0]:
                fail_at[1]()
            yield number, samples[number]

    return SourceInput(source, "language", rows, keep, {"version": identity})


# contents ----------------------------------------------------------------------------------------


def read_with_webdataset(root):
    tars = sorted(str(path) for path in root.glob("*/*.tar"))
    return {s["__key__"]: s for s in webdataset.WebDataset(tars, shardshuffle=False)}


def test_stock_webdataset_reads_every_sample(tmp_path):
    samples = {n: make_samples("docvqa" if n else "vsr", 12, images=n) for n in range(3)}
    build_shards({"vsr": samples[0]}, tmp_path / "0", make_processor(), options=SMALL)
    build_shards({"docvqa": samples[1]}, tmp_path / "1", make_processor(), options=SMALL)
    both = make_processor(max_images=2)
    build_shards({"docvqa": samples[2]}, tmp_path / "2", both, options=SMALL)
    for count, members in enumerate([[], ["jpg"], ["1.jpg", "2.png"]]):
        found = read_with_webdataset(tmp_path / str(count))
        assert len(found) == 12
        for number, (key, stored) in enumerate(found.items()):
            sample = samples[count][number]
            assert key == f"{sample.source}-{number:09d}"
            record = json.loads(stored["json"])
            turns = [{"user": t.user, "assistant": t.assistant} for t in sample.turns]
            assert record["turns"] == turns
            assert (record["id"], record["source"]) == (sample.id, sample.source)
            assert tuple(stored[name] for name in members) == sample.images
            assert ("image" in record, "images" in record) == (count == 1, count == 2)


def test_webdataset_decodes_pictures_and_json(tmp_path):
    build_shards({"vsr": make_samples("vsr", 3)}, tmp_path, make_processor())
    tars = [str(path) for path in tmp_path.glob("*/*.tar")]
    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode("pil"):
        assert isinstance(sample["jpg"], Image.Image)
        assert sample["json"]["image"] == {"width": 40, "height": 30, "format": "jpg"}


def test_layout_and_index(tmp_path):
    [report] = build_shards(
        {"vsr": make_samples("vsr", 40)}, tmp_path, make_processor(), options=SMALL
    )
    meta = json.loads((tmp_path / "vsr/index.json").read_text())
    names = [f"vsr-train-{number:06d}.tar" for number in range(len(meta["shards"]))]
    assert sorted(p.name for p in (tmp_path / "vsr").iterdir()) == [
        "index.json",
        "samples.npy",
        *names,
    ]
    assert len(names) == report.shards > 3
    assert meta["samples"] == sum(shard["samples"] for shard in meta["shards"]) == 40
    for name, shard in zip(names, meta["shards"], strict=True):
        data = (tmp_path / "vsr" / name).read_bytes()
        assert shard["url"] == name
        assert shard["bytes"] == len(data) <= 30_000 + 1024
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert meta["processor"] == make_processor().fingerprint()
    assert (meta["source"], meta["category"], meta["split"]) == ("vsr", "language", "train")


def test_pictures_of_other_formats_become_png(tmp_path):
    data = picture(kind="BMP")
    build_shards({"vsr": [Sample("0", "vsr", TURN, (data,))]}, tmp_path, make_processor())
    [stored] = read_with_webdataset(tmp_path).values()
    pixels = np.array(Image.open(io.BytesIO(stored["png"])))
    assert np.array_equal(pixels, np.array(Image.open(io.BytesIO(data))))


def test_tiles_are_counted(tmp_path):
    processor = make_processor(tiling=True, max_images=2)
    sample = Sample("0", "vsr", TURN, (picture(40, 30), picture(64, 64)))
    build_shards({"vsr": [sample]}, tmp_path, processor)
    [record] = ShardIndex.load(tmp_path).samples
    grids = [processor.images.grid(40, 30), processor.images.grid(64, 64)]
    assert record["tiles"] == sum(rows * cols + 1 for rows, cols in grids) == 13 + 17
    assert record["tokens"] == len(processor.encode(TURN, grids).input_ids)


def test_every_row_is_kept_or_counted(tmp_path):
    good = make_samples("vsr", 5)
    rows = [
        *good,
        Sample("two", "vsr", TURN, (picture(), picture())),
        Sample("broken", "vsr", TURN, (b"broken",)),
        Sample("cut", "vsr", TURN, (picture(kind="JPEG")[:500],)),
        Sample("none", "vsr", ()),
        Sample("text", "vsr", (Turn("\ud800", "a"),)),
        Drop("missing image", "x"),
        Drop("empty answer", "y", "turn"),
    ]
    [report] = build_shards({"vsr": rows}, tmp_path, make_processor())
    assert report.samples == 5
    assert report.drops == {
        "too many images": 1,
        "undecodable image": 2,
        "no turns": 1,
        "invalid text": 1,
        "missing image": 1,
    }
    assert report.turn_drops == {"empty answer": 1}
    meta = json.loads((tmp_path / "vsr/index.json").read_text())
    assert (meta["drops"], meta["turn_drops"]) == (report.drops, report.turn_drops)


def test_max_samples_counts_what_is_kept(tmp_path):
    rows = [Drop("missing image", "x"), *make_samples("vsr", 5)]
    options = BuildOptions(max_samples=3)
    [report] = build_shards({"vsr": rows}, tmp_path, make_processor(), options=options)
    assert (report.samples, report.drops) == (3, {"missing image": 1})


# same bytes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted build in this process: 100 rows, some of them bad."""
    root = tmp_path_factory.mktemp("reference")
    build([entry(rows())], root, make_processor(), SMALL)
    return digests(root)


def rows():
    samples = make_samples("vsr", 100)
    for number in (0, 31, 32, 70, 99):
        samples[number] = Sample(str(number), "vsr", TURN, (b"broken",))
    return samples


def test_two_builds_give_the_same_bytes(reference, tmp_path):
    build([entry(rows())], tmp_path, make_processor(), SMALL)
    assert digests(tmp_path) == reference


def test_workers_do_not_change_a_byte(reference, tmp_path):
    options = BuildOptions(shard_bytes=30_000, workers=2)
    build([entry(rows())], tmp_path, make_processor(), options)
    assert digests(tmp_path) == reference


@pytest.mark.parametrize("killed_at", [1, 33, 71, 99])
def test_a_killed_build_goes_on_to_the_same_bytes(reference, tmp_path, killed_at):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    context = multiprocessing.get_context("fork")
    broken = entry(rows(), fail_at=(killed_at, die))
    child = context.Process(target=build, args=([broken], tmp_path, make_processor(), SMALL))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "vsr/index.json").exists()
    finished = len(list((tmp_path / "vsr").glob("*.tar")))
    read = []
    resumed = entry(rows())
    counting = SourceInput(
        "vsr",
        "language",
        lambda start: (read.append(number) or (number, row) for number, row in resumed.rows(start)),
        keep,
        resumed.identity,
    )
    [report] = build([counting], tmp_path, make_processor(), SMALL)
    assert digests(tmp_path) == reference
    assert report.kept_shards == finished
    assert len(read) < 100 or not finished


def test_an_interrupted_build_leaves_no_index_and_no_half_shard(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build([entry(rows(), fail_at=(50, stop))], tmp_path, make_processor(), SMALL)
    names = [p.name for p in (tmp_path / "vsr").iterdir()]
    assert "index.json" not in names
    assert not [name for name in names if name.endswith(".part")]


def test_a_finished_shard_that_changed_is_built_again(reference, tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build([entry(rows(), fail_at=(90, stop))], tmp_path, make_processor(), SMALL)
    tars = sorted((tmp_path / "vsr").glob("*.tar"))
    tars[1].write_bytes(tars[1].read_bytes()[:-1] + b"x")
    [report] = build([entry(rows())], tmp_path, make_processor(), SMALL)
    assert report.kept_shards == 1
    assert digests(tmp_path) == reference


def test_a_finished_build_is_recognised(reference, tmp_path):
    [first] = build([entry(rows())], tmp_path, make_processor(), SMALL)
    untouchable = entry(rows(), fail_at=(0, lambda: pytest.fail("rows were read again")))
    [second] = build([untouchable], tmp_path, make_processor(), SMALL)
    assert second.kept_shards == first.shards
    assert (second.samples, second.drops) == (first.samples, first.drops)
    assert digests(tmp_path) == reference


def test_samples_without_an_identity_never_resume(tmp_path):
    def broken():
        yield from make_samples("vsr", 60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards({"vsr": broken()}, tmp_path, make_processor(), options=SMALL)
    assert len(list(tmp_path.glob("vsr/*.tar"))) > 2
    [report] = build_shards(
        {"vsr": make_samples("vsr", 9)}, tmp_path, make_processor(), options=SMALL
    )
    assert (report.samples, report.kept_shards) == (9, 0)
    listed = {shard.path for shard in ShardIndex.load(tmp_path).shards}
    assert {str(path) for path in tmp_path.glob("vsr/*.tar")} == listed


# refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "v2"},
        {"processor": make_processor(tiling=True)},
        {"processor": make_processor(max_images=2)},
        {"options": BuildOptions(shard_bytes=20_000)},
        {"options": BuildOptions(shard_bytes=30_000, max_samples=7)},
    ],
    ids=["input", "tiling", "max_images", "shard size", "max_samples"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_build_in_the_same_folder_is_refused(tmp_path, change, finished):
    def stop():
        raise KeyboardInterrupt

    samples = make_samples("vsr", 30)
    if finished:
        build([entry(samples)], tmp_path, make_processor(), SMALL)
    else:
        with pytest.raises(KeyboardInterrupt):
            build([entry(samples, fail_at=(29, stop))], tmp_path, make_processor(), SMALL)
    before = digests(tmp_path)
    other = entry(samples, change.get("identity", "v1"))
    processor, options = change.get("processor", make_processor()), change.get("options", SMALL)
    with pytest.raises(FileExistsError, match=r"of another input or other options.*--overwrite"):
        build([other], tmp_path, processor, options)
    assert digests(tmp_path).items() >= before.items()


def test_overwrite_replaces(tmp_path):
    build([entry(make_samples("vsr", 30))], tmp_path, make_processor(), SMALL)
    options = BuildOptions(shard_bytes=30_000, overwrite=True)
    [report] = build([entry(make_samples("vsr", 7), "v2")], tmp_path, make_processor(), options)
    assert report.samples == len(ShardIndex.load(tmp_path)) == 7


def test_a_damaged_finished_build_is_refused(tmp_path):
    build([entry(make_samples("vsr", 30))], tmp_path, make_processor(), SMALL)
    tar = tmp_path / "vsr/vsr-train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"vsr-train-000001\.tar changed since"):
        build([entry(make_samples("vsr", 30))], tmp_path, make_processor(), SMALL)


def test_two_builds_at_once_are_refused(tmp_path):
    def second():
        with pytest.raises(FileExistsError, match="another build is writing"):
            build([entry(make_samples("vsr", 9))], tmp_path, make_processor(), SMALL)

    build([entry(make_samples("vsr", 9), fail_at=(4, second))], tmp_path, make_processor(), SMALL)
    assert len(ShardIndex.load(tmp_path)) == 9


def test_a_source_without_a_usable_sample_is_an_error(tmp_path):
    bad = [Sample("0", "vsr", TURN, (b"x",)), Drop("missing image", "1")]
    with pytest.raises(
        ValueError, match=r"no usable sample of vsr \(dropped: 1 undecodable image, 1"
    ):
        build_shards({"vsr": bad}, tmp_path, make_processor())
    with pytest.raises(ValueError, match="nothing was read"):
        build_shards({"vsr": []}, tmp_path, make_processor())
    assert not list(tmp_path.iterdir())


def test_unknown_and_unusable_source_names(tmp_path):
    with pytest.raises(ValueError, match="unknown source 'mine'"):
        build_shards({"mine": make_samples("mine", 1)}, tmp_path, make_processor())
    for name in ("a.b", "A", "__a__", "a b", "x" * 81):
        with pytest.raises(ValueError, match="bad source id"):
            build_shards({name: []}, tmp_path, make_processor(), extra={name: "language"})


@pytest.mark.parametrize(
    "options", [{"shard_bytes": 0}, {"max_samples": 0}, {"split": "../x"}, {"split": ""}]
)
def test_impossible_options(options):
    with pytest.raises(ValueError, match="must be"):
        BuildOptions(**options)


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(OSError, match="no room on the disk of"):
        build_shards({"vsr": make_samples("vsr", 3)}, tmp_path / "new", make_processor())
    assert not (tmp_path / "new").exists()


def test_room_is_asked_for_what_is_still_to_be_written(tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build([entry(rows(), fail_at=(90, stop))], tmp_path, make_processor(), SMALL)
    written = sum(path.stat().st_size for path in tmp_path.glob("vsr/*.tar"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10**6))
    too_large = replace(entry(rows()), bytes=10**6 + written + 1)
    with pytest.raises(OSError, match="no room on the disk of"):
        build([too_large], tmp_path, make_processor(), SMALL)
    build([replace(too_large, bytes=10**6 + written)], tmp_path, make_processor(), SMALL)


def test_a_worker_that_dies_is_explained(tmp_path):
    doomed = replace(entry(rows()), convert=die)
    options = BuildOptions(shard_bytes=30_000, workers=2)
    with pytest.raises(RuntimeError, match=r"worker of the build of vsr died.*with fewer workers"):
        build([doomed], tmp_path, make_processor(), options)


def test_a_disk_that_fills_up_stops_the_build_and_it_goes_on_later(
    reference, tmp_path, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    free = iter([10**9] * 4 + [10] * 9)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, next(free)))
        with pytest.raises(OSError, match="no room on the disk of"):
            build([entry(rows())], tmp_path, make_processor(), SMALL)
    [report] = build([entry(rows())], tmp_path, make_processor(), SMALL)
    assert report.kept_shards == 3
    assert digests(tmp_path) == reference
