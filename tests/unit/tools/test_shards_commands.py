"""`shards build | verify | stats` as a user runs them, on data made in the public formats."""

import base64
import io
import json
import re

import datasets
import numpy as np
import pytest
from helpers_data import make_processor, make_student, picture, table5_lengths, write_fake_index
from PIL import Image
from typer.testing import CliRunner

from ldistill import cli
from ldistill.common.errors import exit_code
from ldistill.common.samples import Turn
from ldistill.data.index import ShardIndex
from ldistill.data.loader import make_loader
from ldistill.models.formats import load_processor
from ldistill.tools.shards.commands import app, parse_ratings, parse_size
from ldistill.tools.shards.stats import plot_lengths, source_stats

FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List(
            {k: datasets.Value("string") for k in ("user", "assistant", "source")}
        ),
    }
)


def run(*arguments, code=0):
    """What a command prints, with the sentence that `ldistill.cli.main` makes of a mistake."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(error := result.exception, (ValueError, OSError)):
        assert exit_code(error) == code
        return f"{result.output}error: {error}"
    assert result.exit_code == code, result.output
    return result.output


def one_line(text):
    return re.sub(r"\s+", " ", text)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def cauldron(tmp_path_factory):
    """Two sources in The Cauldron's layout; one picture of docvqa is broken."""
    root = tmp_path_factory.mktemp("cauldron")
    for source, count in (("docvqa", 12), ("vsr", 7)):
        rows = []
        for number in range(count):
            data = b"broken" if (source, number) == ("docvqa", 3) else picture(seed=number)
            texts = [{"user": f"q{number}", "assistant": "a " * number + "b", "source": "Shown"}]
            rows.append({"images": [{"bytes": data, "path": None}], "texts": texts})
        folder = root / source
        folder.mkdir()
        data = datasets.Dataset.from_list(rows, features=FEATURES)
        data.to_parquet(folder / "train-00000-of-00001-0a.parquet")
    return root


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Receipts in LLaVA's layout; the picture of the last one is missing."""
    root = tmp_path_factory.mktemp("llava")
    records = []
    for number in range(6):
        said = ["<image>\nTotal?", f"{number}.00", "Date?", "3 May"]
        talk = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
        records.append({"id": f"r{number}", "image": f"{number}.jpg", "conversations": talk})
        if number < 5:
            (root / f"{number}.jpg").write_bytes(picture(kind="JPEG", seed=number))
    (root / "receipts.json").write_text(json.dumps(records))
    return root / "receipts.json"


def test_build_verify_stats_and_train(cauldron, student, tmp_path):
    out = tmp_path / "shards"
    common = ("--student", student, "--workers", 1, "--shard-size", "10KB")
    printed = run("build", "--dataset", cauldron, "--sources", "vsr,docvqa", "--out", out, *common)
    assert re.search(r"docvqa +│ document +│ +11 .*1 undecodable image", printed)
    assert re.search(r"vsr +│ language +│ +7 .*none", printed)
    assert "18 samples: 0 problems" in run("verify", out, "--workers", 1)
    table = run("stats", out, "--plot", tmp_path / "lengths.png")
    assert re.search(r"all +│ +│ +18 ", table)
    assert "18 of 18 samples" in table
    assert Image.open(tmp_path / "lengths.png").format == "PNG"

    index, processor = ShardIndex.load(out), load_processor(student)
    size = len(index)
    loader = make_loader(index, processor, limit=128, batch_size=2, packing=False, stop_pack=size)
    assert sorted(s for batch in loader for s in batch["doc_sample"].tolist()) == list(range(size))


def test_build_again_keeps_what_is_there(llava, student, tmp_path):
    extra = ("--extra-sources", "receipts=document")
    command = ("build", "--dataset", llava, "--out", tmp_path, "--student", student, *extra)
    first = run(*command, "--workers", 1, "--shard-size", "4KB")
    assert re.search(r"receipts +│ document +│ +5 .*1 missing image", first)
    assert "(5 kept)" in run(*command, "--workers", 1, "--shard-size", "4KB")
    refused = run(*command, "--workers", 1, "--shard-size", "9KB", code=2)
    assert "of another input or other options" in one_line(refused)
    assert "kept" not in run(*command, "--workers", 1, "--shard-size", "9KB", "--overwrite")
    assert ShardIndex.load(tmp_path).categories == ["document"]


