"""Each public format: one record in, one Sample or one counted Drop out."""

import base64
import pickle

import pytest
from helpers_data import picture

from ldistill.common.samples import Drop, Sample, Turn
from ldistill.data.build.readers import RATINGS, Reader

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
    [sample] = Reader("aokvqa")(12, cauldron_row("a0", " a1\n"))
    turns = (Turn("q0", "a0"), Turn("q1", " a1\n"))
    assert sample == Sample("12", "aokvqa", turns, (DATA,))


def test_several_images_and_none():
    [several] = Reader("x")(0, cauldron_row("a", images=[{"bytes": DATA}, {"bytes": b"second"}]))
    assert several.images == (DATA, b"second")
    for nothing in ([], None):
        [text] = Reader("x")(0, cauldron_row("a") | {"images": nothing})
        assert text.images == ()


def test_an_image_given_by_path(tmp_path):
    (tmp_path / "a.png").write_bytes(DATA)
    here, gone = ({"bytes": None, "path": str(tmp_path / n)} for n in ("a.png", "b.png"))
    [sample] = Reader("x")(0, cauldron_row("a", images=[here]))
    assert sample.images == (DATA,)
    assert Reader("x")(0, cauldron_row("a", images=[here, gone])) == [Drop("missing image", "0")]


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}, {"bytes": b""}])
def test_an_image_that_is_nowhere_is_missing(image):
    assert Reader("x")(3, cauldron_row("a", images=[image])) == [Drop("missing image", "3")]


def test_turns_without_an_answer_are_counted_and_left_out():
    kept = Reader("x")(0, cauldron_row("", "a1", "  \n"))
    assert kept[:-1] == [Drop("empty answer", "0", "turn")] * 2
    assert kept[-1].turns == (Turn("q1", "a1"),)
    assert Reader("x")(0, cauldron_row(""))[-1] == Drop("empty answer", "0")
    assert Reader("x")(0, cauldron_row()) == [Drop("no turns", "0")]


@pytest.mark.parametrize(
    "row",
    [
        {"images": []},
        {"images": [], "texts": None},
        {"images": [], "texts": [{"user": "q"}]},
        {"images": [], "texts": [{"user": "q", "assistant": {}}]},
        {"images": 3, "texts": [{"user": "q", "assistant": "a"}]},
    ],
)
def test_malformed_rows_are_dropped_whole(row):
    assert Reader("x")(5, row) == [Drop("malformed record", "5")]


def test_ratings_filter_turn_by_turn():
    row = finevision_row(["a0", "a1", "a2"], relevance=[2, 3, 5], formatting=[5, 5, 1])
    reader = Reader("aokvqa", minimum={"relevance": 3, "formatting": 2})
    low = Drop("rating below the minimum", "4", "turn")
    *left_out, sample = reader(4, row)
    assert left_out == [low, low]
    assert sample.turns == (Turn("q1", "a1"),)
    strict = Reader("aokvqa", minimum={"relevance": 6})(4, row)
    assert strict == [low, low, low, Drop("rating below the minimum", "4")]
    assert len(Reader("aokvqa")(4, row)[0].turns) == 3


def test_a_turn_without_a_rating_is_kept():
    row = finevision_row(["a0", "a1"], relevance=[None])
    [sample] = Reader("aokvqa", minimum={"relevance": 3})(0, row)
    assert len(sample.turns) == 2


