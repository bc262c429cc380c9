"""Remote shards over real servers on loopback: same samples, bytes counted at the server."""

import gc
import hashlib
import itertools
import os
import shutil
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from helpers_data import assert_same_batches, make_processor, make_samples
from servers import FileServer, s3_server

from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex
from ldistill.data.loader import PackSampler, make_loader
from ldistill.data.order import Order
from ldistill.data.remote.read_ahead import FetchingSampler, local_ranks, settle_reads
from ldistill.data.remote.reader import (
    ObjectChanged,
    RangesUnsupported,
    RemoteError,
    RemoteReader,
    Retry,
)
from ldistill.data.store import Reading

LIMIT = 128
FAST = Retry(attempts=8, first=0.01, timeout=60.0)
IMPATIENT = Retry(attempts=8, first=0.01, timeout=3.0)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    samples = {"docvqa": make_samples("docvqa", 60), "vsr": make_samples("vsr", 40, images=2)}
    build_shards(
        samples, root, make_processor(max_images=2), options=BuildOptions(shard_bytes=30_000)
    )
    return root


@pytest.fixture
def root(built, tmp_path):
    """A copy to damage."""
    return shutil.copytree(built, tmp_path / "shards")


@pytest.fixture(scope="module")
def processor():
    return make_processor(max_images=2)


@pytest.fixture
def reading(tmp_path):
    def options(reads="auto", name="cache", **settings):
        return Reading(str(tmp_path / name), reads=reads, **{"retry": FAST, **settings})

    return options


def assert_whole(cache):
    """What has a name in the cache has the content of that name."""
    for path in cache.folder.iterdir():
        if path.is_file() and path.suffix != ".part":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def sizes(index):
    return index.column("size").astype(np.int64)


# the same samples --------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["whole", "ranged"])
def test_any_access_pattern_over_http_gives_the_local_samples(built, reading, reads):
    local, rng = ShardIndex.load(built), np.random.default_rng(0)
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading(reads))
        assert (index.sources, len(index)) == (local.sources, len(local))
        assert np.array_equal(index.samples, local.samples)
        pattern = rng.integers(0, len(local), 150).tolist()
        for sample in pattern:
            assert index.read(sample) == local.read(sample)
        touched = {index.locate(sample)[0].path: index.locate(sample)[0] for sample in pattern}
        expected = sizes(local)[pattern].sum()
        if reads == "whole":
            expected = sum(shard.bytes for shard in touched.values())
        assert server.tar_bytes() == expected


@pytest.mark.parametrize("reads", ["whole", "ranged"])
def test_s3_gives_the_local_samples_and_no_byte_more(built, reading, reads, processor):
    boto3 = pytest.importorskip("boto3", reason="needs the extra `test` (moto and s3fs)")
    pytest.importorskip("s3fs", reason="needs the extra `s3`")
    local = ShardIndex.load(built)
    with s3_server("bucket") as (address, sent):
        client = boto3.client("s3", endpoint_url=address)
        for path in built.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bucket", f"shards/{path.relative_to(built)}")
        with pytest.raises(FileNotFoundError, match="no shards at s3://bucket/other"):
            ShardIndex.load("s3://bucket/other", reading=reading(reads))
        index = ShardIndex.load("s3://bucket/shards", reading=reading(reads))
        assert np.array_equal(index.samples, local.samples)
        sent.clear()
        size = len(Order(local, limit=LIMIT).epoch(0))
        options = {"limit": LIMIT, "batch_size": 2, "stop_pack": size}
        remote = list(make_loader(index, processor, num_workers=2, **options))
        assert_same_batches(remote, list(make_loader(local, processor, **options)))
        tars = sum(count for name, count in sent.items() if name.endswith(".tar"))
        whole = sum(shard.bytes for shard in local.shards)
        assert tars == (whole if reads == "whole" else sizes(local).sum())
        first = index.shards[0]
        client.put_object(Bucket="bucket", Key=first.path.partition("bucket/")[2], Body=b"x")
        with pytest.raises(ObjectChanged, match=r"has 1 bytes instead of"):  # a range outside it
            RemoteReader(Retry(attempts=1)).fetch(first.path, 512, 600, first.bytes)
        with pytest.raises(ValueError, match=r"docvqa-train-000000\.tar has 1 bytes instead of"):
            ShardIndex.load("s3://bucket/shards", reading=reading(reads)).check_files()
        with pytest.raises(OSError, match="s3://nobucket"):
            ShardIndex.load("s3://nobucket/shards", reading=reading(reads))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("reads", ["whole", "ranged"])
