"""The tiny world: the same every time, and nothing held out ever leaks into training."""

from __future__ import annotations

import io
import random
import re
from itertools import islice

import pytest
from PIL import Image

from ldistill.sources import DOCUMENT, LANGUAGE
from ldistill.tiny.benchmark import TASKS, benchmark
from ldistill.tiny.corpus import pretraining_texts, replayed
from ldistill.tiny.pictures import COLUMNS, SIZE, Canvas
from ldistill.tiny.scenes import SOURCES, sample, told
from ldistill.tiny.vision import KINDS, WRITING, cell_labels
from ldistill.tiny.world import (
    ATTRIBUTES,
    KNOWLEDGE,
    QUESTIONS,
    STATEMENTS,
    World,
    held_out,
)

READING = ("docvqa", "infographic_vqa", "ocrvqa", "robut_sqa", "textcaps", "textvqa", "visualmrc")


@pytest.fixture(scope="module")
def world() -> World:
    return World(3)


@pytest.fixture(scope="module")
def texts(world):
    replayed_ = [sample.turns for sample in replayed(world, 2000)]
    return [*islice(pretraining_texts(world), 4000), *replayed_]


@pytest.fixture(scope="module")
def pictures(world):
    return {
        source: [
            sample(world, source, index, aligning=aligning)
            for aligning in (False, True)
            for index in range(150)
        ]
        for source in SOURCES
    }


def flat(text) -> str:
    """A text as one string."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{turn.user}\n{turn.assistant}" for turn in text)


def test_the_sources_are_those_of_the_paper():
    assert set(SOURCES) == set(LANGUAGE + DOCUMENT)


def test_the_same_seed_gives_the_same_world(world, texts):
    again = World(3)
    assert again.creatures == world.creatures
    assert list(islice(pretraining_texts(again), 50)) == texts[:50]
    assert sample(again, "docvqa", 5) == sample(world, "docvqa", 5)
    assert benchmark(again, 3) == benchmark(world, 3)
    assert World(4).creatures != world.creatures


def test_creatures_are_told_apart_by_look_and_name(world):
    assert len({c.look for c in world.creatures}) == len(world.creatures)
    assert len({c.name for c in world.creatures}) == len(world.creatures)
    assert all(set(c.facts) == set(ATTRIBUTES) for c in world.creatures)


def test_text_never_uses_the_phrases_kept_for_the_benchmark(world, texts):
    everything = "\n".join(map(flat, texts))
    used = 0
    for creature in world.creatures:
        for attribute in KNOWLEDGE:
            pair = (creature.name, attribute)
            for phrase in range(len(STATEMENTS[attribute])):
                said = " ".join(creature.statement(attribute, phrase)) in everything
                used += said
                assert not (said and phrase == world.unsaid_phrase[pair])
            for phrase in range(len(QUESTIONS[attribute])):
                asked = creature.question(attribute, phrase) in everything
                used += asked
                assert not (asked and phrase == world.unasked_phrase[pair])
    assert used > 1000


def test_pictures_never_ask_for_facts_kept_for_the_benchmark(world, pictures):
    """The creature is recognised by the answer to `Who is this?`, or by drawing it again."""
    of_name = {c.name: c for c in world.creatures}
    seen = 0
    for picture in pictures["aokvqa"]:
        names = [t.assistant for t in picture.turns if t.assistant in of_name]
        for name in names:
            for attribute in KNOWLEDGE:
                forms = {
                    QUESTIONS[attribute][phrase].replace("the {n}", "this one")
                    for phrase in range(len(QUESTIONS[attribute]))
                }
                if forms & {turn.user for turn in picture.turns}:
                    seen += 1
                    assert (name, attribute) not in world.never_pictured
    assert seen > 50


def test_training_pictures_show_no_held_out_string(pictures):
    for source in READING:
        for picture in pictures[source]:
            for turn in picture.turns:
                for word in re.findall(r"[A-Z]{2,}", turn.assistant):
                    assert not held_out(word), (source, word)


def test_spelling_in_text_leaves_out_held_out_words(texts):
    spelt = re.findall(r'Spell "([a-z]+)"\.', "\n".join(map(flat, texts)))
    assert len(spelt) > 500
    assert not any(map(held_out, spelt))


def test_benchmark_items_are_held_out(world, texts):
    items = benchmark(world, 40)
    assert [item.task for item in items[::40]] == list(TASKS)
    everything = "\n".join(map(flat, texts))
    for item in items:
        if item.task in ("words", "codes", "fields"):
            assert held_out(item.answer)
        if item.task == "codes":
            assert item.answer not in world.words
        if item.task in ("facts", "spelling"):
            assert item.prompt not in everything
        if item.task == "statements":
            assert f"{item.prompt} {item.answer}" not in everything
        assert (item.image is not None) == (item.group != "language")


def test_benchmark_answers_are_right(world):
    of_name = {c.name: c for c in world.creatures}
    for item in benchmark(world, 40):
        if item.task == "facts":
            (name,) = set(re.findall(r"[a-z]+", item.prompt)) & set(of_name)
            assert item.answer in of_name[name].facts.values()
        if item.task == "spelling":
            assert item.answer.replace("-", "") == item.prompt.removeprefix('Spell "')[:-2]


def test_text_corrects_what_is_mistyped_unless_it_was_transcribed_first(world):
    corrected = 0
    for number in range(300):
        first, *rest = told(world, "ocrvqa", world.stream("told", number))
        shown, asked = first.user.rsplit("\n", 1)
        for turn in [first, *rest]:
            if asked == "Tell all there is.":
                assert turn.assistant in shown or turn is first
            elif turn.assistant not in shown:
                assert turn.assistant in world.words
                corrected += 1
    assert corrected > 50


def test_pictures_are_small_pngs(pictures):
    for list_ in pictures.values():
        image = Image.open(io.BytesIO(list_[0].images[0]))
        assert image.size == (SIZE, SIZE)
        assert image.mode == "RGB"


def test_cell_labels_say_what_was_drawn():
    canvas = Canvas(random.Random(0))
    canvas.write("BADO7", 0, 1, jitter=0)
    canvas.mark("star", "red", 20, 52, 6)
    labels = cell_labels(canvas.placed)
    written = [WRITING[label] for label in labels[0, COLUMNS : 2 * COLUMNS]]
    assert written == ["BA", "DO", "7", ""]
    assert canvas.layout() == "\n" * 4 + "BADO7\n" + "\n" * 5 + "red star\n"
    cell = 13
    assert [KINDS[kind][labels[kind, cell]] for kind in (1, 2)] == ["star", "red"]
    assert int((labels > 0).sum()) == 5
