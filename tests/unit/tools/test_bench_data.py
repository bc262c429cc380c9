"""`ldistill bench data`: every loader gives the same documents, numbers add up, growth is real."""

import csv

import numpy as np
import psutil
import pytest
import torch
from helpers_data import make_processor, make_samples, make_student
from typer.testing import CliRunner

from ldistill.cli import app
from ldistill.common.samples import Sample, Turn
from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.data.index import ShardIndex
from ldistill.models.formats import load_processor
from ldistill.tools.bench.data import (
    LOADERS,
    LoaderSetup,
    bench_data,
    cpu_seconds,
    grown,
    measure,
    worker_memory,
)
from ldistill.tools.bench.report import SPEED, table

SMALL = BuildOptions(shard_bytes=40_000)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    build_shards({"docvqa": make_samples("docvqa", 80)}, root, make_processor(), options=SMALL)
    return root


@pytest.fixture(scope="module")
def setup(built):
    return LoaderSetup(ShardIndex.load(built), make_processor(), batch=4, limit=512, buffer=8)


@pytest.mark.parametrize(
    ("name", "workers"), [("ours", 0), ("ours", 2), ("webdataset", 0), ("datasets", 0)]
)
def test_every_loader_gives_every_document_of_an_epoch(setup, name, workers):
    expected = sorted(
        setup.processor.encode(setup.index.read(n).turns, [(1, 1)]).input_ids.tobytes()
        for n in range(len(setup.index))
    )
    seen, pixels = [], 0
    for batch in LOADERS[name](setup, workers):
        pixels += len(batch["pictures"]["pixel_values"])
        for row, length in enumerate(batch["doc_length"].tolist()):
            seen.append(batch["input_ids"][row, :length].numpy().astype(np.int32).tobytes())
        if len(seen) >= len(setup.index):
            break
    assert sorted(seen) == expected
    assert pixels == len(seen)


@pytest.mark.parametrize("name", ["webdataset", "datasets"])
def test_pictures_are_decoded_alike(setup, name):
    mine = {
        t.numpy().tobytes()
        for batch in _first(setup, "ours")
        for t in batch["pictures"]["pixel_values"]
    }
    theirs = {
        t.numpy().tobytes()
        for batch in _first(setup, name)
        for t in batch["pictures"]["pixel_values"]
    }
    assert mine == theirs


