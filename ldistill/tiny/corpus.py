"""The texts that the tiny language model learns from.

A text is a plain string or a chat (a tuple of `Turn`s): stories and questions about creatures,
spelling and scenes told in words. Words of the language are far more frequent in
scenes than codes, which is why the model later takes codes for words.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from ldistill.common.samples import Turn
from ldistill.tiny.scenes import SOURCES, look, told
from ldistill.tiny.text import ask, lettered, say, spell
from ldistill.tiny.world import (
    ATTRIBUTES,
    KNOWLEDGE,
    PIECES,
    World,
    held_out,
    invent_word,
    stream,
)

Text = str | tuple[Turn, ...]


def pretraining_texts(world: World, count: int) -> Iterator[Text]:
    """`count` texts; text i depends on (seed, i) alone."""
    kinds = (_scene, _story, _scene, _facts, _scene, _story, _scene, _facts, _scene, _looks,
             _scene, _spelling, _scene, _letters)  # fmt: skip
    for index in range(count):
        yield kinds[index % len(kinds)](world, stream(world.seed, "text", index))


def tokenizer_texts(world: World) -> Iterator[Text]:
    """Texts to learn a tokenizer from: a sample, and every piece of writing often enough."""
    yield from pretraining_texts(world, 7000)
    yield from [" ".join(PIECES)] * 400


def _story(world: World, rng: random.Random) -> Text:
    """Statements about two creatures."""
    return " ".join(
        say(world, rng, creature, attribute)
        for creature in rng.sample(world.creatures, 2)
        for attribute in rng.sample(tuple(ATTRIBUTES), 3)
    )


def _facts(world: World, rng: random.Random) -> Text:
    turns = []
    for creature in rng.sample(world.creatures, 3):
        attribute = rng.choice(tuple(ATTRIBUTES))
        turns.append(Turn(ask(world, rng, creature, attribute), creature.facts[attribute]))
    return tuple(turns)


def _letters(world: World, rng: random.Random) -> Text:
    turns = []
    for creature in rng.sample(world.creatures, 2):
        attribute = rng.choice(KNOWLEDGE)
        asked = ask(world, rng, creature, attribute)
        turns.append(lettered(rng, asked, attribute, creature.facts[attribute]))
    return tuple(turns)


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