def test_a_remote_loader_gives_the_local_batches(built, processor, reading, reads, workers):
    local = ShardIndex.load(built)
    size = len(Order(local, limit=LIMIT).epoch(0))
    options = {"limit": LIMIT, "batch_size": 2, "shuffle_window": 3, "stop_pack": size + 6}
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading(reads))
        for start in (0, 7):
            remote = make_loader(index, processor, start_pack=start, num_workers=workers, **options)
            assert_same_batches(
                remote, list(make_loader(local, processor, start_pack=start, **options))
            )


def test_spawned_workers_read_remote_shards(built, processor, reading):
    local = ShardIndex.load(built)
    options = {"limit": LIMIT, "batch_size": 2, "stop_pack": 8}
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading("ranged"))
        remote = make_loader(
            index, processor, num_workers=1, multiprocessing_context="spawn", **options
        )
        assert_same_batches(remote, list(make_loader(local, processor, **options)))


# bytes read, bytes needed ------------------------------------------------------------------------


def test_one_machine_reads_every_shard_once_for_all_epochs(built, processor, reading):
    index_bytes = sum(shard.bytes for shard in ShardIndex.load(built).shards)
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading())
        size = len(Order(index, limit=LIMIT).epoch(0))
        for workers in (0, 2):  # the second finds everything in the cache
            loader = make_loader(
                index,
                processor,
                limit=LIMIT,
                batch_size=2,
                stop_pack=2 * size,
                num_workers=workers,
            )
            assert len(list(loader)) > 2
            assert index.store.whole
            assert server.tar_bytes() == index_bytes


def test_ranks_on_many_machines_read_their_part_and_no_more(built, processor, reading):
    local = ShardIndex.load(built)
    order = Order(local, limit=LIMIT)
    size, ranks = len(order.epoch(0)), 4
    with FileServer(built) as server:
        parts, taken = [], 0
        for rank in range(ranks):
            index = ShardIndex.load(server.url, reading=reading(name=f"machine{rank}"))
            loader = make_loader(
                index,
                processor,
                limit=LIMIT,
                batch_size=1,
                rank=rank,
                world_size=ranks,
                stop_pack=size,
                num_workers=rank % 2,
            )
            mine = torch.cat([batch["doc_sample"] for batch in loader]).numpy()
            parts.append(server.tar_bytes() - taken)
            taken = server.tar_bytes()
            assert parts[-1] == sizes(local)[mine].sum()
            assert not index.store.whole
        assert sum(parts) == sizes(local).sum()


def test_what_does_not_fit_the_cache_twice_is_read_as_ranges(built, reading, monkeypatch):
    whole = sum(shard.bytes for shard in ShardIndex.load(built).shards)
    with FileServer(built) as server:
        for gb, window, ranks, local, expected in (
            (1.1 * whole / 1e9, 64, 1, 1, True),  # everything fits
            (0.5 * whole / 1e9, 64, 1, 1, False),
            (0.5 * whole / 1e9, 2, 1, 1, True),  # two windows of two shards fit
            (1, 64, 8, 8, True),
            (1, 64, 8, 1, False),
            (1, 64, 64, 8, False),
            (1, 64, 16, 8, False),  # half of every shard: no more than ranges would take
            (1, 64, 3, 2, True),
        ):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
            index = ShardIndex.load(server.url, reading=reading(cache_gb=gb))
            order = Order(index, limit=LIMIT, shuffle_window=window)
            told = settle_reads(index, order, ranks)
            assert index.store.whole is expected, (gb, window, ranks, local)
            assert ("whole" in told) is expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert local_ranks(8) == 1
    monkeypatch.setenv("LOCAL_SIZE", "4")  # DeepSpeed's launcher
    assert (local_ranks(8), local_ranks(2)) == (4, 2)


@pytest.mark.parametrize("start", [0, 11])
def test_shards_are_due_before_they_are_needed(built, reading, start):
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading("whole"))
        order = Order(index, limit=LIMIT, shuffle_window=2, pack_window=8)
        stop = len(order.epoch(0)) + len(order.epoch(1))
        packs = PackSampler(order, 2, start_pack=start, stop_pack=stop)
        due, needed_at_all, first = set(), set(), None
        for batch, shards in zip(packs, FetchingSampler(packs, index).shards_due(), strict=False):
            due |= set(shards)
            first = first or set(shards)
            needed = {index.locate(sample)[0] for sample in np.concatenate(batch).tolist()}
            assert needed <= due
            needed_at_all |= needed
        assert needed_at_all == set(index.shards) == due
        assert len(first) < len(index.shards)


