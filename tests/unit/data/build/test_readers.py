"""Each public format: one record in, one Sample or one counted Drop out."""

import pickle

import pytest
from helpers_data import picture

from ldistill.common.samples import Drop, Sample, Turn
from ldistill.data.build.readers import (
    RATINGS,
    Cauldron,
    FineVision,
    LlavaJson,
    check_ratings,
    detect_format,
)

DATA = picture()


def cauldron_row(*answers, images=({"bytes": DATA, "path": None},)):
    texts = [{"user": f"q{i}", "assistant": a, "source": "A-OKVQA"} for i, a in enumerate(answers)]
    return {"images": list(images), "texts": texts}


def finevision_row(answers, **ratings):
    row = cauldron_row(*answers) | {"source": "aokvqa"}
    for name in RATINGS:
        row[f"{name}_ratings"] = ratings.get(name, [5] * len(answers))
        row[f"{name}_min"] = min(x for x in [*row[f"{name}_ratings"], 5] if x is not None)
    return row


def llava_record(*messages, **fields):
    roles = ("human", "gpt")
    said = [{"from": roles[i % 2], "value": text} for i, text in enumerate(messages)]
    return {"id": "r1", "conversations": said, **fields}


def test_cauldron_row():
    [sample] = Cauldron("aokvqa")(12, cauldron_row("a0", " a1\n"))
    turns = (Turn("q0", "a0"), Turn("q1", " a1\n"))
    assert sample == Sample("12", "aokvqa", turns, (DATA,))


def test_several_images_and_none():
    [several] = Cauldron("x")(0, cauldron_row("a", images=[{"bytes": DATA}, {"bytes": b"second"}]))
    assert several.images == (DATA, b"second")
    for nothing in ([], None):
        [text] = Cauldron("x")(0, cauldron_row("a") | {"images": nothing})
        assert text.images == ()


def test_an_image_given_by_path(tmp_path):
    (tmp_path / "a.png").write_bytes(DATA)
    here, gone = ({"bytes": None, "path": str(tmp_path / n)} for n in ("a.png", "b.png"))
    [sample] = Cauldron("x")(0, cauldron_row("a", images=[here]))
    assert sample.images == (DATA,)
    assert Cauldron("x")(0, cauldron_row("a", images=[here, gone])) == [Drop("missing image", "0")]


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}, {"bytes": b""}])
def test_an_image_that_is_nowhere_is_missing(image):
    assert Cauldron("x")(3, cauldron_row("a", images=[image])) == [Drop("missing image", "3")]


def test_turns_without_an_answer_are_counted_and_left_out():
    kept = Cauldron("x")(0, cauldron_row("", "a1", "  \n"))
    assert kept[:-1] == [Drop("empty answer", "0", "turn")] * 2
    assert kept[-1].turns == (Turn("q1", "a1"),)
    assert Cauldron("x")(0, cauldron_row(""))[-1] == Drop("empty answer", "0")
    assert Cauldron("x")(0, cauldron_row()) == [Drop("no turns", "0")]


@pytest.mark.parametrize(
    "row",
    [
        {"images": []},
        {"images": [], "texts": None},
        {"images": [], "texts": [{"user": "q"}]},
        {"images": [], "texts": [{"user": "q", "assistant": None}]},
        {"images": 3, "texts": [{"user": "q", "assistant": "a"}]},
    ],
)
def test_malformed_rows_are_dropped_whole(row):
    assert Cauldron("x")(5, row) == [Drop("malformed record", "5")]


def test_ratings_filter_turn_by_turn():
    row = finevision_row(["a0", "a1", "a2"], relevance=[2, 3, 5], formatting=[5, 5, 1])
    reader = FineVision("aokvqa", {"relevance": 3, "formatting": 2})
    low = Drop("rating below the minimum", "4", "turn")
    *left_out, sample = reader(4, row)
    assert left_out == [low, low]
    assert sample.turns == (Turn("q1", "a1"),)
    strict = FineVision("aokvqa", {"relevance": 6})(4, row)
    assert strict == [low, low, low, Drop("rating below the minimum", "4")]
    assert len(FineVision("aokvqa")(4, row)[0].turns) == 3


def test_a_turn_without_a_rating_is_kept():
    row = finevision_row(["a0", "a1"], relevance=[None])
    [sample] = FineVision("aokvqa", {"relevance": 3})(0, row)
    assert len(sample.turns) == 2


def test_unknown_ratings_are_refused():
    assert check_ratings({"formatting": 2}) == {"formatting": 2}
    with pytest.raises(ValueError, match=r"unknown rating 'relevence'.*image_correspondence"):
        check_ratings({"relevence": 2})


def test_llava_record(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(DATA)
    record = llava_record("<image>\nWho?", "Me.", "And <b>?", "You.", image="images/1.png")
    [sample] = LlavaJson("receipts", str(tmp_path))(7, record)
    turns = (Turn("Who?", "Me."), Turn("And <b>?", "You."))
    assert sample == Sample("r1", "receipts", turns, (DATA,))
    [twice] = LlavaJson("r", str(tmp_path))(7, record | {"image": ["images/1.png"] * 2})
    assert twice.images == (DATA, DATA)


def test_llava_text_only_and_ids():
    reader = LlavaJson("text", "/nowhere")
    [sample] = reader(7, llava_record("Who?", "Me."))
    assert (sample.images, sample.id) == ((), "r1")
    record = llava_record("Who?", "Me.")
    del record["id"]
    assert reader(7, record)[0].id == "7"
    assert reader(7, record | {"id": 31})[0].id == "31"


def test_llava_images_that_are_not_there():
    reader = LlavaJson("text", "/nowhere")
    gone = reader(0, llava_record("<image>\nWho?", "Me.", image="a.jpg"))
    unnamed = reader(0, llava_record("<image>\nWho?", "Me."))
    assert gone == unnamed == [Drop("missing image", "r1")]


@pytest.mark.parametrize(
    "record",
    [
        llava_record("Who?"),
        llava_record("Who?", "Me.", "And?"),
        {"id": "r1", "conversations": [{"from": "gpt", "value": "Me."}]},
        {"id": "r1", "conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
        {"id": "r1"},
        {"id": "r1", "conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": 4}]},
    ],
)
def test_malformed_llava_records_are_dropped(record):
    assert LlavaJson("x", ".")(0, record) == [Drop("malformed record", "r1")]


def test_a_llava_record_that_is_no_object_is_dropped():
    assert LlavaJson("x", ".")(9, "text") == [Drop("malformed record", "9")]


def test_readers_travel_to_workers():
    for reader in (Cauldron("a"), FineVision("a", {"relevance": 2}), LlavaJson("a", "/x")):
        assert pickle.loads(pickle.dumps(reader)) == reader


def test_format_is_told_by_the_columns():
    assert detect_format(["images", "texts"]) == "cauldron"
    assert detect_format(["images", "texts", "source", "relevance_ratings"]) == "finevision"
    with pytest.raises(ValueError, match="columns image, text: expected images and texts"):
        detect_format(["text", "image"])
