"""Finding sources in parquet files, folders, saved data sets, clones of the hub, LLaVA JSON."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_data import picture

from ldistill.common.samples import Sample, Turn
from ldistill.data.build.build_types import InputOptions
from ldistill.data.build.inputs import open_inputs

FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List(
            {k: datasets.Value("string") for k in ("user", "assistant", "source")}
        ),
    }
)
CONFIGS = """---
configs:
- config_name: docvqa
  data_files:
  - split: train
    path: docvqa/train-*
- config_name: Visual-7W
  data_files:
  - split: train
    path: v7w/train-*
---
# A data set
"""


def row(number, source=None):
    texts = [{"user": f"q{number}", "assistant": f"a{number}", "source": "Display Name"}]
    base = {"images": [{"bytes": picture(seed=number), "path": None}], "texts": texts}
    return base | ({"source": source, "relevance_ratings": [number]} if source else {})


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_rich_parquet(path, rows):
    """As the hub has it: with the schema of `datasets`, so that images would decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(path)


def read(entry, start=0):
    return {number: entry.convert(number, record)[-1] for number, record in entry.rows(start)}


@pytest.fixture
def cauldron(tmp_path):
    """Two configs in folders, one of them in two files."""
    root = tmp_path / "cauldron"
    write_rich_parquet(root / "docvqa/train-00000-of-00002-abc.parquet", [row(0), row(1)])
    write_rich_parquet(root / "docvqa/train-00001-of-00002-abc.parquet", [row(2)])
    write_rich_parquet(root / "docvqa/test-00000-of-00001-abc.parquet", [row(9)])
    write_rich_parquet(root / "v7w/train-00000-of-00001-abc.parquet", [row(3), row(4)])
    return root


def test_a_folder_of_configs(cauldron):
    options = InputOptions(sources=("docvqa",))
    [entry] = open_inputs(str(cauldron), options)
    samples = read(entry)
    assert (entry.source, entry.category, entry.length) == ("docvqa", "document", 3)
    assert [samples[n].turns[0].user for n in range(3)] == ["q0", "q1", "q2"]
    assert samples[2].images == (picture(seed=2),)
    assert entry.bytes > 1000


def test_reading_goes_on_at_any_row(cauldron):
    [entry] = open_inputs(str(cauldron), InputOptions(sources=("docvqa",)))
    whole = read(entry)
    for start in range(4):
        assert read(entry, start) == {n: s for n, s in whole.items() if n >= start}


def test_another_split(cauldron):
    [entry] = open_inputs(str(cauldron), InputOptions(sources=("docvqa",), split="test"))
    assert [s.turns[0].user for s in read(entry).values()] == ["q9"]
    with pytest.raises(FileNotFoundError, match="neither parquet files of the split nope"):
        open_inputs(str(cauldron), InputOptions(split="nope"))


def test_a_clone_of_the_hub_takes_config_names(cauldron):
    (cauldron / "README.md").write_text(CONFIGS)
    inputs = open_inputs(
        str(cauldron),
        InputOptions(sources=("visual_7w", "docvqa"), extra={"visual_7w": "language"}),
    )
    assert [(e.source, e.category) for e in inputs] == [
        ("visual_7w", "language"),
        ("docvqa", "document"),
    ]
    assert [s.turns[0].user for s in read(inputs[0]).values()] == ["q3", "q4"]
    assert read(inputs[0], 1) == {1: read(inputs[0])[1]}
    assert read(inputs[1])[0] == Sample("0", "docvqa", read(inputs[1])[0].turns, (picture(seed=0),))


def test_what_an_input_says_of_itself_is_kept(tmp_path, cauldron):
    """Of the README.md beside it, the object around a list, the saved data set; nothing else."""
    head = "---\nlicense: other\nlicense_name: a-own\nhomepage: https://a.example\n"
    (cauldron / "README.md").write_text(CONFIGS.replace("---\n", head, 1))
    options = InputOptions(sources=("docvqa",))
    said = {"licence": "a-own", "homepage": "https://a.example"}
    assert open_inputs(str(cauldron), options)[0].origin == said
    (cauldron / "README.md").write_text("---\nlicense: [mit, cc0-1.0]\n---\n")
    assert open_inputs(str(cauldron), options)[0].origin == {"licence": "mit, cc0-1.0"}
    for broken in (
        "no head",
        "---\n: : :\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: {}\n---\n",
    ):
        (cauldron / "README.md").write_text(broken)
        assert open_inputs(str(cauldron), options)[0].origin == {}

    record = {"id": 1, "conversations": []}
    path = tmp_path / "own" / "own.json"
    path.parent.mkdir()
    mine = InputOptions(extra={"own": "language"})
    for text, origin in (
        ([record], {}),
        ({"data": [record], "license": "mit", "info": {"year": 2026}}, {"licence": "mit"}),
        ({"data": [record], "license": {"id": 3}}, {}),
    ):
        path.write_text(json.dumps(text))
        assert open_inputs(str(path), mine)[0].origin == origin
    (path.parent / "README.md").write_text("---\nlicense: mit\nhomepage: https://b.example\n---\n")
    assert open_inputs(str(path), mine)[0].origin["homepage"] == "https://b.example"

    table = datasets.Dataset.from_list([row(0)], features=FEATURES)
    table.info.license = "apache-2.0"
    table.save_to_disk(str(tmp_path / "saved" / "vsr"))
    [entry] = open_inputs(str(tmp_path / "saved"), InputOptions())
    assert entry.origin == {"licence": "apache-2.0"}


