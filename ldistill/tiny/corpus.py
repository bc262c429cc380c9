"""The texts that the tiny language model learns from.

A text is a plain string or a chat (a tuple of `Turn`s): stories and questions about creatures,
spelling and scenes told in words. Words of the language are far more frequent in
scenes than codes, which is why the model later takes codes for words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from random import Random

from ldistill.common.samples import Sample, Turn
from ldistill.tiny.scenes import SOURCES, told
from ldistill.tiny.world import ATTRIBUTES, KNOWLEDGE, World, held_out, invent_word, lettered

Text = str | tuple[Turn, ...]
TEXT = "text"
"""Name of the source without pictures."""


def pretraining_texts(world: World) -> Iterator[Text]:
    """Endless texts; text i depends on (seed, i) alone."""
    kinds = (_scene, _story, _scene, _facts, _scene, _story, _scene, _facts, _scene, _looks,
             _scene, _spelling, _scene, _letters)  # fmt: skip
    for index in count():
        yield kinds[index % len(kinds)](world, world.stream("text", index))


def replayed(world: World, number: int) -> Iterator[Sample]:
    """Chats as the language model learnt them, questions of facts and spelling: the source `text`.

    They follow the same rules, so nothing of the benchmark is in them.
    """
    kinds = (_facts, _spelling, _letters, _looks)
    for index in range(number):
        turns = kinds[index % len(kinds)](world, world.stream("replay", index))
        yield Sample(f"{TEXT}-{index:06d}", TEXT, turns)


def _story(world: World, rng: Random) -> Text:
    """Statements about two creatures."""
    return " ".join(
        world.say(rng, creature, attribute)
        for creature in rng.sample(world.creatures, 2)
        for attribute in rng.sample(tuple(ATTRIBUTES), 3)
    )


def _facts(world: World, rng: Random) -> Text:
    asked = _questions(world, rng, 3, tuple(ATTRIBUTES))
    return tuple(Turn(question, answer) for question, _, answer in asked)


def _letters(world: World, rng: Random) -> Text:
    return tuple(lettered(rng, *asked) for asked in _questions(world, rng, 2, KNOWLEDGE))


def _questions(
    world: World, rng: Random, number: int, attributes: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Question, attribute and answer about each of some creatures."""
    for creature in rng.sample(world.creatures, number):
        attribute = rng.choice(attributes)
        yield world.ask(rng, creature, attribute), attribute, creature.facts[attribute]


def _looks(world: World, rng: Random) -> Text:
    """Names from looks, the knowledge a picture needs."""
    turns = []
    for creature in rng.sample(world.creatures, 2):
        turns.append(Turn(f"Which one has the {creature.look}?", creature.name))
        if rng.random() < 0.5:
            turns.append(Turn("What does it look like?", f"a {creature.look}"))
    return tuple(turns)


def _spelling(world: World, rng: Random) -> Text:
    words = (word for word in iter(lambda: invent_word(rng), None) if not held_out(word))
    return tuple(Turn(f'Spell "{word}".', "-".join(word)) for word in islice(words, 3))


def _scene(world: World, rng: Random) -> Text:
    return told(world, rng.choice(tuple(SOURCES)), rng)