def test_tiling_and_max_images_reach_the_shards(llava, student, tmp_path):
    extra = ("--extra_sources", "receipts=language", "--workers", 1)
    tiled = ("--tiling", "--max-images", 3)
    run("build", "--dataset", llava, "--out", tmp_path, "--student", student, *extra, *tiled)
    index = ShardIndex.load(tmp_path)
    assert (index.image_settings["tiling"], index.image_settings["max_images"]) == (True, 3)
    assert set(index.samples["tiles"].tolist()) == {13}
    index.check(load_processor(student, tiling=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sources", "docvqa,nope"), "unknown source 'nope'"),
        (("--sources", "full"), "has no source aokvqa"),
        (("--format", "csv"), "no conversations as --format csv knows them"),
        (("--shard-size", "much"), "bad size 'much'"),
        (("--min-rating", "relevance=high"), "bad rating 'relevance=high'"),
        (("--min-rating", "beauty=3"), "carries no beauty_ratings: leave --min-rating out"),
        (("--min-rating", "relevance=3"), "carries no relevance_ratings"),
        (("--extra-sources", "own"), "write name=language or name=document"),
        (("--split", "test"), "neither parquet files of the split test"),
    ],
)
def test_wrong_options_end_in_one_sentence(cauldron, student, tmp_path, arguments, message):
    out = tmp_path / "out"
    printed = run(
        "build", "--dataset", cauldron, "--out", out, "--student", student, *arguments, code=2
    )
    assert printed.startswith("error: ")
    assert message in printed
    assert not out.exists()


def test_verify_fails_on_damage(llava, student, tmp_path):
    extra = ("--extra-sources", "receipts=document", "--workers", 1)
    run("build", "--dataset", llava, "--out", tmp_path, "--student", student, *extra)
    tar = tmp_path / "receipts/receipts-train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1500])
    printed = run("verify", tmp_path, "--workers", 1, code=1)
    assert "bytes instead of" in printed
    assert "error: no shards in" in run("verify", tmp_path / "receipts", code=2)
    assert "error: no shards" in run("stats", tmp_path / "gone", code=2)
    assert "error: " in run("merge", tmp_path / "gone", code=2)


def test_a_mistake_and_an_interruption_are_sentences_with_their_codes(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "settle_environment", lambda: None)  # of this process
    monkeypatch.setattr("sys.argv", ["ldistill", "shards", "merge", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: no slices in {tmp_path}")

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldistill.tools.shards.commands.join_slices", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "interrupted: run the same command again to go on" in capsys.readouterr().err


def test_what_a_rating_leaves_out_is_said(student, tmp_path):
    """Two turns below the minimum; one of them was the only one of its sample."""
    rated = [[5, 1], [2], [4, 5]]
    features = datasets.Features(
        FEATURES
        | {
            "source": datasets.Value("string"),
            "relevance_ratings": datasets.List(datasets.Value("int64")),
        }
    )
    rows = [
        {
            "images": [{"bytes": picture(seed=n), "path": None}],
            "texts": [{"user": "q", "assistant": "a", "source": "s"}] * len(ratings),
            "source": "vsr",
            "relevance_ratings": ratings,
        }
        for n, ratings in enumerate(rated)
    ]
    folder = tmp_path / "data" / "vsr"
    folder.mkdir(parents=True)
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(folder / "train-00000-of-00001-0a.parquet")
    command = ("build", "--dataset", tmp_path / "data", "--student", student, "--workers", 1)
    printed = run(*command, "--out", tmp_path / "a", "--min-rating", "relevance=3")
    assert (
        "--min-rating relevance=3 left out turns rated lower: 2. Samples without another turn, "
        "dropped with them: 1 (vsr 1)." in printed
    )
    printed = run(*command, "--out", tmp_path / "b", "--min-rating", "relevance=1")
    assert "--min-rating relevance=1 left nothing out." in printed


def test_a_report_a_person_can_act_on(student, tmp_path):
    """A source that fails beside one that is built; what was dropped, where first; what is long."""
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    lone = [{"from": "tool", "value": "x"}, *said]
    long = [said[0], {"from": "gpt", "value": "word " * 2000}]
    records = [
        {"id": "r0", "conversations": said, "source": "mine-v1.5"},
        {"id": "r1", "conversations": lone, "source": "mine-v1.5"},
        {"id": "r2", "conversations": long, "source": "mine-v1.5"},
        {"id": "r3", "image": "gone.png", "conversations": said, "source": "other"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    extra = ("--extra-sources", "mine_v1_5=language", "--extra-sources", "other=document")
    command = ("build", "--dataset", tmp_path / "a.jsonl", "--student", student, "--workers", 1)
    printed = run(*command, *extra, "--out", tmp_path / "out", code=2)
    assert re.search(r"mine_v1_5 +│ language +│ +2 .*1 malformed record", printed)
    assert (
        "mine_v1_5: malformed record: first in record r1 (ValueError: roles tool, user" in printed
    )
    assert "error: not built: other\nother: no usable sample of other (dropped: 1 miss" in printed
    assert "gone.png: No such file" in printed
    command = (*command, "--sources", "mine-v1.5", *extra, "--out", tmp_path / "out")
    assert "1 documents are longer than 1,024 tokens, the longest mine_v1_5-000000002" in run(
        *command
    )


def test_a_dry_run_shows_samples_as_the_model_will_see_them(llava, student, tmp_path):
    out = tmp_path / "out"
    extra = ("--extra-sources", "receipts=document", "--dry-run", 2)
    printed = run("build", "--dataset", llava, "--out", out, "--student", student, *extra)
    assert f"open {out / 'dry_run.html'}: the first 2 samples of each source" in printed
    assert [path.name for path in out.iterdir()] == ["dry_run.html"]
    page = (out / "dry_run.html").read_text()
    processor = load_processor(student)
    turns = (Turn("Total?", "1.00"), Turn("Date?", "3 May"))
    document = processor.encode(turns, [(1, 1)])
    counts = f"<h3>r1: {len(document.input_ids)} tokens, {document.supervised} of them learnt</h3>"
    assert counts in page
    assert "<h3>r2" not in page
    learnt = re.findall(r'<span class="learnt">(.*?)</span>', page.partition(counts)[2], re.S)
    assert "".join(learnt) == "1.00&lt;|im_end|&gt;\n3 May&lt;|im_end|&gt;\n"
    assert f"&lt;|image|&gt; × {processor.images.tokens_per_tile} " in page
    shown = re.findall(r'<img src="data:image/png;base64,([^"]*)">', page)
    assert len(shown) == 2
    image = processor.load_image(picture(kind="JPEG", seed=1))
    tile = processor.pictures([image])["pixel_values"]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(shown[1])))) / 255
    np.testing.assert_allclose(pixels, tile[0].permute(1, 2, 0), atol=0.5 / 255)


def test_a_dry_run_says_what_it_drops(llava, student, tmp_path):
    extra = ("--extra-sources", "receipts=document", "--dry-run", 9)
    run("build", "--dataset", llava, "--out", tmp_path, "--student", student, *extra)
    page = (tmp_path / "dry_run.html").read_text()
    assert "record r5: dropped, missing image. 5.jpg: No such file or directory" in page


def test_the_command_that_trains_on_own_sources_is_said(llava, student, tmp_path):
    extra = ("--extra-sources", "receipts=document", "--workers", 1)
    printed = run("build", "--dataset", llava, "--out", tmp_path, "--student", student, *extra)
    assert f"--recipe mine --shards {tmp_path}" in one_line(printed)


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256_000_000), ("1g", 10**9), ("4096", 4096), ("1.5 kb", 1500)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "1TB", "1 2"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="bad size"):
        parse_size(text)


