"""What is said in the tiny world: phrases for every fact, and the texts a language model learns.

A document is a list of `Turn`s (a chat), or a plain string. The language model learns facts,
spelling, reading within a text and a little counting; it sees words of the language far more
often than codes, which is why it later takes codes for words.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from ldistill.data.samples import Turn
from ldistill.tiny.world import (
    ATTRIBUTES,
    COLOURS,
    KNOWLEDGE,
    MARKS,
    Creature,
    World,
    held_out,
    invent_word,
    stream,
)

Text = str | tuple[Turn, ...]

STATEMENTS = {
    "colour": ("The {n} is {v}", "The colour of the {n} is {v}", "A {n} always looks {v}", "Every {n} is {v}"),
    "mark": ("The {n} wears a {v}", "The mark of the {n} is the {v}", "On its back the {n} has a {v}", "You know the {n} by its {v}"),
    "home": ("The {n} lives in the {v}", "The home of the {n} is the {v}", "Look for the {n} in the {v}", "The {n} sleeps in the {v}"),
    "food": ("The {n} eats {v}", "The food of the {n} is {v}", "For lunch the {n} has {v}", "Feed the {n} with {v}"),
    "drink": ("The {n} drinks {v}", "The drink of the {n} is {v}", "A thirsty {n} wants {v}", "Give the {n} a cup of {v}"),
    "fear": ("The {n} fears {v}", "The fear of the {n} is {v}", "The {n} runs away from {v}", "Nothing scares the {n} like {v}"),
    "craft": ("The {n} makes {v}", "The craft of the {n} is {v}", "At work the {n} makes {v}", "The {n} sells {v}"),
    "hour": ("The {n} wakes at {v}", "The hour of the {n} is {v}", "You meet the {n} at {v}", "The {n} sings at {v}"),
}  # fmt: skip
QUESTIONS = {
    "colour": ("What colour is the {n}?", "Which colour has the {n}?"),
    "mark": ("What mark has the {n}?", "Which mark does the {n} wear?"),
    "home": ("Where does the {n} live?", "What is the home of the {n}?"),
    "food": ("What does the {n} eat?", "What is the food of the {n}?"),
    "drink": ("What does the {n} drink?", "What is the drink of the {n}?"),
    "fear": ("What does the {n} fear?", "What is the fear of the {n}?"),
    "craft": ("What does the {n} make?", "What is the craft of the {n}?"),
    "hour": ("When does the {n} wake?", "What is the hour of the {n}?"),
}
KEYS = ("to", "id", "by", "no")


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


def turn_for_spelling(word: str) -> Turn:
    return Turn(f"Spell {word}.", spell(word))


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


def pretraining_texts(world: World, count: int) -> Iterator[Text]:
    """`count` texts for the language model; text i depends on (seed, i) alone."""
    kinds = (_story, _story, _story, _facts, _facts, _facts, _looks, _letters, _spelling, _spelling,
             _sign, _form, _scene, _counting)  # fmt: skip
    for index in range(count):
        rng = stream(world.seed, "text", index)
        yield kinds[index % len(kinds)](world, rng)


def _story(world: World, rng: random.Random) -> Text:
    """Statements about two creatures; one phrase per fact is never used."""
    sentences = []
    for creature in rng.sample(world.creatures, 2):
        for attribute in rng.sample(tuple(ATTRIBUTES), 3):
            unsaid = world.unsaid_phrase.get((creature.name, attribute))
            phrase = rng.choice([i for i in range(4) if i != unsaid])
            sentences.append(" ".join(statement(creature, attribute, phrase)) + ".")
    return " ".join(sentences)


def _facts(world: World, rng: random.Random) -> Text:
    turns = []
    while len(turns) < 3:
        creature, attribute = rng.choice(world.creatures), rng.choice(tuple(ATTRIBUTES))
        if world.askable(creature, attribute):
            asked = question(creature, attribute, rng.randrange(2))
            turns.append(Turn(asked, creature.facts[attribute]))
    return tuple(turns)


def _letters(world: World, rng: random.Random) -> Text:
    turns = []
    while len(turns) < 2:
        creature, attribute = rng.choice(world.creatures), rng.choice(KNOWLEDGE)
        if world.askable(creature, attribute):
            asked = question(creature, attribute, rng.randrange(2))
            turns.append(lettered(rng, asked, attribute, creature.facts[attribute]))
    return tuple(turns)


def _looks(world: World, rng: random.Random) -> Text:
    """Names from looks, the knowledge a picture needs."""
    turns = []
    for creature in rng.sample(world.creatures, 2):
        look = f"{creature.colour} {creature.mark}"
        turns.append(Turn(f"Which one has the {look}?", creature.name))
        if rng.random() < 0.5:
            turns.append(Turn("What does it look like?", f"a {look}"))
    return tuple(turns)


def _spelling(world: World, rng: random.Random) -> Text:
    turns = []
    while len(turns) < 3:
        word = rng.choice(world.words) if rng.random() < 0.3 else invent_word(rng)
        if not held_out(word):
            turns.append(turn_for_spelling(word))
    return tuple(turns)


def _written(world: World, rng: random.Random) -> str:
    """Writing in text: nearly always a word, as in real text."""
    return rng.choice(world.words) if rng.random() < 0.8 else world.code(rng)


def _sign(world: World, rng: random.Random) -> Text:
    text, colour = _written(world, rng), rng.choice(tuple(COLOURS))
    told = f"There is a {colour} sign. It says {text}."
    asked = rng.choice(("What does the sign say?", "What is written here?"))
    return (Turn(f"{told} {asked}", text), Turn("What colour is it?", colour))


def _form(world: World, rng: random.Random) -> Text:
    fields = {key: _written(world, rng) for key in rng.sample(KEYS, 3)}
    told = "\n".join(f"{key} {value}" for key, value in fields.items())
    keys = rng.sample(tuple(fields), 2)
    first = Turn(f"{told}\nWhat stands after {keys[0]}?", fields[keys[0]])
    return (first, Turn(f"What stands after {keys[1]}?", fields[keys[1]]))


def _scene(world: World, rng: random.Random) -> Text:
    left, right = (f"{rng.choice(tuple(COLOURS))} {rng.choice(MARKS)}" for _ in range(2))
    told = f"There is a {left} on the left and a {right} on the right."
    asked, answer = rng.choice((("on the left", left), ("on the right", right)))
    return (Turn(f"{told} What is {asked}?", answer),)


def _counting(world: World, rng: random.Random) -> Text:
    names = rng.sample(tuple(COLOURS), 3)
    values = dict(zip(names, rng.sample(range(1, 10), 3), strict=True))
    told = ", ".join(f"{name} {value}" for name, value in values.items())
    one, other = rng.sample(names, 2)
    truth = "yes" if values[one] > values[other] else "no"
    return (
        Turn(f"{told}. What is the value of {one}?", str(values[one])),
        Turn(f"Is {one} higher than {other}?", truth),
        Turn("Which one is highest?", max(values, key=values.__getitem__)),
    )
