"""Slices of a source, built anywhere in any order, joined: the bytes of one machine's build."""

import json
import random
import shutil
from dataclasses import replace

import datasets
import pytest
from helpers_data import digests, make_processor, make_samples, make_student, picture
from typer.testing import CliRunner

from ldistill.common.samples import Drop, Sample, Turn
from ldistill.data.archive import read_range
from ldistill.data.build import slices
from ldistill.data.build.build_types import BuildOptions, SourceInput
from ldistill.data.build.builder import build
from ldistill.data.build.slices import Slice, build_slice, join_slices
from ldistill.data.build.workers import keep
from ldistill.data.index import ShardIndex
from ldistill.tools.shards.commands import app

SMALL = BuildOptions(shard_bytes=30_000)


def entry(samples, source="vsr", first_row=0):
    """An input whose rows are samples at hand, numbered from `first_row` in steps of one."""

    def rows(start):
        return ((n, s) for n, s in enumerate(samples, first_row) if n >= start)

    end = first_row + len(samples)
    said = {"licence": "cc-by-4.0", "homepage": "https://vsr.example"}
    return SourceInput(
        source, "language", rows, keep, {"version": 1}, end, rows_end=end, origin=said
    )


def samples_with_drops(count, seed):
    """Samples of which some are dropped, by the reader and by the builder."""
    rng, made = random.Random(seed), make_samples("vsr", count, seed=seed)
    for number in range(count):
        if rng.random() < 0.2:
            made[number] = rng.choice(
                [
                    Drop("malformed record", str(number)),
                    Sample(str(number), "vsr", (Turn("q", "a"),), (b"no picture",)),
                ]
            )
    return made


def build_in_slices(inputs, out, count, seed=0, options=SMALL):
    numbers = list(range(1, count + 1))
    random.Random(seed).shuffle(numbers)
    for number in numbers:
        build_slice(inputs, out, make_processor(), options, Slice(number, count))


@pytest.mark.parametrize(("rows", "count"), [(40, 1), (40, 3), (57, 7), (5, 9)])
def test_the_joined_bytes_are_those_of_one_build(tmp_path, rows, count):
    inputs = [
        entry(samples_with_drops(rows, seed=rows)),
        entry(make_samples("docvqa", rows // 2 + 1), "docvqa", first_row=11),
    ]
    expected = build(inputs, tmp_path / "one", make_processor(), SMALL)
    build_in_slices(inputs, tmp_path / "many", count)
    assert join_slices(tmp_path / "many") == sorted(expected, key=lambda r: r.source)
    assert digests(tmp_path / "many") == digests(tmp_path / "one")
    assert len(ShardIndex.load(tmp_path / "many")) == sum(r.samples for r in expected)
    assert join_slices(tmp_path / "many") == []
    # A task that starts again after the join finds its work done.
    build_in_slices(inputs, tmp_path / "many", count)
    assert digests(tmp_path / "many") == digests(tmp_path / "one")


def test_a_killed_join_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    inputs = [entry(make_samples("vsr", 60))]
    build(inputs, tmp_path / "one", make_processor(), SMALL)
    build_in_slices(inputs, tmp_path / "many", 4)
    done = []

    def stop_at_40(*place):
        done.append(place)
        if len(done) == 40:
            raise KeyboardInterrupt
        return read_range(*place)

    with monkeypatch.context() as patch:
        patch.setattr(slices, "read_range", stop_at_40)
        with pytest.raises(KeyboardInterrupt):
            join_slices(tmp_path / "many")
    [report] = join_slices(tmp_path / "many")
    assert report.kept_shards > 1
    assert digests(tmp_path / "many") == digests(tmp_path / "one")


def test_missing_damaged_and_foreign_slices_are_named(tmp_path):
    inputs = [entry(make_samples("vsr", 30))]
    with pytest.raises(FileNotFoundError, match="no slices in"):
        join_slices(tmp_path)
    for number in (1, 3):
        build_slice(inputs, tmp_path, make_processor(), SMALL, Slice(number, 4))
    with pytest.raises(ValueError, match=r"slices that are not built, 2, 4 of 4: .*--slice 2/4"):
        join_slices(tmp_path)
    with pytest.raises(FileNotFoundError, match="shards merge"):
        ShardIndex.load(tmp_path)
    other = [replace(inputs[0], identity={"version": 2})]
    for number, source in ((2, inputs), (4, other)):
        build_slice(source, tmp_path, make_processor(), SMALL, Slice(number, 4))
    with pytest.raises(ValueError, match="0004-of-0004/vsr is of another input"):
        join_slices(tmp_path)
    shutil.rmtree(tmp_path / ".slices/0004-of-0004")
    build_slice(inputs, tmp_path, make_processor(), SMALL, Slice(4, 4))
    tar = next(tmp_path.glob(".slices/0002-of-0004/vsr/*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"changed since.*--slice 2/4 --overwrite"):
        join_slices(tmp_path)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_bad_slices(text):
    with pytest.raises(ValueError, match="bad slice"):
        Slice.parse(text)


def test_what_cannot_be_cut(tmp_path):
    unknown = [replace(entry(make_samples("vsr", 3)), rows_end=None)]
    with pytest.raises(ValueError, match="does not say how many rows"):
        build_slice(unknown, tmp_path, make_processor(), SMALL, Slice(1, 2))
    limited = replace(SMALL, max_samples=2)
    with pytest.raises(ValueError, match=r"vsr cannot be cut into slices: --max-samples"):
        build_slice([entry([])], tmp_path, make_processor(), limited, Slice(1, 2))


def test_commands_on_parquet_and_llava_files(tmp_path):
    """Rows that name their source, in one parquet file; and a LLaVA file of two sources."""
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({k: datasets.Value("string") for k in ("user", "assistant")}),
            "source": datasets.Value("string"),
        }
    )
    rows, records = [], []
    for number in range(23):
        data, source = picture(seed=number), ("vsr", "docvqa", "vsr")[number % 3]
        texts = [{"user": f"q{number}", "assistant": "a " * number + "b"}]
        rows.append({"images": [{"bytes": data, "path": None}], "texts": texts, "source": source})
        (tmp_path / f"{number}.png").write_bytes(data)
        talk = [{"from": "human", "value": f"<image>q{number}"}, {"from": "gpt", "value": "yes"}]
        records.append(
            {"id": f"{number}", "image": f"{number}.png", "conversations": talk, "source": source}
        )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "mixed.parquet")
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    student = make_student(tmp_path / "student")
    for kind in ("parquet", "json"):
        common = ["build", "--dataset", tmp_path / f"mixed.{kind}", "--student", student]
        common += ["--workers", 1, "--shard-size", "8KB", "--out"]
        one, many = tmp_path / f"{kind}-one", tmp_path / f"{kind}-many"
        run(*common, one)
        for number in (2, 1, 3):
            run(*common, many, "--slice", f"{number}/3")
        assert "│ vsr" in run("merge", many)
        assert "it is done" in run("merge", many)
        assert digests(many) == digests(one)
        assert len(list(one.glob("vsr/*.tar"))) > 2


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output
