"""The texts that the tiny language model learns from.

A text is a plain string or a chat (a tuple of `Turn`s): stories and questions about creatures,
spelling and scenes told in words. Words of the language are far more frequent in
scenes than codes, which is why the model later takes codes for words.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from ldistill.common.samples import Sample, Turn
from ldistill.tiny.scenes import SOURCES, look, told
from ldistill.tiny.world import (
    ATTRIBUTES,
    KNOWLEDGE,
    PIECES,
    World,
    ask,
    held_out,
    invent_word,
    lettered,
    say,
    spell,
    stream,
)

Text = str | tuple[Turn, ...]
TEXT = "text"
"""Name of the source without pictures."""


def pretraining_texts(world: World) -> Iterator[Text]:
    """Endless texts; text i depends on (seed, i) alone."""
    kinds = (_scene, _story, _scene, _facts, _scene, _story, _scene, _facts, _scene, _looks,
             _scene, _spelling, _scene, _letters)  # fmt: skip
    for index in itertools.count():
        yield kinds[index % len(kinds)](world, stream(world.seed, "text", index))


def replayed(world: World, count: int) -> Iterator[Sample]:
    """Chats as the language model learnt them, questions of facts and spelling: the source `text`.

    They follow the same rules, so nothing of the benchmark is in them.
    """
    kinds = (_facts, _spelling, _letters, _looks)
    for index in range(count):
        turns = kinds[index % len(kinds)](world, stream(world.seed, "replay", index))
        yield Sample(f"{TEXT}-{index:06d}", TEXT, turns)


def tokenizer_texts(world: World) -> Iterator[Text]:
    """Texts to learn a tokenizer from: a sample, and every piece of writing often enough."""
    yield from itertools.islice(pretraining_texts(world), 7000)
    yield from [" ".join(PIECES)] * 400


def _story(world: World, rng: random.Random) -> Text:
    """Statements about two creatures."""
    return " ".join(
        say(world, rng, creature, attribute)
        for creature in rng.sample(world.creatures, 2)
        for attribute in rng.sample(tuple(ATTRIBUTES), 3)
    )


def _facts(world: World, rng: random.Random) -> Text:
    asked = _questions(world, rng, 3, tuple(ATTRIBUTES))
    return tuple(Turn(question, answer) for question, _, answer in asked)


def _letters(world: World, rng: random.Random) -> Text:
    return tuple(lettered(rng, *asked) for asked in _questions(world, rng, 2, KNOWLEDGE))


def _questions(
    world: World, rng: random.Random, count: int, attributes: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Question, attribute and answer about each of `count` creatures."""
    for creature in rng.sample(world.creatures, count):
        attribute = rng.choice(attributes)
        yield ask(world, rng, creature, attribute), attribute, creature.facts[attribute]


def _looks(world: World, rng: random.Random) -> Text:
    """Names from looks, the knowledge a picture needs."""
    turns = []
    for creature in rng.sample(world.creatures, 2):
        turns.append(Turn(f"Which one has the {look(creature)}?", creature.name))
        if rng.random() < 0.5:
            turns.append(Turn("What does it look like?", f"a {look(creature)}"))
    return tuple(turns)


def _spelling(world: World, rng: random.Random) -> Text:
    turns = []
    while len(turns) < 3:
        word = invent_word(rng)
        if not held_out(word):
            turns.append(Turn(f'Spell "{word}".', spell(word)))
    return tuple(turns)


def _scene(world: World, rng: random.Random) -> Text:
    return told(world, rng.choice(tuple(SOURCES)), rng)