def test_ratings():
    assert parse_ratings(["relevance=3", "formatting = 2"]) == {"relevance": 3, "formatting": 2}


# statistics --------------------------------------------------------------------------------------


def test_statistics_are_table_5s(tmp_path):
    lengths = np.array([10, 20, 30, 40, 2000])
    write_fake_index(tmp_path, "vsr", lengths, 3)
    write_fake_index(tmp_path, "vqav2", np.array([1024, 1025]), 3)
    index = ShardIndex.load(tmp_path, ["vsr", "vqav2"])
    first, second, both = source_stats(index, limit=1024)
    assert (first.source, first.samples, first.mean, first.median) == ("vsr", 5, 420.0, 30.0)
    assert (first.max, first.over) == (2000, 0.2)
    assert first.p95 == pytest.approx(40 + 0.8 * (2000 - 40))
    assert second.over == 0.5
    assert (both.source, both.samples, both.over) == ("all", 7, 2 / 7)


def test_statistics_of_sources_beyond_the_limit_are_still_printed(tmp_path):
    write_fake_index(tmp_path, "vsr", np.array([3000, 4000]), 3)
    printed = run("stats", tmp_path, code=2)
    assert re.search(r"vsr .* 3500 .* 100.0%", printed)
    assert "no document of vsr fits the limit of 1024 tokens" in one_line(printed)


def test_statistics_show_what_a_mixture_reads(tmp_path):
    write_fake_index(tmp_path, "vsr", np.full(10, 30), 5)
    write_fake_index(tmp_path, "vqav2", np.full(40, 60), 9)
    printed = run("stats", tmp_path, "--mix", "vsr=2,vqav2=60%")
    assert re.search(r"vsr +│ +2 │ +20 │ +600 │ +40.0%", printed)
    assert re.search(r"vqav2 +│ +0.375 │ +15 │ +900 │ +60.0%", printed)
    refused = run("stats", tmp_path, "--mix", "vsr=90%", code=2)
    assert "error: mix vsr=90% of an epoch's 24,000 tokens is 72 times what it has" in refused


def test_text_only_leaves_image_tokens_out(cauldron, student, tmp_path):
    common = ("--sources", "vsr", "--workers", 1, "--student", student)
    run("build", "--dataset", cauldron, "--out", tmp_path, *common)
    index, processor = ShardIndex.load(tmp_path), make_processor()
    [whole] = source_stats(index, 1024)
    [text] = source_stats(index, 1024, text_only=True)
    assert whole.mean - text.mean == processor.images.tokens_per_tile


def test_histogram_is_drawn(tmp_path):
    write_fake_index(tmp_path, "vsr", table5_lengths(2000), 500)
    plot_lengths(ShardIndex.load(tmp_path), tmp_path / "a.png", 1024)
    pixels = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
