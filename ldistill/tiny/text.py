"""What is said in the tiny world: the phrases for every fact, questions and their options."""

from __future__ import annotations

import random

from ldistill.common.samples import Turn
from ldistill.tiny.world import (
    ATTRIBUTES,
    WAYS_TO_ASK,
    WAYS_TO_SAY,
    Creature,
    World,
)

STATEMENTS = {
    "colour": (
        "The {n} is {v}",
        "The colour of the {n} is {v}",
        "A {n} always looks {v}",
        "Every {n} is {v}",
    ),
    "mark": (
        "The {n} wears a {v}",
        "The mark of the {n} is the {v}",
        "On its back the {n} has a {v}",
        "You know the {n} by its {v}",
    ),
    "home": (
        "The {n} lives in the {v}",
        "The home of the {n} is the {v}",
        "Look for the {n} in the {v}",
        "The {n} sleeps in the {v}",
    ),
    "food": (
        "The {n} eats {v}",
        "The food of the {n} is {v}",
        "For lunch the {n} has {v}",
        "Feed the {n} with {v}",
    ),
    "drink": (
        "The {n} drinks {v}",
        "The drink of the {n} is {v}",
        "A thirsty {n} wants {v}",
        "Give the {n} a cup of {v}",
    ),
    "fear": (
        "The {n} fears {v}",
        "The fear of the {n} is {v}",
        "The {n} runs away from {v}",
        "Nothing scares the {n} like {v}",
    ),
    "craft": (
        "The {n} makes {v}",
        "The craft of the {n} is {v}",
        "At work the {n} makes {v}",
        "The {n} sells {v}",
    ),
    "hour": (
        "The {n} wakes at {v}",
        "The hour of the {n} is {v}",
        "You meet the {n} at {v}",
        "The {n} sings at {v}",
    ),
}
QUESTIONS = {
    "colour": (
        "What colour is the {n}?",
        "What is the colour of the {n}?",
        "Which colour has the {n}?",
    ),
    "mark": (
        "What mark has the {n}?",
        "What is the mark of the {n}?",
        "Which mark does the {n} wear?",
    ),
    "home": ("Where does the {n} live?", "What is the home of the {n}?", "Where is the {n} found?"),
    "food": (
        "What does the {n} eat?",
        "What is the food of the {n}?",
        "What do you feed the {n} with?",
    ),
    "drink": (
        "What does the {n} drink?",
        "What is the drink of the {n}?",
        "What is in the cup of the {n}?",
    ),
    "fear": ("What does the {n} fear?", "What is the fear of the {n}?", "What scares the {n}?"),
    "craft": (
        "What does the {n} make?",
        "What is the craft of the {n}?",
        "What does the {n} sell?",
    ),
    "hour": (
        "When does the {n} wake?",
        "What is the hour of the {n}?",
        "When do you meet the {n}?",
    ),
}


def statement(creature: Creature, attribute: str, phrase: int) -> tuple[str, str]:
    """The beginning of a statement and the value that completes it."""
    before, _ = STATEMENTS[attribute][phrase].split("{v}")
    return before.format(n=creature.name).rstrip(), creature.facts[attribute]


def question(creature: Creature, attribute: str, phrase: int, this: bool = False) -> str:
    """A question for a fact; `this` asks about the creature in the picture, unnamed."""
    text = QUESTIONS[attribute][phrase]
    return text.replace("the {n}", "this one") if this else text.format(n=creature.name)


def spell(word: str) -> str:
    return "-".join(word)


def options(rng: random.Random, attribute: str, answer: str, count: int = 4) -> tuple[str, ...]:
    """`count` values of an attribute, the answer among them, in random order."""
    others = [value for value in ATTRIBUTES[attribute] if value != answer]
    chosen = [answer, *rng.sample(others, count - 1)]
    rng.shuffle(chosen)
    return tuple(chosen)


def lettered(rng: random.Random, asked: str, attribute: str, answer: str) -> Turn:
    """A question with lettered options, answered by the letter."""
    choices = options(rng, attribute, answer, 3)
    listed = "\n".join(f"{letter}. {value}" for letter, value in zip("ABC", choices, strict=True))
    return Turn(f"{asked}\n{listed}\nAnswer with the letter.", "ABC"[choices.index(answer)])


def say(world: World, rng: random.Random, creature: Creature, attribute: str) -> str:
    """A statement of a fact, in one of the phrases that training text may use."""
    unsaid = world.unsaid_phrase.get((creature.name, attribute))
    phrase = rng.choice([i for i in range(WAYS_TO_SAY) if i != unsaid])
    return " ".join(statement(creature, attribute, phrase)) + "."


def ask(world: World, rng: random.Random, creature: Creature, attribute: str) -> str:
    """A question for a fact, in one of the phrases that training text may use."""
    unasked = world.unasked_phrase.get((creature.name, attribute))
    phrase = rng.choice([i for i in range(WAYS_TO_ASK) if i != unasked])
    return question(creature, attribute, phrase)
