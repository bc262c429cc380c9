"""The tiny world: invented creatures with facts, what is said of them, and what is held out.

A creature has a look (a colour and a mark, unique to it) and six facts that no picture shows.
Its facts are told in text, asked in text and asked about pictures; these rules decide
what no training data ever contains, so that the benchmark measures what was learnt otherwise:

* `never_pictured`: (creature, attribute) pairs that no question about a picture ever asks for;
* `unsaid_phrase`, `unasked_phrase`: for every pair, the one of several ways to state it and the
  one of several ways to ask for it that no text uses;
* `held_out(text)`: words and codes that are never spelt in text and never shown in pictures.

Creatures and things are written in small letters; what is written in pictures is in capitals.
Everything follows from the seed.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from ldistill.common.samples import Turn

WORLD_VERSION = 2
DEFAULT_SEED = 7

_FILE = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
COLOURS = {name: tuple(rgb) for name, rgb in _FILE["colours"].items()}
ATTRIBUTES = {name: tuple(about["values"]) for name, about in _FILE["attributes"].items()}
STATEMENTS = {name: about["statements"] for name, about in _FILE["attributes"].items()}
QUESTIONS = {name: about["questions"] for name, about in _FILE["attributes"].items()}
MARKS = ATTRIBUTES["mark"]
LOOKS = ("colour", "mark")
KNOWLEDGE = tuple(name for name in ATTRIBUTES if name not in LOOKS)

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "l", "n", "r", "s", "t")
# Writing is a syllable and two consonants, a piece each; a syllable begins exactly one word.
SYLLABLES = tuple((onset + vowel).upper() for onset in _ONSETS[:12] for vowel in _VOWELS[:4])
ENDINGS = tuple(a + b for a in "BDGKLMNP" for b in "FRSTVX")
PIECES = (*SYLLABLES, *ENDINGS)
HELD_OUT_SHARE = 8  # one string in eight
WAYS_TO_SAY, WAYS_TO_ASK = 4, 3


@dataclass(frozen=True)
class Writing:
    """How strings are chosen that a scene shows."""

    codes: float  # share of strings that are no word
    everything: bool  # whether words and facts may occur that no picture is to show


PICTURED = Writing(0.5, everything=False)
TRANSCRIBED = Writing(0.6, everything=True)
EDITED = Writing(0.1, everything=True)


def held_out(text: str) -> bool:
    """Whether a word or code is kept for the benchmark: a fixed eighth of all strings."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def stream(seed: int, *names: object) -> random.Random:
    """An independent random stream for every (seed, name, ...)."""
    return random.Random("/".join(map(str, (seed, *names))))


@dataclass(frozen=True)
class Creature:
    """One invented creature: `facts` maps each of ATTRIBUTES to its value."""

    name: str
    facts: dict[str, str]

    @property
    def colour(self) -> str:
        return self.facts["colour"]

    @property
    def mark(self) -> str:
        return self.facts["mark"]


class World:
    """Creatures, words and held-out pairs, all a function of the seed.

    Args:
        seed: any integer; another seed gives other names, facts and splits.
    """

    def __init__(self, seed: int = DEFAULT_SEED) -> None:
        self.seed = seed
        rng = stream(seed, "world")
        endings = rng.sample(ENDINGS, len(ENDINGS))
        self.words = tuple(a + b for a, b in zip(SYLLABLES, endings, strict=True))
        # Pictures of the training data may show the former, only the benchmark shows the latter.
        self.shown_words = tuple(word for word in self.words if not held_out(word))
        self.hidden_words = tuple(word for word in self.words if held_out(word))
        looks = [{"colour": colour, "mark": mark} for colour in COLOURS for mark in MARKS]
        names = _invent_names(rng, len(looks))
        self.creatures = tuple(
            Creature(name, look | {a: rng.choice(ATTRIBUTES[a]) for a in KNOWLEDGE})
            for name, look in zip(names, looks, strict=True)
        )
        pairs = [(c.name, a) for c in self.creatures for a in KNOWLEDGE]
        rng.shuffle(pairs)
        self.never_pictured = frozenset(pairs[: len(pairs) // 2])
        self.unsaid_phrase = {pair: rng.randrange(WAYS_TO_SAY) for pair in sorted(pairs)}
        self.unasked_phrase = {pair: rng.randrange(WAYS_TO_ASK) for pair in sorted(pairs)}

    def code(self, rng: random.Random, hidden: bool = False) -> str:
        """A syllable with an ending that makes no word."""
        while True:
            text = rng.choice(SYLLABLES) + rng.choice(ENDINGS)
            if text not in self.words and held_out(text) == hidden:
                return text

    def word(self, rng: random.Random, hidden: bool = False) -> str:
        """A word of the language, shown in training pictures or (`hidden`) in none."""
        return rng.choice(self.hidden_words if hidden else self.shown_words)

    def writing(self, rng: random.Random, how: Writing) -> str:
        """A string to be read."""
        if rng.random() < how.codes:
            return self.code(rng)
        return rng.choice(self.words) if how.everything else self.word(rng)


def _invent_names(rng: random.Random, count: int) -> tuple[str, ...]:
    found: dict[str, None] = {}
    while len(found) < count:
        name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2))
        found[name + rng.choice(_CODAS[1:])] = None
    return tuple(found)


def pieces(text: str) -> list[str]:
    """What is written, in parts of two capitals or one other character."""
    return re.findall("[A-Z]{2}|.", text)


def invent_word(rng: random.Random) -> str:
    """A pronounceable word of three to five letters."""
    word = rng.choice(_ONSETS) + rng.choice(_VOWELS)
    if rng.random() < 0.7:
        word += rng.choice(_ONSETS) + rng.choice(_VOWELS)
    return word + rng.choice(_CODAS[1:] if len(word) == 2 else _CODAS)


# ---- what is said ----


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
