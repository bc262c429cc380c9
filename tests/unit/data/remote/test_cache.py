"""The shard cache: always bounded, whole or absent, shared by processes, safe from kills."""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from helpers_data import make_processor, make_samples
from servers import FileServer

from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex
from ldistill.data.remote.cache import ShardCache, WrongContent
from ldistill.data.remote.reader import Retry
from ldistill.data.store import Reading

FORK = multiprocessing.get_context("fork")


def sha(data):
    return hashlib.sha256(data).hexdigest()


def filling(data, calls=None, pause=0.0):
    def fill(file):
        if calls is not None:
            calls.append(sha(data))
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            file.write(piece)
            file.flush()
            time.sleep(pause)
        return sha(data)

    return fill


def read(cache, data, **options):
    with cache.open(sha(data), len(data), filling(data, **options)) as file:
        return file.read()


def held(cache):
    return sum(path.stat().st_size for path in cache.folder.iterdir() if path.is_file())


def test_objects_are_fetched_once_and_the_longest_unused_makes_room(tmp_path):
    cache, calls = ShardCache(tmp_path, 3000), []
    a, b, c, d = (bytes([n]) * 1000 for n in range(4))
    for data in (a, b, c, a, b, a):
        assert read(cache, data, calls=calls) == data
    assert calls == [sha(a), sha(b), sha(c)]
    read(cache, d, calls=calls)
    assert [cache.holds(sha(data)) for data in (a, b, c, d)] == [True, True, False, True]
    assert held(cache) == 3000


def test_an_evicted_file_stays_readable_to_those_who_have_it(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    with cache.open(sha(b"a" * 800), 800, filling(b"a" * 800)) as file:
        read(cache, b"b" * 900)
        assert not cache.holds(sha(b"a" * 800))
        assert file.read() == b"a" * 800


def test_wrong_content_and_failures_leave_nothing(tmp_path):
    cache = ShardCache(tmp_path, 1000)
    with pytest.raises(WrongContent, match=sha(b"other")):
        cache.open(sha(b"right"), 5, filling(b"other"))

    def fails(file):
        file.write(b"half")
        raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        cache.open(sha(b"right"), 5, fails)
    assert held(cache) == 0
    with pytest.raises(OSError, match=r"0\.000 GB does not fit the shard cache.*shard_cache_gb"):
        cache.open(sha(b"large"), 2000, filling(b"large"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/cache cannot be made"):
        ShardCache(tmp_path / "file/cache", 1)


def test_the_limit_holds_at_every_moment(tmp_path):
    """Eight readers of random objects; the folder is measured all the while."""
    cache, limit = ShardCache(tmp_path, 10_000), 10_000
    objects = [bytes([n]) * (500 + 97 * n) for n in range(20)]
    most, moments, done, errors = [0], [0], threading.Event(), []

    def found():
        stats = (entry.stat() for entry in os.scandir(tmp_path) if entry.is_file())
        return [(stat.st_ino, stat.st_ctime_ns, stat.st_size) for stat in stats]

    def watch():
        while not done.wait(0.001):
            # A folder is not read at one moment: what left it and what came after could be added
            # up. What two readings agree on was all there between them.
            with contextlib.suppress(FileNotFoundError):
                if (files := found()) == found():
                    most[0] = max(most[0], sum(size for *_, size in files))
                    moments[0] += 1

    def reader(seed):
        rng = np.random.default_rng(seed)
        for number in rng.integers(0, len(objects), 60):
            if read(cache, objects[number], pause=0.0005) != objects[number]:
                errors.append(number)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    watcher = threading.Thread(target=watch)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert not errors
    assert moments[0] > 10
    assert 5000 < most[0] <= limit


def test_a_killed_process_leaves_no_half_file(tmp_path):
    data = os.urandom(4000)
    cache = ShardCache(tmp_path, 10_000)
    victim = FORK.Process(target=read, args=(cache, data), kwargs={"pause": 300})
    victim.start()
    deadline = time.time() + 200
    while not list(tmp_path.glob("*.part")) and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert not cache.add(sha(data), len(data), filling(data), wait=False)  # someone is at it
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".part"]
    assert not cache.holds(sha(data))
    again = ShardCache(tmp_path, 10_000)
    assert held(again) == 0
    assert read(again, data) == data


# against a server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    options = BuildOptions(shard_bytes=30_000)
    build_shards({"docvqa": make_samples("docvqa", 60)}, root, make_processor(), options=options)
    return root


def read_all(url, folder, seed, answers, gb=1.0):
    reading = Reading(str(folder), cache_gb=gb, reads="whole", retry=Retry(4, 0.01))
    index = ShardIndex.load(url, reading=reading)
    order = np.random.default_rng(seed).permutation(len(index)).tolist()
    answers.put((seed, {sample: index.read(sample) for sample in order}))


def test_processes_that_share_a_cache_fetch_each_shard_once(built, tmp_path):
    local = ShardIndex.load(built)
    with FileServer(built) as server:
        server.delay = 0.05  # so that they do meet
        answers = FORK.Queue()
        both = [
            FORK.Process(target=read_all, args=(server.url, tmp_path, seed, answers))
            for seed in (1, 2)
        ]
        for process in both:
            process.start()
        for _ in both:
            _, samples = answers.get(timeout=300)
            assert all(samples[number] == local.read(number) for number in range(60))
        for process in both:
            process.join()
        assert server.tar_bytes() == sum(shard.bytes for shard in local.shards)


def test_a_reader_killed_while_it_fetches_leaves_the_cache_usable(built, tmp_path):
    local = ShardIndex.load(built)
    with FileServer(built) as server:
        server.stall, server.faults = 300, {".tar": ["slow"]}
        answers = FORK.Queue()
        victim = FORK.Process(target=read_all, args=(server.url, tmp_path, 1, answers))
        victim.start()
        deadline = time.time() + 200
        while server.tar_bytes() == 0 and time.time() < deadline:
            time.sleep(0.01)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        whole = {shard.sha256 for shard in local.shards}
        assert not [path for path in tmp_path.iterdir() if path.name in whole]
        assert list(tmp_path.glob("*.part"))
        read_all(server.url, tmp_path, 2, answers)
        _, samples = answers.get(timeout=300)
        assert all(samples[number] == local.read(number) for number in range(60))
        assert not list(tmp_path.glob("*.part"))


def test_a_cache_smaller_than_the_shards_reads_right_all_the_same(built, tmp_path):
    local = ShardIndex.load(built)
    gb = 2.5 * max(shard.bytes for shard in local.shards) / 1e9
    with FileServer(built) as server:
        answers = FORK.Queue()
        read_all(server.url, tmp_path, 3, answers, gb)
        _, samples = answers.get(timeout=300)
        assert all(samples[number] == local.read(number) for number in range(60))
    assert held(ShardCache(tmp_path, 1)) <= gb * 1e9