def test_llava_record(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(DATA)
    record = llava_record("<image>\nWho?", "Me.", "And <b>?", "You.", image="images/1.png")
    [sample] = Reader("receipts", str(tmp_path))(7, record)
    turns = (Turn("Who?", "Me."), Turn("And <b>?", "You."))
    assert sample == Sample("r1", "receipts", turns, (DATA,))
    unmarked = llava_record("Who?", "Me.", image=["images/1.png"] * 2)
    [twice] = Reader("r", str(tmp_path))(7, unmarked)
    assert (twice.turns, twice.images) == ((Turn("Who?", "Me."),), (DATA, DATA))


def test_llava_text_only_and_ids():
    reader = Reader("text", "/nowhere")
    [sample] = reader(7, llava_record("Who?", "Me."))
    assert (sample.images, sample.id) == ((), "r1")
    record = llava_record("Who?", "Me.")
    del record["id"]
    assert reader(7, record)[0].id == "7"
    assert reader(7, record | {"id": 31})[0].id == "31"


def test_llava_images_that_are_not_there():
    reader = Reader("text", "/nowhere")
    gone = reader(0, llava_record("<image>\nWho?", "Me.", image="a.jpg"))
    unnamed = reader(0, llava_record("<image>\nWho?", "Me."))
    assert gone == unnamed == [Drop("missing image", "r1")]


@pytest.mark.parametrize(
    "record",
    [
        {"id": "r1", "conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
        {"id": "r1"},
        {"id": "r1", "conversations": [{"from": "human", "value": "a"}] * 2},
        {"id": "r1", "conversations": [{"from": "tool", "value": "a"}]},
    ],
)
def test_malformed_llava_records_are_dropped(record):
    assert Reader("x", ".")(0, record) == [Drop("malformed record", "r1")]


def test_a_llava_record_that_is_no_object_is_dropped():
    assert Reader("x", ".")(9, "text") == [Drop("malformed record", "9")]


def test_readers_travel_to_workers():
    for reader in (Reader("a"), Reader("a", minimum={"relevance": 2}), Reader("a", "/x")):
        assert pickle.loads(pickle.dumps(reader)) == reader


# conversations as people have them ---------------------------------------------------------------


def chat(*contents, roles=("user", "assistant"), **fields):
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": said, **fields}


@pytest.mark.parametrize(
    "record",
    [
        llava_record("Who?", "Me."),
        chat("Who?", "Me."),
        chat("Who?", "Me.", roles=("human", "model")),
        chat([{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}], "Me."),
        {"conversations": [{"role": "user", "content": "Who?"}, {"role": "gpt", "value": "Me."}]},
        {"prompt": "Who?", "response": "Me."},
        {"prompt": "Who?", "completion": "Me."},
        {
            "prompt": chat("Who?")["messages"],
            "completion": [{"role": "assistant", "content": "Me."}],
        },
        {"user": "Who?", "assistant": "Me."},
        {"question": "Who?", "answer": "Me."},
        {"instruction": "Who?", "input": "", "output": "Me."},
    ],
)
def test_every_layout_is_the_same_conversation(record):
    [sample] = Reader("x")(0, record)
    assert (sample.turns, sample.images, sample.system) == ((Turn("Who?", "Me."),), (), "")


def test_an_instruction_keeps_its_input():
    [sample] = Reader("x")(0, {"instruction": "Sum up", "input": "1 2", "output": 3})
    assert sample.turns == (Turn("Sum up\n1 2", "3"),)


def test_a_system_turn_is_kept_apart():
    record = {"messages": [{"role": "system", "content": "Be brief."}, *chat("q", "a")["messages"]]}
    [sample] = Reader("x")(0, record)
    assert (sample.system, sample.turns) == ("Be brief.", (Turn("q", "a"),))
    [sample] = Reader("x")(0, llava_record("q", "a", system="Be kind."))
    assert sample.system == "Be kind."
    late = {"messages": [*chat("q", "a")["messages"], {"role": "system", "content": "x"}]}
    [drop] = Reader("x")(0, late)
    assert drop == Drop("malformed record", "0")
    assert (
        drop.detail == "ValueError: roles user, assistant, system: not user and assistant in turn"
    )


def test_a_lone_turn_at_either_end_is_cut_and_counted():
    alone = Drop("question or answer alone", "0", "turn")
    record = chat("hello", "q", "a", "and?", roles=("assistant", "user"))
    assert Reader("x")(0, record) == [alone, alone, Sample("0", "x", (Turn("q", "a"),))]
    assert Reader("x")(0, chat("q")) == [alone, Drop("question or answer alone", "0")]


def test_numbers_are_text_and_a_null_loses_its_turn_alone():
    numbers = cauldron_row(3, 2.5, True, images=())
    [sample] = Reader("x")(0, numbers)
    assert [turn.assistant for turn in sample.turns] == ["3", "2.5", "true"]
    *left_out, sample = Reader("x")(0, cauldron_row("a0", None, "a2"))
    assert left_out == [Drop("turn without text", "0", "turn")]
    assert [turn.assistant for turn in sample.turns] == ["a0", "a2"]
    *left_out, sample = Reader("x")(0, chat("q0", "a0", None, "a1"))
    assert (left_out, len(sample.turns)) == ([Drop("turn without text", "0", "turn")], 1)


@pytest.mark.parametrize(
    ("questions", "turns"),
    [
        (["<image>\nWho?"], [Turn("Who?", "a")]),
        (["<image>\n<image>\nWho?"], [Turn("Who?", "a")]),
        (["Who is in <image>?"], [Turn("Who is in ?", "a", (10,))]),
        (["Who?\n<image>"], [Turn("Who?\n", "a", (5,))]),
        (["Is <image> or <image> red? "], [Turn("Is  or  red?", "a", (3, 7))]),
        (["Hello", "<image>\nWho?"], [Turn("Hello", "a"), Turn("Who?", "a", (0,))]),
        (["<image>\nWho?", "And <image>?"], [Turn("Who?", "a", (0,)), Turn("And ?", "a", (4,))]),
    ],
)
def test_pictures_stay_where_their_marks_are(questions, turns):
    said = [text for question in questions for text in (question, "a")]
    count = sum(question.count("<image>") for question in questions)
    record = llava_record(*said, image=[{"bytes": DATA}] * count)
    [sample] = Reader("x")(0, record)
    assert (list(sample.turns), sample.images) == (turns, (DATA,) * count)


def test_typed_parts_name_their_pictures_or_take_the_next(tmp_path):
    (tmp_path / "b.png").write_bytes(b"file")
    uri = "data:image/png;base64," + base64.b64encode(b"inline").decode()
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "in "},
        {"type": "image"},
        {"type": "image", "image": "b.png"},
    ]
    [sample] = Reader("x", str(tmp_path))(0, chat(parts, "a", images=[{"bytes": DATA}]))
    assert sample.turns == (Turn("Is in ", "a", (3, 6, 6)),)
    assert sample.images == (b"inline", DATA, b"file")
    [drop] = Reader("x")(0, chat([{"type": "image", "image": "https://a.b/c.png"}], "a"))
    assert drop.reason == "missing image"


def test_pictures_of_a_turn_left_out_go_to_the_next_question():
    record = llava_record("<image>Who?", "", "Is <image> red?", "a", image=[{"bytes": b"1"}, DATA])
    *left_out, sample = Reader("x")(0, record)
    assert left_out == [Drop("empty answer", "r1", "turn")]
    assert (sample.turns, sample.images) == ((Turn("Is  red?", "a", (0, 3)),), (b"1", DATA))


@pytest.mark.parametrize(("marks", "pictures"), [(2, 1), (1, 2)])
def test_other_numbers_of_marks_and_pictures_are_counted_by_themselves(marks, pictures):
    record = llava_record("<image>" * marks + "q", "a", image=[{"bytes": DATA}] * pictures)
    [drop] = Reader("x")(0, record)
    assert drop == Drop("other number of image marks than pictures", "r1")
    assert drop.detail == f"{marks} places for pictures, {pictures} pictures"


def test_the_reason_of_a_malformed_record_is_kept():
    [drop] = Reader("x")(3, {"text": "a"})
    assert drop.detail == "ValueError: fields text: no known layout"
    [drop] = Reader("x")(3, "{broken")
    assert drop.detail == "no object: '{broken'"
