"""The held-out benchmark of the tiny world: what no training text or picture ever contained.

Facts are scored by the likelihood of four choices, everything else by the exact text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from random import Random
from typing import Any

from ldistill.evaluation.items import Item
from ldistill.tiny.scenes import NAMING, form, portrait, sign
from ldistill.tiny.world import Creature, World, held_out, invent_word, options

ITEMS_PER_TASK = 150
Fields = Iterator[dict[str, Any]]  # of endless items: those of `Item` beside task and group


def benchmark(world: World, per_task: int = ITEMS_PER_TASK) -> list[Item]:
    """`per_task` items of every task, a function of the world alone."""
    return [
        Item(task, group, **fields)
        for task, (group, make) in TASKS.items()
        for fields in islice(make(world, world.stream("benchmark", task)), per_task)
    ]


def _pairs(
    world: World, rng: Random, pairs: Collection[tuple[str, str]]
) -> Iterator[tuple[Creature, str]]:
    """(creature, attribute) of these pairs in random order, again and again."""
    of_name = {creature.name: creature for creature in world.creatures}
    while True:
        pairs = sorted(pairs)
        rng.shuffle(pairs)
        yield from ((of_name[name], attribute) for name, attribute in pairs)


def _choices(rng: Random, creature: Creature, attribute: str) -> dict[str, Any]:
    answer = creature.facts[attribute]
    return {"answer": answer, "choices": options(rng, attribute, answer)}


def _facts(world: World, rng: Random) -> Fields:
    for creature, attribute in _pairs(world, rng, world.never_pictured):
        asked = creature.question(attribute, world.unasked_phrase[creature.name, attribute])
        yield {"prompt": asked, **_choices(rng, creature, attribute)}


def _statements(world: World, rng: Random) -> Fields:
    for creature, attribute in _pairs(world, rng, world.unsaid_phrase):
        unsaid = world.unsaid_phrase[creature.name, attribute]
        before, _ = creature.statement(attribute, unsaid)
        yield {"prompt": before, "style": "text", **_choices(rng, creature, attribute)}


def _spelling(world: World, rng: Random) -> Fields:
    seen: set[str] = set()
    while True:
        word = invent_word(rng)
        if held_out(word) and word not in seen:
            seen.add(word)
            yield {"prompt": f'Spell "{word}".', "answer": "-".join(word)}


def _signs(writing: Callable[..., str], world: World, rng: Random) -> Fields:
    while True:
        text = writing(world, rng, hidden=True)
        canvas, *_ = sign(rng, text)
        yield {"prompt": "What does the sign say?", "answer": text, "image": canvas.png()}


def _fields(world: World, rng: Random) -> Fields:
    while True:
        count = rng.randint(2, 3)
        values = [rng.choice((world.word, world.code))(rng, hidden=True) for _ in range(count)]
        canvas, fields = form(rng, values)
        key = rng.choice(tuple(fields))
        prompt = f"What stands after {key}?"
        yield {"prompt": prompt, "answer": fields[key], "image": canvas.png()}


def _naming(world: World, rng: Random) -> Fields:
    while True:
        creature = rng.choice(world.creatures)
        image = portrait(creature, rng).png()
        yield {"prompt": rng.choice(NAMING), "answer": creature.name, "image": image}


def _knowledge(world: World, rng: Random) -> Fields:
    for creature, attribute in _pairs(world, rng, world.never_pictured):
        asked = creature.question_unnamed(rng, attribute)
        choices = _choices(rng, creature, attribute)
        yield {"prompt": asked, **choices, "image": portrait(creature, rng).png()}


TASKS: dict[str, tuple[str, Callable[[World, Random], Fields]]] = {
    "facts": ("language", _facts),  # that no picture is asked for, in a new phrase
    "statements": ("language", _statements),  # of a fact, in a phrase it was never told in
    "spelling": ("language", _spelling),  # of a word never spelt before
    "words": ("reading", partial(_signs, World.word)),  # that no picture showed
    "codes": ("reading", partial(_signs, World.code)),  # letters that are no word
    "fields": ("reading", _fields),  # one of a form
    "naming": ("vision", _naming),  # a creature in a new picture
    "knowledge": ("vision", _knowledge),  # never asked about a picture, about a picture
}
