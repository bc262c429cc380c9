"""The held-out benchmark of the tiny world: what no training text or picture ever contained.

| task | group | question | scored by |
|---|---|---|---|
| facts | language | a fact no picture is asked for, in a new phrase | likelihood, 4 choices |
| statements | language | a fact in a phrase it was never told in | likelihood, 4 choices |
| spelling | language | letters of a word never spelt before | exact text |
| words | reading | a sign with a word no picture showed | exact text |
| codes | reading | a sign with letters that are no word | exact text |
| fields | reading | one field of a form | exact text |
| naming | vision | the name of a creature in a new picture | exact text |
| knowledge | vision | a fact never asked about a picture, about a picture | likelihood, 4 choices |
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from ldistill.evaluation.items import Item
from ldistill.tiny.scenes import NAMING, form, portrait, sign
from ldistill.tiny.text import options, question, spell, statement
from ldistill.tiny.world import (
    KNOWLEDGE,
    WAYS_TO_ASK,
    Creature,
    World,
    held_out,
    invent_word,
    stream,
)

ITEMS_PER_TASK = 150


def benchmark(world: World, per_task: int = ITEMS_PER_TASK) -> list[Item]:
    """`per_task` items of every task, a function of the world alone."""
    items = []
    for task, (group, make) in TASKS.items():
        rng = stream(world.seed, "benchmark", task)
        made = make(world, rng)
        items += [Item(task, group, **next(made)) for _ in range(per_task)]
    return items


def _pairs(world: World, rng: random.Random, names: frozenset) -> Iterator[tuple[Creature, str]]:
    """(creature, attribute) pairs in random order, again and again with new choices."""
    of_name = {creature.name: creature for creature in world.creatures}
    while True:
        pairs = sorted(names)
        rng.shuffle(pairs)
        yield from ((of_name[name], attribute) for name, attribute in pairs)


def _facts(world: World, rng: random.Random) -> Iterator[dict]:
    for creature, attribute in _pairs(world, rng, world.never_pictured):
        answer = creature.facts[attribute]
        asked = question(creature, attribute, world.unasked_phrase[creature.name, attribute])
        yield {"prompt": asked, "answer": answer, "choices": options(rng, attribute, answer)}


def _statements(world: World, rng: random.Random) -> Iterator[dict]:
    every = frozenset((c.name, attribute) for c in world.creatures for attribute in KNOWLEDGE)
    for creature, attribute in _pairs(world, rng, every):
        unsaid = world.unsaid_phrase[creature.name, attribute]
        before, answer = statement(creature, attribute, unsaid)
        choices = options(rng, attribute, answer)
        yield {"prompt": before, "answer": answer, "choices": choices, "style": "text"}


def _spelling(world: World, rng: random.Random) -> Iterator[dict]:
    seen: set[str] = set()
    while True:
        word = invent_word(rng)
        if held_out(word) and word not in seen:
            seen.add(word)
            yield {"prompt": f'Spell "{word}".', "answer": spell(word)}


def _words(world: World, rng: random.Random) -> Iterator[dict]:
    while True:
        yield _sign_item(rng, world.word(rng, hidden=True))


def _codes(world: World, rng: random.Random) -> Iterator[dict]:
    while True:
        yield _sign_item(rng, world.code(rng, hidden=True))


def _sign_item(rng: random.Random, text: str) -> dict:
    canvas, *_ = sign(rng, text)
    return {"prompt": "What does the sign say?", "answer": text, "image": canvas.png()}


def _fields(world: World, rng: random.Random) -> Iterator[dict]:
    while True:
        values = [
            rng.choice((world.word, world.code))(rng, hidden=True) for _ in range(rng.randint(2, 3))
        ]
        canvas, fields = form(rng, values)
        key = rng.choice(tuple(fields))
        prompt = f"What stands after {key}?"
        yield {"prompt": prompt, "answer": fields[key], "image": canvas.png()}


def _naming(world: World, rng: random.Random) -> Iterator[dict]:
    while True:
        creature = rng.choice(world.creatures)
        image = portrait(creature, rng).png()
        yield {"prompt": rng.choice(NAMING), "answer": creature.name, "image": image}


def _knowledge(world: World, rng: random.Random) -> Iterator[dict]:
    for creature, attribute in _pairs(world, rng, world.never_pictured):
        answer = creature.facts[attribute]
        yield {
            "prompt": question(creature, attribute, rng.randrange(WAYS_TO_ASK), this=True),
            "answer": answer,
            "choices": options(rng, attribute, answer),
            "image": portrait(creature, rng).png(),
        }


TASKS: dict[str, tuple[str, Callable[[World, random.Random], Iterator[dict]]]] = {
    "facts": ("language", _facts),
    "statements": ("language", _statements),
    "spelling": ("language", _spelling),
    "words": ("reading", _words),
    "codes": ("reading", _codes),
    "fields": ("reading", _fields),
    "naming": ("vision", _naming),
    "knowledge": ("vision", _knowledge),
}