def test_due_shards_are_fetched_in_the_background(built, reading):
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading("whole"))
        packs = PackSampler(Order(index, limit=LIMIT), 2)
        server.faults = {index.shards[1].path.rpartition("/")[2]: [404] * 9}  # left to its reader
        sampler = FetchingSampler(packs, index)
        batches, plain = iter(sampler), iter(packs)
        assert all(map(np.array_equal, next(batches), next(plain)))
        expected = {shard.sha256 for shard in index.shards} - {index.shards[1].sha256}
        deadline = time.time() + 300
        while not all(map(index.store.cache.holds, expected)) and time.time() < deadline:
            time.sleep(0.01)
        assert all(map(index.store.cache.holds, expected))
        assert not index.store.cache.holds(index.shards[1].sha256)


# failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["whole", "ranged"])
@pytest.mark.parametrize("faults", [["cut"], [500], [503, "cut", 429], ["flip"], ["slow"]], ids=str)
def test_passing_failures_are_tried_again(built, processor, reading, reads, faults):
    local = ShardIndex.load(built)
    options = {"limit": LIMIT, "batch_size": 2, "stop_pack": 8}
    with FileServer(built) as server:
        server.stall = 1.5 * IMPATIENT.timeout
        retry = IMPATIENT if "slow" in faults else FAST
        index = ShardIndex.load(server.url, reading=reading(reads, retry=retry))
        names = [shard.path.rpartition("/")[2] for shard in index.shards]
        server.faults = {name: list(faults) for name in names[:3]}
        remote = list(make_loader(index, processor, num_workers=2, **options))
        assert_same_batches(remote, list(make_loader(local, processor, **options)))
        for shard in index.shards[:3]:
            index.read(shard.start)
        assert not any(server.faults.values())


@pytest.mark.parametrize("path", ["index.json", "samples.npy"])
def test_the_index_too_is_fetched_again(built, reading, path):
    with FileServer(built) as server:
        server.faults = {path: [500, "cut"]}
        index = ShardIndex.load(server.url, reading=reading())
        assert np.array_equal(index.samples, ShardIndex.load(built).samples)


@pytest.mark.parametrize("reads", ["whole", "ranged"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_lasting_failure_stops_the_run_with_its_place(built, processor, reading, reads, workers):
    """Even where bad samples are dropped: a store that fails says nothing about a sample."""
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading(reads))
        loader = make_loader(
            index,
            processor,
            limit=LIMIT,
            batch_size=4,
            on_bad_sample="drop",
            num_workers=workers,
        )
        shard = index.shards[3]
        server.faults = {shard.path.rpartition("/")[2]: [500] * 1000}
        message = rf"^{shard.path}, bytes \d+ to \d+: failed 8 times, .*500.*goes on from its last"
        with pytest.raises(RemoteError, match=message):
            list(itertools.islice(loader, 60))
        assert_whole(index.store.cache)


@pytest.mark.parametrize("store", ["http", "s3"])
def test_a_forked_child_leaves_the_connections_of_its_parent_alone(built, store):
    """As a loader's workers do: what a child drops of its parent's was closed under the parent."""
    path = next(built.rglob("*.tar"))
    with ExitStack() as stack:
        if store == "http":
            url = f"{stack.enter_context(FileServer(path.parent)).url}/{path.name}"
        else:
            boto3 = pytest.importorskip("boto3", reason="needs the extra `test`")
            address, _ = stack.enter_context(s3_server("lake"))
            boto3.client("s3", endpoint_url=address).upload_file(str(path), "lake", path.name)
            url = f"s3://lake/{path.name}"
        reader = RemoteReader(Retry(attempts=1))

        def first(length):
            return reader.fetch(url, 0, length, path.stat().st_size)

        pieces = reader.each(range(100, 108), first)  # on as many connections
        if (child := os.fork()) == 0:
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0) == (child, 0)
        assert [first(length) for length in range(100, 108)] == pieces


@pytest.mark.parametrize(("status", "message"), [(404, "not there"), (403, "status 403")])
def test_what_will_not_pass_is_not_tried_again(built, reading, status, message):
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading("ranged"))
        shard = index.shards[0]
        name = shard.path.removeprefix(server.url)
        server.faults = {name: [status] * 9}
        with pytest.raises(OSError, match=rf"{name}, bytes 0 to \d+.*{message}"):
            index.read(0)
        assert server.requests[f"GET {name}"] == 1


def test_a_server_without_ranges_is_read_whole(built, reading):
    local = ShardIndex.load(built)
    with FileServer(built, ranges=False) as server:
        index = ShardIndex.load(server.url, reading=reading("ranged"))
        with pytest.raises(RangesUnsupported, match="--shard_reads whole"):
            index.read(1)
        index = ShardIndex.load(server.url, reading=reading("whole"))
        server.faults = {".tar": ["cut"]}
        for sample in (0, 50, 99):
            assert index.read(sample) == local.read(sample)