def test_one_parquet_file_is_named_by_its_stem_or_folder(tmp_path, cauldron):
    write_parquet(tmp_path / "vsr.parquet", [row(0)])
    [plain] = open_inputs(str(tmp_path / "vsr.parquet"), InputOptions())
    assert plain.source == "vsr"
    file = next((cauldron / "docvqa").glob("train-00001*"))
    [inside] = open_inputs(str(file), InputOptions())
    assert (inside.source, inside.length) == ("docvqa", 1)
    [folder] = open_inputs(str(cauldron / "docvqa"), InputOptions())
    assert (folder.source, folder.length) == ("docvqa", 3)


def test_finevision_rows_go_to_the_source_they_name(tmp_path):
    rows = [row(n, "AOKVQA" if n % 3 else "Doc VQA") for n in range(7)]
    write_parquet(tmp_path / "part.parquet", rows)
    extra = {"doc_vqa": "document"}
    options = InputOptions(extra=extra, min_ratings={"relevance": 5})
    language, document = sorted(open_inputs(str(tmp_path), options), key=lambda e: e.source)
    assert (language.source, document.source) == ("aokvqa", "doc_vqa")
    assert list(read(language)) == [1, 2, 4, 5]
    assert isinstance(read(language)[5], Sample)
    assert read(language)[4].reason == "rating below the minimum"
    assert list(read(document, 2)) == [3, 6]


def test_saved_data_sets(tmp_path):
    data = datasets.Dataset.from_list([row(0), row(1)], features=FEATURES)
    data.save_to_disk(tmp_path / "vsr")
    [single] = open_inputs(str(tmp_path / "vsr"), InputOptions())
    assert (single.source, single.length) == ("vsr", 2)
    assert read(single, 1)[1].images == (picture(seed=1),)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "both/docvqa")
    data.save_to_disk(tmp_path / "both/vsr")
    assert {e.source for e in open_inputs(str(tmp_path / "both"), InputOptions())} == {
        "docvqa",
        "vsr",
    }
    with pytest.raises(ValueError, match="no split test; it has train"):
        open_inputs(str(tmp_path / "both"), InputOptions(split="test"))


