"""The index: global numbering, and every way in which a folder can be wrong."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers_data import make_processor, make_samples

from ldistill.data import archive
from ldistill.data.archive import BadSample
from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex
from ldistill.models.nanovlm_format import NanoVLMProcessor

COUNTS = {"docvqa": 23, "vsr": 9, "own": 5}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    samples = {source: make_samples(source, count) for source, count in COUNTS.items()}
    options = BuildOptions(shard_bytes=20_000)
    build_shards(samples, root, make_processor(), extra={"own": "document"}, options=options)
    return root


@pytest.fixture
def root(built, tmp_path):
    """A copy to damage."""
    return shutil.copytree(built, tmp_path / "shards")


def test_samples_are_numbered_by_source_shard_and_place(built):
    index = ShardIndex.load(built)
    assert index.sources == ["docvqa", "own", "vsr"]
    assert index.categories == ["document", "document", "language"]
    assert len(index) == len(index.samples) == len(index.lengths) == 37
    assert len(index.shards) > 5
    expected = [s for source in index.sources for s in make_samples(source, COUNTS[source])]
    assert [index.read(n) for n in range(len(index))] == expected
    assert index.source_of(np.array([0, 22, 23, 27, 28, 36])).tolist() == [0, 0, 1, 1, 2, 2]
    for number in (0, 22, 23, 36):
        shard, record, key = index.locate(number)
        assert shard.start <= number < shard.start + shard.samples
        assert record["tokens"] == index.lengths[number]
        assert key.startswith(index.sources[shard.source] + "-0000000")
    assert index.shard_sizes.sum() == 37


def test_counts_are_those_of_the_documents(built):
    index, processor = ShardIndex.load(built), make_processor()
    for number, record in enumerate(index.samples):
        document = processor.encode(index.read(number).turns, [(1, 1)])
        counts = (len(document.input_ids), document.supervised, document.prompt, 1)
        assert counts == tuple(record[["tokens", "supervised", "prompt", "tiles"]])


def test_sources_in_the_order_asked(built):
    index = ShardIndex.load(built, ["vsr", "docvqa"])
    assert index.sources == ["vsr", "docvqa"]
    assert index.read(0) == make_samples("vsr", 9)[0]
    assert index.read(9) == make_samples("docvqa", 23)[0]


def test_workers_receive_no_arrays(built):
    index = ShardIndex.load(built)
    assert index.samples.nbytes + index.lengths.nbytes > 1000
    copy = pickle.loads(pickle.dumps(index))
    assert {"samples", "lengths"}.isdisjoint(vars(copy))
    assert all(mapped is None for mapped in copy._maps)
    assert copy.read(30) == index.read(30)


def test_the_right_processor_passes(built):
    index = ShardIndex.load(built)
    index.check(make_processor())
    index.check(make_processor(max_images=4))
    index.check_files()


def test_another_processor_is_named_part_by_part(built):
    index = ShardIndex.load(built)
    with pytest.raises(
        ValueError, match=r"docvqa.*different image settings\. \(tiling False in the"
    ):
        index.check(make_processor(tiling=True))
    grown = make_processor().tokenizer
    grown.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"different tokenizer\. Build them again"):
        index.check(NanoVLMProcessor(grown, make_processor().images))


def test_older_shards_of_transformers_students_are_read_where_tiling_agrees(built, tmp_path):
    """They name the tokens and the tiles of a picture apart, where there now is one part."""
    shutil.copytree(built, tmp_path / "shards")

    class Later(NanoVLMProcessor):
        def _picture_parts(self):
            return {"pictures": "as the processor makes them"}

    index = ShardIndex.load(tmp_path / "shards")
    settings = make_processor().images
    index.check(Later(make_processor().tokenizer, settings))
    with pytest.raises(ValueError, match="different pictures"):
        index.check(Later(make_processor().tokenizer, replace(settings, tiling=True)))


def test_no_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ShardIndex.load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no shards in"):
        ShardIndex.load(tmp_path)
    (tmp_path / "vsr/.build").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is unfinished: run the same"):
        ShardIndex.load(tmp_path)


def test_missing_sources(built):
    with pytest.raises(
        ValueError, match=r"no finished shards of chartqa, vqav2 in .* docvqa, own, vsr"
    ):
        ShardIndex.load(built, ["vsr", "chartqa", "vqav2"])
    with pytest.raises(ValueError, match="no finished shards of any source"):
        ShardIndex.load(built, [])


def test_missing_and_truncated_shards(root):
    index = ShardIndex.load(root)
    tar = root / "docvqa/docvqa-train-000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"docvqa-train-000001\.tar has \d+ bytes instead of \d+"):
        index.check_files()
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=r"docvqa-train-000001\.tar is missing"):
        index.check_files()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format=99), "has format 99, this version reads 1"),
        (lambda meta: meta.pop("shards"), r"is damaged \(missing \['shards'\]"),
        (lambda meta: meta.update(source="docvqa"), "of another source"),
        (
            lambda meta: meta["shards"].clear(),
            r"index\.json has no sample: leave the source out",
        ),
        (lambda meta: meta["shards"].pop(), r"samples\.npy does not fit index\.json"),
    ],
    ids=["format", "key", "source", "empty", "count"],
)
def test_damaged_indices(root, change, message):
    path = root / "vsr/index.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message):
        ShardIndex.load(root)


def test_unreadable_index_files(root):
    samples = root / "vsr/samples.npy"
    whole = samples.read_bytes()
    samples.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"samples\.npy cannot be read"):
        ShardIndex.load(root)
    np.save(samples, np.zeros(9))
    with pytest.raises(ValueError, match="does not fit"):
        ShardIndex.load(root)
    (root / "vsr/index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        ShardIndex.load(root)


def test_reads_that_fail_are_tried_again_for_a_moment(built, monkeypatch):
    """As network storage does; a file that is not there is not waited for."""
    index, wanted = ShardIndex.load(built), ShardIndex.load(built).read(3)
    once, errors = archive.read_once, []

    def stumbling(path, offset, size):
        if errors:
            raise errors.pop()
        return once(path, offset, size)

    monkeypatch.setattr(archive, "read_once", stumbling)
    monkeypatch.setattr(archive, "PAUSES", (0.001, 0.001))
    errors[:] = [OSError(5, "Input/output error") for _ in range(2)]
    assert index.read(3) == wanted
    errors[:] = [OSError(5, "Input/output error") for _ in range(4)]
    with pytest.raises(BadSample, match=r"unreadable shard \(.*Input/output error"):
        index.read(3)
    assert len(errors) == 1
    errors[:] = [FileNotFoundError(2, "No such file") for _ in range(2)]
    with pytest.raises(BadSample, match="unreadable shard"):
        index.read(3)
    assert len(errors) == 1
