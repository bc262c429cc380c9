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
import zlib
from pathlib import Path
from typing import NamedTuple

import yaml

from ldistill.common.samples import Turn

WORLD_VERSION = 2
DEFAULT_SEED = 7

_FILE = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
_ABOUT = _FILE["attributes"].items()
COLOURS = {name: tuple(rgb) for name, rgb in _FILE["colours"].items()}
ATTRIBUTES, STATEMENTS, QUESTIONS = (
    {name: tuple(about[part]) for name, about in _ABOUT}
    for part in ("values", "statements", "questions")
)
MARKS = ATTRIBUTES["mark"]
KNOWLEDGE = tuple(name for name in ATTRIBUTES if name not in ("colour", "mark"))

_ONSETS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_CODAS = ("", "l", "n", "r", "s", "t")
# Writing is a syllable and two consonants, a piece each; a syllable begins exactly one word.
SYLLABLES = tuple((onset + vowel).upper() for onset in _ONSETS[:12] for vowel in _VOWELS[:4])
ENDINGS = tuple(a + b for a in "BDGKLMNP" for b in "FRSTVX")
PIECES = (*SYLLABLES, *ENDINGS)
WAYS_TO_SAY, WAYS_TO_ASK = 4, 3


class Writing(NamedTuple):
    """How strings are chosen that a scene shows."""

    codes: float  # share of strings that are no word
    everything: bool  # whether words and facts may occur that no picture is to show


def held_out(text: str) -> bool:
    """Whether a word or code is kept for the benchmark: a fixed eighth of all strings."""
    return zlib.crc32(text.encode()) % 8 == 0


class Creature(NamedTuple):
    """One invented creature: `facts` maps each of ATTRIBUTES to its value."""

    name: str
    facts: dict[str, str]

    @property
    def look(self) -> str:
        return f"{self.facts['colour']} {self.facts['mark']}"

    def statement(self, attribute: str, phrase: int) -> tuple[str, str]:
        """The beginning of a statement and the value that completes it."""
        before, _ = STATEMENTS[attribute][phrase].split("{v}")
        return before.format(n=self.name).rstrip(), self.facts[attribute]

    def question(self, attribute: str, phrase: int) -> str:
        """A question for a fact."""
        return QUESTIONS[attribute][phrase].format(n=self.name)

    def question_unnamed(self, rng: random.Random, attribute: str) -> str:
        """A question for a fact about the creature in a picture, in any phrase."""
        return rng.choice(QUESTIONS[attribute]).replace("the {n}", "this one")


class World:
    """Creatures, words and held-out pairs, all a function of the seed.

    Args:
        seed: any integer; another seed gives other names, facts and splits.
    """

    def __init__(self, seed: int = DEFAULT_SEED) -> None:
        self.seed = seed
        rng = self.stream("world")
        endings = rng.sample(ENDINGS, len(ENDINGS))
        self.words = tuple(a + b for a, b in zip(SYLLABLES, endings, strict=True))
        # Pictures of the training data may show the former, only the benchmark shows the latter.
        self.shown_words = tuple(word for word in self.words if not held_out(word))
        self.hidden_words = tuple(word for word in self.words if held_out(word))
        looks = [{"colour": colour, "mark": mark} for colour in COLOURS for mark in MARKS]
        names: dict[str, None] = {}
        while len(names) < len(looks):
            name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2))
            names[name + rng.choice(_CODAS[1:])] = None
        self.creatures = tuple(
            Creature(name, look | {a: rng.choice(ATTRIBUTES[a]) for a in KNOWLEDGE})
            for name, look in zip(names, looks, strict=True)
        )
        pairs = [(c.name, a) for c in self.creatures for a in KNOWLEDGE]
        rng.shuffle(pairs)
        self.never_pictured = frozenset(pairs[: len(pairs) // 2])
        self.unsaid_phrase = {pair: rng.randrange(WAYS_TO_SAY) for pair in sorted(pairs)}
        self.unasked_phrase = {pair: rng.randrange(WAYS_TO_ASK) for pair in sorted(pairs)}

    def stream(self, *names: object) -> random.Random:
        """An independent random stream for every (name, ...)."""
        return random.Random("/".join(map(str, (self.seed, *names))))

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

    def mistyped(self, rng: random.Random, word: str) -> str:
        """A word of the language often with another ending; other strings as they are."""
        wrong = word in self.words and rng.random() < 0.4
        return word[:2] + rng.choice(ENDINGS) if wrong else word

    def say(self, rng: random.Random, creature: Creature, attribute: str) -> str:
        """A statement of a fact, in one of the phrases that training text may use."""
        unsaid = self.unsaid_phrase.get((creature.name, attribute))
        phrase = rng.choice([i for i in range(WAYS_TO_SAY) if i != unsaid])
        return " ".join(creature.statement(attribute, phrase)) + "."

    def ask(self, rng: random.Random, creature: Creature, attribute: str) -> str:
        """A question for a fact, in one of the phrases that training text may use."""
        unasked = self.unasked_phrase.get((creature.name, attribute))
        phrase = rng.choice([i for i in range(WAYS_TO_ASK) if i != unasked])
        return creature.question(attribute, phrase)


def invent_word(rng: random.Random) -> str:
    """A pronounceable word of three to five letters."""
    word = rng.choice(_ONSETS) + rng.choice(_VOWELS)
    if rng.random() < 0.7:
        word += rng.choice(_ONSETS) + rng.choice(_VOWELS)
    return word + rng.choice(_CODAS[1:] if len(word) == 2 else _CODAS)


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