def _first(setup, name):
    batches = iter(LOADERS[name](setup, 0))
    return [next(batches) for _ in range(len(setup.index) // setup.batch)]


def test_several_pictures_and_none(tmp_path):
    processor = make_processor(max_images=2)
    samples = make_samples("vsr", 8, images=2)
    build_shards({"vsr": samples}, tmp_path, processor, options=SMALL)
    setup = LoaderSetup(ShardIndex.load(tmp_path), processor, batch=8, limit=512, buffer=1)
    [batch] = [next(iter(LOADERS["webdataset"](setup, 0)))]
    assert len(batch["pictures"]["pixel_values"]) == 16
    text = tmp_path / "text"
    build_shards({"vsr": [Sample("a", "vsr", (Turn("q", "a"),))]}, text, processor)
    setup = LoaderSetup(ShardIndex.load(text), processor, batch=1, limit=512, buffer=1)
    assert next(iter(LOADERS["webdataset"](setup, 0)))["pictures"] == {}


def test_numbers_are_of_what_was_measured(setup):
    told = []
    results = bench_data(
        setup,
        loaders=("ours", "ours-packed", "webdataset"),
        workers=(0, 2),
        seconds=0.3,
        rounds=1,
        say=told.append,
    )
    assert [(r["workers"], r["loader"]) for r in results] == [
        (count, name) for count in (0, 2) for name in ("ours", "ours-packed", "webdataset")
    ]
    mean = float(setup.index.lengths.mean())
    for result in results:
        assert not result["failure"]
        assert result["samples_per_s"] > 0
        assert result["cpu_ms"] >= 0
        assert 0.5 * mean < result["tokens_per_s"] / result["samples_per_s"] < 2 * mean
        if result["loader"] == "webdataset":
            assert (result["speed_ratio"], result["cpu_ratio"]) == (1, 1)
        assert 1 < result["own_mib"] <= result["rss_mib"]
    assert len(told) == 6


def test_another_librarys_failure_is_told_and_ours_is_raised(setup, monkeypatch):
    working = LOADERS["datasets"]

    def fails(setup, workers):
        raise RuntimeError("no such luck\nmore")

    monkeypatch.setitem(LOADERS, "datasets", fails)
    options = {"workers": (0,), "seconds": 0.1, "rounds": 2, "say": print}
    [result] = bench_data(setup, loaders=("datasets",), **options)
    assert result["failure"] == "RuntimeError: no such luck"
    assert "RuntimeError: no such luck" in table("", [result], SPEED).markdown()
    calls = []

    def fails_later(setup, workers):
        calls.append(workers)
        return working(setup, workers) if len(calls) < 2 else fails(setup, workers)

    monkeypatch.setitem(LOADERS, "datasets", fails_later)
    rows = bench_data(setup, loaders=("webdataset", "datasets"), **options)
    assert "| RuntimeError: no such luck |" in table("", rows, SPEED).markdown()
    monkeypatch.setitem(LOADERS, "ours", fails)
    with pytest.raises(RuntimeError):
        bench_data(setup, loaders=("ours",), **options)
    with pytest.raises(ValueError, match="whole shards to workers"):
        measure(setup, "webdataset", 1000, 0.1)


def test_a_grown_index_reads_the_same_samples_from_more_shards(setup, tmp_path):
    larger = grown(setup, 3, tmp_path / "grown")
    count = len(setup.index)
    assert (len(larger.index), len(larger.index.shards)) == (3 * count, 3 * len(setup.index.shards))
    for sample in (0, 17, count - 1):
        for copy in range(3):
            assert larger.index.read(sample + copy * count) == setup.index.read(sample)
    larger.index.check_files()
    batch = next(iter(LOADERS["ours"](larger, 0)))
    assert isinstance(batch["input_ids"], torch.Tensor)


@pytest.mark.slow
def test_a_workers_memory_does_not_grow_with_the_shards(setup, tmp_path):
    """A thousand times the samples; the table of the index alone would be 3.7 MB a worker."""
    own = []
    for factor in (1, 1000):
        larger = grown(setup, factor, tmp_path / str(factor))
        own.append(measure(larger, "ours", 2, 1.0)["own_mib"])
    assert own[1] < own[0] + 16


def test_processes_can_be_asked_for_time_and_memory():
    process = psutil.Process()
    before = cpu_seconds([process])
    sum(n * n for n in range(300_000))
    assert cpu_seconds([process, process]) >= 2 * before
    own, resident = worker_memory(process)
    assert 1 < own <= resident


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--loaders", "ours,theirs", "must be among ours,ours-packed,webdataset,datasets, got"),
        ("--workers", "0,two", "workers must be numbers from 0, by commas, got '0,two'"),
        ("--grow", "-1", "grow must be numbers from 0"),
    ],
)
def test_values_that_a_flag_cannot_have_are_named(flag, value, message):
    result = CliRunner().invoke(app, ["bench", "data", "nowhere", flag, value])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_command(tmp_path):
    student = make_student(tmp_path / "student")
    build_shards(
        {"vsr": make_samples("vsr", 30)},
        tmp_path / "shards",
        load_processor(student),
        options=SMALL,
    )
    command = ["bench", "data", str(tmp_path / "shards"), "--student", str(student)]
    command += ["--workers", "0", "--seconds", "0.2", "--rounds", "1", "--batch", "4"]
    command += ["--loaders", "ours,webdataset", "--grow", "1,4", "--max-length", "512"]
    command += ["--csv", str(tmp_path / "out.csv"), "--plot", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "memory of one worker as shards grow" in result.output
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["loader"], r["workers"], r["samples"]) for r in rows] == [
        ("ours", "0", "30"),
        ("webdataset", "0", "30"),
        ("ours", "2", "30"),
        ("ours", "2", "120"),
        ("webdataset", "2", "30"),
        ("webdataset", "2", "120"),
    ]
    assert float(rows[0]["samples_per_s"]) > 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
