"""The tiny world: invented creatures with facts, and which of those facts are held out.

A creature has a look (a colour and a mark, unique to it) and six facts that no picture shows.
Its facts are told in text, asked in text and asked about pictures; these rules decide
what no training data ever contains, so that the benchmark measures what was learnt otherwise:

* `never_pictured`: (creature, attribute) pairs that no question about a picture ever asks for;
* `unsaid_phrase`, `unasked_phrase`: for every pair, the one of several ways to state it and the
  one of several ways to ask for it that no text uses;
* `held_out(text)`: words and codes that are never spelt in text and never shown in pictures.

Creatures and things are written in small letters; what is written in pictures is in capitals.

Everything follows from the seed. Try `python -m ldistill.tiny.world` for a look at it.
"""

from __future__ import annotations

import random
import re
import string
import zlib
from dataclasses import dataclass
from functools import cached_property

WORLD_VERSION = 2
DEFAULT_SEED = 7

COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 210),
    "green": (30, 140, 50),
    "yellow": (235, 195, 0),
    "purple": (130, 50, 170),
    "orange": (245, 125, 20),
    "black": (20, 20, 20),
    "cyan": (30, 185, 205),
}
MARKS = ("circle", "square", "triangle", "star", "cross", "moon")
ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "mark": MARKS,
    "home": ("cave", "river", "forest", "desert", "island", "swamp", "meadow", "tower"),
    "food": ("moss", "fish", "honey", "nuts", "roots", "berries", "snails", "bread"),
    "drink": ("milk", "rain", "juice", "tea", "sap", "dew", "cider", "broth"),
    "fear": ("fire", "wind", "thunder", "dogs", "mirrors", "ghosts", "snow", "bells"),
    "craft": ("ropes", "pots", "songs", "clocks", "soap", "masks", "boats", "kites"),
    "hour": ("dawn", "noon", "dusk", "night", "spring", "summer", "autumn", "winter"),
}
LOOKS = ("colour", "mark")
KNOWLEDGE = tuple(name for name in ATTRIBUTES if name not in LOOKS)

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "l", "n", "r", "s", "t")
SYLLABLES = tuple((onset + vowel).upper() for onset in _ONSETS for vowel in _VOWELS)
PIECES = (
    *SYLLABLES,
    *(a + b for a, b in zip(string.ascii_uppercase, "XQTKZWVNFGJHXBLMCPRSDQYWKT")),
)
HELD_OUT_SHARE = 8  # one string in eight
WORDS = 64
WAYS_TO_SAY, WAYS_TO_ASK = 4, 3


@dataclass(frozen=True)
class Writing:
    """How strings are chosen that a scene shows.

    codes: share of strings that are no word.
    everything: whether words and facts may occur that no picture is to show.
    """

    codes: float
    everything: bool


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
        self.words = self._invent_words(rng, WORDS)
        looks = [(colour, mark) for colour in COLOURS for mark in MARKS]
        names = self._invent_names(rng, len(looks))
        self.creatures = tuple(
            self._creature(rng, name, look) for name, look in zip(names, looks, strict=True)
        )
        pairs = [(c.name, a) for c in self.creatures for a in KNOWLEDGE]
        rng.shuffle(pairs)
        self.never_pictured = frozenset(pairs[: len(pairs) // 2])
        self.unsaid_phrase = {pair: rng.randrange(WAYS_TO_SAY) for pair in sorted(pairs)}
        self.unasked_phrase = {pair: rng.randrange(WAYS_TO_ASK) for pair in sorted(pairs)}

    @staticmethod
    def _invent_words(rng: random.Random, count: int) -> tuple[str, ...]:
        """Words of two syllables, in capitals; either syllable tells the word."""
        firsts, seconds = rng.sample(SYLLABLES, count), rng.sample(SYLLABLES, count)
        return tuple(first + second for first, second in zip(firsts, seconds, strict=True))

    @staticmethod
    def _invent_names(rng: random.Random, count: int) -> tuple[str, ...]:
        found: dict[str, None] = {}
        while len(found) < count:
            name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2))
            found[name + rng.choice(_CODAS[1:])] = None
        return tuple(found)

    @staticmethod
    def _creature(rng: random.Random, name: str, look: tuple[str, str]) -> Creature:
        facts = dict(zip(LOOKS, look, strict=True))
        facts.update({attribute: rng.choice(ATTRIBUTES[attribute]) for attribute in KNOWLEDGE})
        return Creature(name, facts)

    @cached_property
    def shown_words(self) -> tuple[str, ...]:
        """Words that pictures of the training data may show."""
        return tuple(word for word in self.words if not held_out(word))

    @cached_property
    def hidden_words(self) -> tuple[str, ...]:
        """Words of the language that only the benchmark shows."""
        return tuple(word for word in self.words if held_out(word))

    def picturable(self, creature: Creature, attribute: str) -> bool:
        """Whether training data may ask for this fact about a picture."""
        return (creature.name, attribute) not in self.never_pictured

    def code(self, rng: random.Random, hidden: bool = False) -> str:
        """Letters that are no word: random ones, or a word with two letters changed."""
        while True:
            if rng.random() < 0.5:
                text = rng.choice(PIECES) + rng.choice(PIECES)
            else:
                text = mistype(rng, rng.choice(self.words))
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


def pieces(text: str) -> list[str]:
    """What is written, in parts of two capitals or one other character."""
    return re.findall("[A-Z]{2}|.", text)


def mistype(rng: random.Random, word: str) -> str:
    """A word of capitals with one of its pieces replaced."""
    parts = pieces(word)
    parts[rng.randrange(len(parts))] = rng.choice(PIECES)
    return "".join(parts)


def invent_word(rng: random.Random) -> str:
    """A pronounceable word of three to five letters."""
    word = rng.choice(_ONSETS) + rng.choice(_VOWELS)
    if rng.random() < 0.7:
        word += rng.choice(_ONSETS) + rng.choice(_VOWELS)
    return word + rng.choice(_CODAS[1:] if len(word) == 2 else _CODAS)


if __name__ == "__main__":
    for creature in World().creatures[::20]:
        print(creature.name, *creature.facts.values())