def test_llava_json_by_stem_and_by_record(tmp_path):
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"id": n, "conversations": said} for n in range(5)]
    records[2]["source"] = records[4]["source"] = "Chart QA/v2"
    path = tmp_path / "receipts.json"
    path.write_text(json.dumps(records))
    extra = {"receipts": "document", "chart_qa_v2": "document"}
    first, second = open_inputs(str(path), InputOptions(extra=extra))
    assert (first.source, list(read(first))) == ("receipts", [0, 1, 3])
    assert (second.source, list(read(second, 3))) == ("chart_qa_v2", [4])
    with pytest.raises(ValueError, match="unknown source 'receipts'"):
        open_inputs(str(path), InputOptions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON of records"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ('{"data": 3}', "must hold a list"),
        ('[{"text": "a"}]', "no conversations as --format auto"),
    ],
)
def test_broken_llava_files(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_inputs(str(tmp_path / "a.json"), InputOptions())


def test_missing_inputs_are_named(tmp_path):
    for name in ("gone.json", "gone.parquet", "gone"):
        with pytest.raises(FileNotFoundError, match=f"no data set at .*{name}"):
            open_inputs(str(tmp_path / name), InputOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither parquet files of the split train nor"):
        open_inputs(str(tmp_path / "empty"), InputOptions())


def test_a_hub_id_without_a_hub_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no data set at someone/something: it is no local"):
        open_inputs("someone/something", InputOptions())


def test_sources_that_are_missing_or_unknown(cauldron):
    with pytest.raises(ValueError, match="has no source chartqa; it has docvqa, v7w"):
        open_inputs(str(cauldron), InputOptions(sources=("docvqa", "chartqa")))
    with pytest.raises(ValueError, match="unknown source 'v7w'"):
        open_inputs(str(cauldron), InputOptions())


def test_options_that_do_not_fit_the_input(cauldron, tmp_path):
    with pytest.raises(ValueError, match=r"as --format csv knows.*; formats are cauldron, fine"):
        open_inputs(str(cauldron), InputOptions(("docvqa",), format="csv"))
    with pytest.raises(ValueError, match="carries no beauty_ratings: leave --min-rating out"):
        open_inputs(str(cauldron), InputOptions(("docvqa",), min_ratings={"beauty": 2}))
    with pytest.raises(ValueError, match="carries no relevance_ratings"):
        open_inputs(str(cauldron), InputOptions(("docvqa",), min_ratings={"relevance": 2}))
    with pytest.raises(ValueError, match="no conversations as --format llava knows them"):
        open_inputs(str(cauldron), InputOptions(("docvqa",), format="llava"))
    write_parquet(tmp_path / "vsr.parquet", [{"image": 1}])
    with pytest.raises(ValueError, match=r"vsr carries no conversations.* It has image;"):
        open_inputs(str(tmp_path / "vsr.parquet"), InputOptions())


def test_identity_follows_the_content_not_the_place(tmp_path):
    for folder, number in (("a", 0), ("b", 0), ("c", 1)):
        write_parquet(tmp_path / folder / "vsr.parquet", [row(number)])
    a, b, c = (
        open_inputs(str(tmp_path / f / "vsr.parquet"), InputOptions())[0].identity for f in "abc"
    )
    assert a == b != c


def test_a_failing_stream_says_where_and_what_to_do(tmp_path):
    path = tmp_path / "vsr.parquet"
    write_parquet(path, [row(n) for n in range(3)])
    [entry] = open_inputs(str(path), InputOptions())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(OSError, match=r"failed near row 0 .*run the same command again"):
        read(entry)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_json_as_list_as_lines_and_gzipped(tmp_path, name):
    """Lines under the name of a list are read too; a broken one is a record that is malformed."""
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"id": n, "conversations": said} for n in range(3)]
    lines = "\n".join([*map(json.dumps, records), "", "{broken"]).encode()
    texts = {"list": json.dumps(records).encode(), "lines": lines}
    texts["data"] = json.dumps({"version": 1, "data": records}).encode()
    for kind, text in texts.items():
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        [entry] = open_inputs(str(tmp_path / name), InputOptions(extra={"a": "language"}))
        samples = read(entry)
        assert [samples[n].turns for n in range(3)] == [(Turn("q", "a"),)] * 3
        assert len(samples) == 3 + (kind == "lines")
        assert kind != "lines" or samples[3].detail == "no object: '{broken'"
    (tmp_path / "one.jsonl").write_text(json.dumps(records[0]) + "\n")
    assert (
        len(open_inputs(str(tmp_path / "one.jsonl"), InputOptions(extra={"one": "language"}))) == 1
    )


def test_a_broken_archive_is_a_sentence(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[1, 2]" * 99)[:-9])
    with pytest.raises(ValueError, match=r"a\.json\.gz is not JSON of records"):
        open_inputs(str(tmp_path / "a.json.gz"), InputOptions())


def test_text_only_chat_in_parquet_is_one_source(tmp_path):
    """SmolTalk's and Tulu 3's layout; what their column `source` names are no sources here."""
    rows = [
        {
            "id": f"r{n}",
            "source": f"part/{n}",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": f"a{n}"},
            ],
        }
        for n in range(3)
    ]
    write_parquet(tmp_path / "SmolTalk" / "train-00000-of-00001.parquet", rows)
    extra = {"smoltalk": "language"}
    [entry] = open_inputs(str(tmp_path / "SmolTalk"), InputOptions(extra=extra))
    samples = read(entry)
    assert (entry.source, entry.identity["format"]) == ("smoltalk", "chat")
    expected = Sample("r2", "smoltalk", (Turn("q2", "a2"),), system="Be brief.")
    assert samples[2] == expected


def test_typed_parts_and_pictures_in_parquet(tmp_path):
    parts = [{"type": "text", "text": "Is "}, {"type": "image", "text": None}]
    said = [{"role": "user", "content": parts}]
    said.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
    images = [{"bytes": picture(), "path": None}]
    write_parquet(tmp_path / "vsr.parquet", [{"messages": said, "images": images}])
    [entry] = open_inputs(str(tmp_path / "vsr.parquet"), InputOptions())
    assert read(entry)[0].turns == (Turn("Is ", "yes", (3,)),)
    assert read(entry)[0].images == (picture(),)
