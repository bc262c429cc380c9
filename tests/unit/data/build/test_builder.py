"""Building shards: what stock webdataset sees, same bytes every time, resuming, refusals."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from helpers_data import (
    CHATML,
    die,
    digests,
    make_processor,
    make_samples,
    make_tokenizer,
    picture,
)
from PIL import Image

from ldistill.common.samples import Drop, Sample, Turn
from ldistill.data.archive import pack_sample, unpack_sample
from ldistill.data.build.build_types import BuildOptions, InputError, SourceInput, SourcesFailed
from ldistill.data.build.builder import build, build_shards
from ldistill.data.build.workers import keep
from ldistill.data.index import ShardIndex
from ldistill.data.loader import make_loader
from ldistill.models.nanovlm_format import NanoVLMProcessor

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
    assert record["tokens"] == len(processor.encode(TURN, [(40, 30), (64, 64)]).input_ids)


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


def test_the_first_record_of_every_reason_is_kept(tmp_path):
    good = make_samples("vsr", 40)
    rows = [
        *good[:30],
        Drop("malformed record", "m1", detail="KeyError: 'x'"),
        Drop("malformed record", "m2", detail="TypeError: y"),
        Drop("empty answer", "t1", "turn"),
        Sample("two", "vsr", TURN, (picture(), picture())),
        *good[30:],
    ]
    [report] = build([entry(rows)], tmp_path, make_processor(), SMALL)
    expected = {
        "malformed record": "m1 (KeyError: 'x')",
        "empty answer": "t1",
        "too many images": "two (2 pictures: raise --max-images from 1)",
    }
    assert report.first_drops == expected
    assert json.loads((tmp_path / "vsr/index.json").read_text())["first_drops"] == expected
    [again] = build([entry(rows)], tmp_path, make_processor(), SMALL)
    assert again.first_drops == expected


def test_what_a_killed_build_dropped_first_is_known_to_the_next(tmp_path):
    def stop():
        raise KeyboardInterrupt

    mixed = [Drop("missing image", "x", detail="gone"), *make_samples("vsr", 60)]
    with pytest.raises(KeyboardInterrupt):
        build([entry(mixed, fail_at=(50, stop))], tmp_path, make_processor(), SMALL)
    [report] = build([entry(mixed)], tmp_path, make_processor(), SMALL)
    assert report.kept_shards
    assert report.first_drops == {"missing image": "x (gone)"}


def test_a_bad_source_does_not_hide_the_others(tmp_path):
    good = {source: make_samples(source, 5) for source in ("vsr", "docvqa")}
    inputs = {"vsr": good["vsr"], "vqav2": [Drop("missing image", "1")], "docvqa": good["docvqa"]}
    with pytest.raises(SourcesFailed, match="not built: vqav2\nvqav2: no usable sample") as failed:
        build_shards(inputs, tmp_path, make_processor())
    assert [report.source for report in failed.value.reports] == ["vsr", "docvqa"]
    assert ShardIndex.load(tmp_path).sources == ["docvqa", "vsr"]

    def breaks(start):
        yield 0, good["vsr"][0]
        raise InputError("the network is gone")

    broken = SourceInput("vqav2", "language", breaks, keep, {"version": "v1"})
    inputs = [broken, entry(good["vsr"], source="aokvqa")]
    with pytest.raises(SourcesFailed, match="vqav2: the network is gone"):
        build(inputs, tmp_path, make_processor(), SMALL)
    assert "aokvqa" in ShardIndex.load(tmp_path).sources


# conversations as they are stored ----------------------------------------------------------------


def test_system_turns_and_places_of_pictures_come_back(tmp_path):
    files = (picture(seed=1), picture(seed=2))
    turns = (Turn("Is it or it red?", "yes", (3, 6)), Turn("And?", "no"))
    sample = Sample("0", "vsr", turns, files, "Be brief.")
    processor = make_processor(max_images=2)
    build_shards({"vsr": [sample]}, tmp_path, processor)
    index = ShardIndex.load(tmp_path)
    assert index.read(0) == sample
    document = processor.encode(turns, [(1, 1)] * 2, "Be brief.")
    assert index.lengths.tolist() == [len(document.input_ids)]
    [batch] = make_loader(index, processor, limit=128, batch_size=1, stop_pack=1)
    assert batch["input_ids"][0, : len(document.input_ids)].tolist() == document.input_ids.tolist()
    [stored] = read_with_webdataset(tmp_path).values()
    record = json.loads(stored["json"])
    assert record["system"] == "Be brief."
    assert record["turns"] == [
        {"user": "Is it or it red?", "assistant": "yes", "images": [3, 6]},
        {"user": "And?", "assistant": "no"},
    ]


def test_a_sample_that_needs_nothing_new_has_the_bytes_it_had():
    sample = Sample("7", "vsr", (Turn("q", "a"), Turn("ü", "b")), (b"\x89PNG",))
    block = pack_sample("vsr-000000007", sample, [{"width": 1, "height": 2, "format": "png"}])
    record = (
        '{"id":"7","source":"vsr","turns":[{"user":"q","assistant":"a"},{"user":"ü",'
        '"assistant":"b"}],"image":{"width":1,"height":2,"format":"png"}}'
    )
    with tarfile.open(fileobj=io.BytesIO(block + bytes(1024))) as tar:
        names = ["vsr-000000007.png", "vsr-000000007.json"]
        assert tar.getnames() == names
        assert tar.extractfile(names[1]).read() == record.encode()
    assert unpack_sample(block, "s", "vsr-000000007") == sample


def test_a_template_without_system_turns_drops_them_by_name(tmp_path):
    silent = CHATML.replace("messages %}", "messages if message['role'] != 'system' %}", 1)
    processor = NanoVLMProcessor(make_tokenizer(silent), make_processor().images)
    rows = [Sample("0", "vsr", TURN), Sample("1", "vsr", TURN, system="Be brief.")]
    [report] = build_shards({"vsr": rows}, tmp_path, processor)
    assert (report.samples, report.drops) == (1, {"system turn": 1})
    assert "chat template takes none" in report.first_drops["system turn"]


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
    with pytest.raises(FileExistsError, match=r"vsr-train-000001\.tar changed since"):
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
        ValueError, match=r"no usable sample of vsr \(dropped: 1 missing image, first 1, 1 undecod"
    ):
        build_shards({"vsr": bad}, tmp_path, make_processor())
    with pytest.raises(ValueError, match="nothing was read"):
        build_shards({"vsr": []}, tmp_path, make_processor())
    assert not list(tmp_path.iterdir())


def test_names_are_counted_in_bytes_and_the_remedy_is_said(tmp_path):
    name = "图" * 26
    build_shards({name: make_samples("x", 1)}, tmp_path, make_processor(), extra={name: "document"})
    [key] = read_with_webdataset(tmp_path)
    assert key == f"{name}-000000000"
    longer = name + "图"
    message = (
        rf"bad source id '{longer}' of 81 bytes: .*at most 80 bytes.*Rename the file or folder"
    )
    with pytest.raises(ValueError, match=message):
        build_shards({longer: []}, tmp_path, make_processor(), extra={longer: "language"})


def test_unknown_and_unusable_source_names(tmp_path):
    with pytest.raises(ValueError, match="unknown source 'mine'"):
        build_shards({"mine": make_samples("mine", 1)}, tmp_path, make_processor())
    for name in ("a.b", "A", "__a__", "a b", "x" * 81):
        with pytest.raises(ValueError, match="bad source id"):
            build_shards({name: []}, tmp_path, make_processor(), extra={name: "language"})


@pytest.mark.parametrize("options", [{"split": "../x"}, {"split": ""}])
def test_impossible_options(options, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        build([], tmp_path, make_processor(), BuildOptions(**options))


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
    with pytest.raises(OSError, match=r"worker of the build of vsr died.*with fewer workers"):
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