def test_a_server_that_lists_nothing(built, reading):
    with FileServer(built, listing=False) as server:
        assert ShardIndex.load(server.url, reading=reading()).sources == ["docvqa", "vsr"]
        assert ShardIndex.load(server.url, ["vsr"], reading=reading()).sources == ["vsr"]
        shutil.copytree(built / "vsr", built / "mine")
        try:
            text = (built / "vsr/index.json").read_text()
            (built / "mine/index.json").write_text(
                text.replace('"source": "vsr"', '"source": "mine"')
            )
            index = ShardIndex.load(server.url, reading=reading(), also=["mine"])
            assert index.sources == ["docvqa", "mine", "vsr"]
        finally:
            shutil.rmtree(built / "mine")
        with pytest.raises(ValueError, match="no finished shards of aokvqa"):
            ShardIndex.load(server.url, ["aokvqa"], reading=reading())


def test_nobody_answers(reading):
    with FileServer(".") as server:
        url = server.url
    with pytest.raises(RemoteError, match=f"{url}: failed 8 times.*can be reached"):
        ShardIndex.load(url, reading=reading())


def test_unknown_protocols_are_refused(reading):
    with pytest.raises(ValueError, match="s4"):
        ShardIndex.load("s4://bucket/shards", reading=reading())


def test_settings_of_fsspec_stay_beside_ours(monkeypatch):
    from fsspec.config import conf

    reader = RemoteReader(Retry(timeout=7))
    monkeypatch.setitem(conf, "https", {"client_kwargs": {"trust_env": True}})
    settings = reader._filesystem("https://store.example/x").client_kwargs
    assert (settings["trust_env"], settings["timeout"].sock_read) == (True, 7)
    pytest.importorskip("s3fs", reason="needs the extra `s3`")
    monkeypatch.setitem(conf, "s3", {"anon": True, "config_kwargs": {"signature_version": "s3v4"}})
    store = reader._filesystem("s3://bucket/x")
    assert (store.anon, store.config_kwargs["signature_version"]) == (True, "s3v4")
    assert store.config_kwargs["read_timeout"] == 7


# objects that change -----------------------------------------------------------------------------


def replace(root, shard, server, change):
    path = root / shard.path.removeprefix(server.url + "/")
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("reads", ["whole", "ranged"])
@pytest.mark.parametrize(
    "change",
    [lambda old: bytes(len(old)), lambda old: old[:700], lambda old: old[: len(old) // 2]],
    ids=["same size", "tiny", "half"],
)
def test_an_object_that_changes_under_way_is_an_error(root, processor, reading, reads, change):
    with FileServer(root) as server:
        index = ShardIndex.load(server.url, reading=reading(reads))
        loader = make_loader(index, processor, limit=LIMIT, batch_size=4, on_bad_sample="drop")
        shard = index.shards[5]
        replace(root, shard, server, change)
        with pytest.raises(ObjectChanged, match=f"^{shard.path} (changed|has).*upload"):
            list(itertools.islice(loader, 60))
        assert not index.store.cache.holds(shard.sha256)
        assert_whole(index.store.cache)


def test_an_object_of_another_size_is_found_before_the_first_step(root, processor, reading):
    with FileServer(root) as server:
        index = ShardIndex.load(server.url, reading=reading())
        replace(root, index.shards[2], server, lambda old: old + b"more")
        with pytest.raises(ValueError, match=f"shard {index.shards[2].path} has .* bytes instead"):
            make_loader(index, processor, limit=LIMIT, batch_size=4)
        (root / index.shards[2].path.removeprefix(server.url + "/")).unlink()
        with pytest.raises(FileNotFoundError, match=f"{index.shards[2].path}: not there"):
            make_loader(index, processor, limit=LIMIT, batch_size=4)


def test_a_table_of_another_build_is_refused(root, reading):
    with FileServer(root) as server:
        table = root / "vsr/samples.npy"
        table.write_bytes(table.read_bytes()[:-1] + b"\x07")
        with pytest.raises(ObjectChanged, match=r"vsr/samples\.npy has the SHA-256"):
            ShardIndex.load(server.url, reading=reading())


def test_a_cached_shard_that_rots_is_fetched_again(built, reading):
    local = ShardIndex.load(built)
    with FileServer(built) as server:
        index = ShardIndex.load(server.url, reading=reading("whole"))
        assert index.read(5) == local.read(5)
        path = index.store.cache.folder / index.locate(5)[0].sha256
        path.write_bytes(bytes(path.stat().st_size))
        assert index.read(5) == local.read(5)
