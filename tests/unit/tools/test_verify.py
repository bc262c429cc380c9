"""Verify: sound shards pass, and every kind of damage is named with its place."""

import hashlib
import json
import shutil
from zlib import crc32

import numpy as np
import pytest
from helpers_data import make_processor, make_samples, picture
from PIL import ImageFile

from ldistill.common.images import check_image
from ldistill.common.samples import Sample, Turn
from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex
from ldistill.tools.shards.verify import verify_shards


def verify(root, **how):
    """Every problem, of the folder and of one shard after another."""
    return [problem for part in verify_shards(ShardIndex.load(root), **how) for problem in part]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    samples = {"vsr": make_samples("vsr", 30), "docvqa": make_samples("docvqa", 10)}
    build_shards(samples, root, make_processor(), options=BuildOptions(shard_bytes=30_000))
    return root


@pytest.fixture
def root(built, tmp_path):
    """A copy to damage."""
    return shutil.copytree(built, tmp_path / "shards")


def test_sound_shards_pass(built):
    for sources, pattern in (None, "*/*.tar"), (["docvqa"], "docvqa/*.tar"):
        found = list(verify_shards(ShardIndex.load(built, sources)))
        assert found == [[]] * (1 + len(list(built.glob(pattern))))


def test_every_shard_is_reported_as_it_is_done(root):
    shard = ShardIndex.load(root).shards[1]
    tar = root / "docvqa" / shard.path.rpartition("/")[2]
    tar.write_bytes(tar.read_bytes()[:-2000])
    checked = verify_shards(ShardIndex.load(root))
    assert (next(checked), next(checked)) == ([], [])
    assert "bytes instead of" in next(checked)[0]


def test_workers_find_the_same(root):
    tar = root / "vsr/vsr-train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2000])
    alone, together = verify(root), verify(root, workers=2)
    assert alone == together
    assert alone


def test_a_flipped_byte_is_found_in_the_shard_and_in_the_sample(root):
    index = ShardIndex.load(root)
    shard, record, key = index.locate(33)
    tar = root / "vsr" / shard.path.rpartition("/")[2]
    data = bytearray(tar.read_bytes())
    data[int(record["offset"]) + 700] ^= 1
    tar.write_bytes(data)
    problems = verify(root)
    assert len(problems) == 2
    assert problems[0] == f"{tar} has another SHA-256 than in the index"
    assert problems[1].startswith(f"sample {key} in {tar}: corrupt sample")


def test_a_cut_shard_loses_its_last_samples(root):
    index = ShardIndex.load(root)
    shard = index.shards[-1]
    tar = root / "vsr" / shard.path.rpartition("/")[2]
    tar.write_bytes(tar.read_bytes()[: int(index.samples["offset"][-1]) + 100])
    problems = verify(root)
    assert len(problems) == 2
    assert f"bytes instead of {shard.bytes}" in problems[0]
    assert "truncated shard" in problems[1]


def test_missing_and_stray_shards(root):
    (root / "vsr/vsr-train-000000.tar").rename(root / "vsr/vsr-train-000077.tar")
    problems = verify(root)
    assert len(problems) == 2
    assert problems[0].endswith("vsr-train-000077.tar is not in the index")
    assert problems[1].endswith("vsr-train-000000.tar is missing")


def test_a_picture_that_does_not_decode_is_found_behind_right_checksums(tmp_path, monkeypatch):
    """Somebody rewrote the shard, hashes and all: only decoding tells, whatever others told PIL."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does on import
    good, source = picture(kind="PNG"), "vsr"
    build_shards(
        {source: [Sample("0", source, (Turn("q", "a"),), (good,))]}, tmp_path, make_processor()
    )
    tar, meta_path = tmp_path / "vsr/vsr-train-000000.tar", tmp_path / "vsr/index.json"
    bad = bytearray(good)
    bad[60:200] = bytes(140)
    with pytest.raises(ValueError, match="undecodable"):
        check_image(bytes(bad))
    data = tar.read_bytes().replace(good, bytes(bad))
    tar.write_bytes(data)
    meta = json.loads(meta_path.read_text())
    meta["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    samples = np.load(tmp_path / "vsr/samples.npy")
    samples["crc32"] = crc32(data[: int(samples["size"][0])])
    np.save(tmp_path / "vsr/samples.npy", samples)
    table = (tmp_path / "vsr/samples.npy").read_bytes()
    meta["samples_sha256"] = hashlib.sha256(table).hexdigest()
    meta_path.write_text(json.dumps(meta))
    [problem] = verify(tmp_path)
    assert problem.startswith(f"sample vsr-000000000 in {tar}: undecodable image")


def test_a_changed_table_of_samples_is_found(root):
    path = root / "vsr/samples.npy"
    samples = np.load(path)
    samples["tokens"][3] += 1
    np.save(path, samples)
    assert verify(root) == [f"{path} has another SHA-256 than in the index"]


def test_no_index_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shards in"):
        verify(tmp_path)
