"""Pictures with questions in The Cauldron's spirit: one small function per source.

Language-heavy sources ask what a picture means (creatures, counts, places, who is higher);
document sources ask what is written in it. `sample(world, source, index)` depends on the seed,
the source and the index alone, and never uses a string or a fact that the benchmark holds out.

Every scene can also be told in words. That is how the language model meets the same questions
without a picture, as real language models do: it can read a table long before it can see one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ldistill.common.samples import Sample, Turn
from ldistill.tiny.pictures import CELL, FOOT, Canvas
from ldistill.tiny.text import lettered, question
from ldistill.tiny.world import (
    COLOURS,
    EDITED,
    KNOWLEDGE,
    MARKS,
    PICTURED,
    TRANSCRIBED,
    WAYS_TO_ASK,
    Creature,
    World,
    Writing,
    mistype,
    stream,
)


@dataclass
class Scene:
    """A picture, the same thing in words, and all questions about it.

    A picture is asked up to `most` of them in any order; without it, all in this order.
    """

    canvas: Canvas
    told: str
    turns: list[Turn]
    most: int | None = None

    def some_turns(self, rng: random.Random) -> list[Turn]:
        """What is asked about the picture."""
        if self.most is None:
            return self.turns
        return rng.sample(self.turns, min(len(self.turns), rng.randint(1, self.most)))

    def every_turn(self, rng: random.Random) -> list[Turn]:
        """All there is to ask, in any order."""
        return self.turns if self.most is None else rng.sample(self.turns, len(self.turns))


KEYS = "123"
TRANSCRIBED_SHARE = 0.4  # of scenes told in words
MISTYPED_SHARE = 0.4  # of the words in the others
_WORD = re.compile("[A-Z]{4}")
NAMING = ("What is the name of this one?", "Who is this?")


def look(creature: Creature) -> str:
    return f"{creature.colour} {creature.mark}"


def portrait(creature: Creature, rng: random.Random) -> Canvas:
    """A creature's mark in its colour, anywhere, large or small."""
    canvas = Canvas(rng)
    radius = rng.uniform(10, 22)
    x, y = (rng.uniform(radius + 2, 62 - radius) for _ in range(2))
    canvas.mark(creature.mark, creature.colour, x, y, radius)
    return canvas


def _known(world: World, rng: random.Random, how: Writing) -> tuple[Creature, str]:
    """A creature and a fact that may be asked about it."""
    while True:
        creature, attribute = rng.choice(world.creatures), rng.choice(KNOWLEDGE)
        if how.everything or world.picturable(creature, attribute):
            return creature, attribute


def aokvqa(world: World, rng: random.Random, how: Writing) -> Scene:
    creature, attribute = _known(world, rng, how)
    asked = question(creature, attribute, rng.randrange(WAYS_TO_ASK), True)
    turns = [Turn(asked, creature.facts[attribute])]
    if rng.random() < 0.5:
        turns.insert(0, Turn(rng.choice(NAMING), creature.name))
    return Scene(portrait(creature, rng), look(creature), turns)


def scienceqa(world: World, rng: random.Random, how: Writing) -> Scene:
    creature, attribute = _known(world, rng, how)
    asked = question(creature, attribute, rng.randrange(WAYS_TO_ASK), True)
    turn = lettered(rng, asked, attribute, creature.facts[attribute])
    return Scene(portrait(creature, rng), look(creature), [turn])


def vqav2(world: World, rng: random.Random, how: Writing) -> Scene:
    creature = rng.choice(world.creatures)
    guess = rng.choice((creature.colour, rng.choice(tuple(COLOURS))))
    turns = [
        Turn(rng.choice(NAMING), creature.name),
        Turn("What colour is it?", creature.colour),
        Turn("What mark is it?", creature.mark),
        Turn(f"Is it {guess}?", "yes" if guess == creature.colour else "no"),
        Turn("What does it look like?", f"a {look(creature)}"),
    ]
    return Scene(portrait(creature, rng), look(creature), turns, 3)


@dataclass
class _Pair:
    """Two creatures side by side or one above the other."""

    canvas: Canvas
    first: Creature
    second: Creature
    here: str
    there: str

    @property
    def told(self) -> str:
        return f"{look(self.first)} {self.here}, {look(self.second)} {self.there}"


def _two(world: World, rng: random.Random) -> _Pair:
    first, second = rng.sample(world.creatures, 2)
    canvas, aside = Canvas(rng), rng.random() < 0.5
    for creature, middle in ((first, 16), (second, 48)):
        along, across = middle + rng.uniform(-3, 3), 32 + rng.uniform(-14, 14)
        x, y = (along, across) if aside else (across, along)
        canvas.mark(creature.mark, creature.colour, x, y, rng.uniform(8, 11))
    places = ("on the left", "on the right") if aside else ("above", "below")
    return _Pair(canvas, first, second, *places)


def visual7w(world: World, rng: random.Random, how: Writing) -> Scene:
    pair = _two(world, rng)
    turns = [
        Turn(f"What is {pair.here}?", look(pair.first)),
        Turn(f"What is {pair.there}?", look(pair.second)),
        Turn(f"Where is the {look(pair.first)}?", pair.here),
        Turn(f"Who is {pair.there}?", pair.second.name),
    ]
    return Scene(pair.canvas, pair.told, turns, 3)


def vsr(world: World, rng: random.Random, how: Writing) -> Scene:
    pair = _two(world, rng)
    turns = []
    for creature in rng.sample((pair.first, pair.second), rng.randint(1, 2)):
        claimed = rng.choice((pair.here, pair.there))
        true = claimed == (pair.here if creature is pair.first else pair.there)
        turns.append(Turn(f"The {look(creature)} is {claimed}.", "true" if true else "false"))
    return Scene(pair.canvas, pair.told, turns)


def iconqa(world: World, rng: random.Random, how: Writing) -> Scene:
    canvas, told = Canvas(rng), []
    counts = {mark: rng.randint(1, 3) for mark in rng.sample(MARKS, 2)}
    places = rng.sample([(x, y) for x in range(4) for y in range(4)], sum(counts.values()))
    for mark, count in counts.items():
        colour = rng.choice(tuple(COLOURS))
        for _ in range(count):
            column, row = places.pop()
            canvas.mark(mark, colour, 8 + 16 * column, 8 + 16 * row, rng.uniform(6, 7))
            told.append(mark)
    turns = [Turn(f"How often is there a {mark}?", str(count)) for mark, count in counts.items()]
    turns.append(Turn("How many things are there?", str(len(told))))
    return Scene(canvas, " ".join(told), turns, 3)


def _bars(rng: random.Random, labelled: bool) -> tuple[Canvas, str, dict[str, int]]:
    """Three bars of different colours; labelled ones carry their value."""
    canvas = Canvas(rng)
    values = dict(zip(rng.sample(tuple(COLOURS), 3), rng.sample(range(1, 10), 3), strict=True))
    for place, (colour, value) in enumerate(values.items()):
        left, height = 7 + 20 * place + rng.randint(-2, 2), 4 * value + 4
        canvas.bar(colour, left, height)
        if labelled:
            canvas.write(str(value), (left - 3) / CELL, (FOOT - height) / CELL - 1, jitter=0)
    return canvas, ", ".join(f"{name} {value}" for name, value in values.items()), values


def figureqa(world: World, rng: random.Random, how: Writing) -> Scene:
    canvas, told, values = _bars(rng, labelled=False)
    one, other = rng.sample(tuple(values), 2)
    turns = [
        Turn(f"Is {one} higher than {other}?", "yes" if values[one] > values[other] else "no"),
        Turn("Which one is highest?", max(values, key=values.__getitem__)),
        Turn("Which one is lowest?", min(values, key=values.__getitem__)),
    ]
    return Scene(canvas, told, turns, 3)


def chartqa(world: World, rng: random.Random, how: Writing) -> Scene:
    canvas, told, values = _bars(rng, labelled=True)
    turns = [Turn(f"What is the value of {name}?", str(value)) for name, value in values.items()]
    return Scene(canvas, told, turns, 3)


def chart2text(world: World, rng: random.Random, how: Writing) -> Scene:
    canvas, told, _ = _bars(rng, labelled=True)
    return Scene(canvas, told, [Turn("Write down the chart.", told)])


def vistext(world: World, rng: random.Random, how: Writing) -> Scene:
    canvas, told, values = _bars(rng, labelled=True)
    high, low = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
    caption = f"The highest is {high} with {values[high]}, the lowest is {low} with {values[low]}."
    return Scene(canvas, told, [Turn("Describe the chart.", caption)])


def robut_sqa(world: World, rng: random.Random, how: Writing) -> Scene:
    """A table of words and numbers."""
    canvas = Canvas(rng)
    words = world.words if how.everything else world.shown_words
    words = rng.sample(words, 3)
    rows = dict(zip(words, rng.sample(range(1, 10), 3), strict=True))
    for line, (word, value) in enumerate(rows.items()):
        canvas.write(f"{word}{value}", 0, line)
    word = rng.choice(words)
    turns = [
        Turn(f'What is the value of "{word}"?', str(rows[word])),
        Turn("Which one is highest?", max(rows, key=rows.__getitem__)),
    ]
    told = "\n".join(f"{word}:{value}" for word, value in rows.items())
    return Scene(canvas, told, turns, 2)


def sign(rng: random.Random, text: str) -> tuple[Canvas, str, str]:
    """Writing and a mark below it: (canvas, colour, mark)."""
    canvas = Canvas(rng)
    colour, mark = rng.choice(tuple(COLOURS)), rng.choice(MARKS)
    canvas.mark(mark, colour, rng.uniform(18, 46), rng.uniform(34, 46), rng.uniform(9, 14))
    canvas.write(text)
    return canvas, colour, mark


def textvqa(world: World, rng: random.Random, how: Writing) -> Scene:
    text = world.writing(rng, how)
    canvas, colour, mark = sign(rng, text)
    turns = [Turn(rng.choice(("What does the sign say?", "What is written here?")), text)]
    if rng.random() < 0.3:
        turns.append(Turn("What colour is it?", colour))
    return Scene(canvas, f'{colour} {mark} with "{text}"', turns)


def textcaps(world: World, rng: random.Random, how: Writing) -> Scene:
    text = world.writing(rng, how)
    canvas, colour, mark = sign(rng, text)
    told = f'{colour} {mark} with "{text}"'
    return Scene(canvas, told, [Turn("Describe the picture.", f"a {told}")])


def ocrvqa(world: World, rng: random.Random, how: Writing) -> Scene:
    """A cover: title above, author below."""
    canvas, title, author = Canvas(rng), world.writing(rng, how), world.writing(rng, how)
    canvas.write(title, line=0)
    canvas.write(author, line=2)
    turns = [Turn("What is the title?", title), Turn("Who wrote it?", author)]
    return Scene(canvas, f"{title}\n{author}", turns, 2)


def form(rng: random.Random, values: Sequence[str]) -> tuple[Canvas, dict[str, str]]:
    """A form: a number and a value per line."""
    canvas = Canvas(rng)
    fields = dict(zip(KEYS, values, strict=False))
    for line, (key, value) in enumerate(fields.items()):
        canvas.write(f"{key}{value}", 0, line)
    return canvas, fields


def docvqa(world: World, rng: random.Random, how: Writing) -> Scene:
    canvas, fields = form(rng, [world.writing(rng, how) for _ in range(rng.randint(2, 3))])
    turns = [Turn(f"What stands after {key}?", value) for key, value in fields.items()]
    told = "\n".join(f"{key}:{value}" for key, value in fields.items())
    return Scene(canvas, told, turns, 2)


def infographic_vqa(world: World, rng: random.Random, how: Writing) -> Scene:
    """Coloured marks, each with a word beside it."""
    canvas = Canvas(rng)
    colours = rng.sample(tuple(COLOURS), 3)
    labels = {colour: world.writing(rng, how) for colour in colours}
    for line, (colour, text) in enumerate(labels.items()):
        canvas.mark(rng.choice(MARKS), colour, 8, 8 + CELL * line, rng.uniform(5, 7))
        canvas.write(text, 1, line)
    turns = [Turn(f"What is the label of {colour}?", text) for colour, text in labels.items()]
    told = "\n".join(f"{colour}:{text}" for colour, text in labels.items())
    return Scene(canvas, told, turns, 2)


def visualmrc(world: World, rng: random.Random, how: Writing) -> Scene:
    """Lines of a text, to be written down."""
    canvas = Canvas(rng)
    lines = [world.writing(rng, how) for _ in range(rng.randint(2, 3))]
    for line, text in enumerate(lines):
        canvas.write(text, 0, line)
    turns = [
        Turn("Write down the text.", "\n".join(lines)),
        Turn("What is the first word?", lines[0]),
        Turn("What is the last word?", lines[-1]),
    ]
    return Scene(canvas, "\n".join(lines), turns, 1)


SOURCES: dict[str, Callable[[World, random.Random, Writing], Scene]] = {
    make.__name__: make
    for make in (aokvqa, chart2text, chartqa, docvqa, figureqa, iconqa, infographic_vqa, ocrvqa,
                 robut_sqa, scienceqa, textcaps, textvqa, vistext, visual7w, visualmrc, vqav2, vsr)
}  # fmt: skip


def sample(world: World, source: str, index: int, split: str = "train") -> Sample:
    """Sample `index` of a source."""
    rng = stream(world.seed, split, source, index)
    scene = SOURCES[source](world, rng, PICTURED)
    turns = tuple(scene.some_turns(rng))
    return Sample(f"{source}-{index:06d}", source, turns, (scene.canvas.png(),))


def samples(world: World, source: str, count: int, split: str = "train") -> Iterator[Sample]:
    """The first `count` samples of a source; `split` names an independent stream."""
    return (sample(world, source, index, split) for index in range(count))


def captioned(world: World, source: str, index: int) -> Sample:
    """Sample `index` for alignment: like any other, every second one with a full caption first."""
    rng = stream(world.seed, "alignment", source, index)
    scene = SOURCES[source](world, rng, PICTURED)
    turns = scene.some_turns(rng)
    if rng.random() < 0.5:
        turns = [_caption(scene), *turns]
    return Sample(f"{source}-{index:06d}", source, tuple(turns), (scene.canvas.png(),))


def told(world: World, source: str, rng: random.Random) -> tuple[Turn, ...]:
    """A scene of a source in words, as a chat without a picture: told, or laid out in lines.

    Some are transcribed first and read to the letter. In the others a word is often mistyped and
    answered as it should be: so the model learns to correct what is no word, as language models do.
    """
    transcribed = rng.random() < TRANSCRIBED_SHARE
    scene = SOURCES[source](world, rng, TRANSCRIBED if transcribed else EDITED)
    words = f"{scene.told}\n" if rng.random() < 0.3 else scene.canvas.layout()
    turns = scene.every_turn(rng)
    if transcribed:
        turns = [_caption(scene), *turns]
    else:
        words = _WORD.sub(lambda found: _maybe_mistype(world, rng, found.group()), words)
    first, *rest = turns
    return (Turn(f"{words}{first.user}", first.assistant), *rest)


def _maybe_mistype(world: World, rng: random.Random, word: str) -> str:
    return mistype(rng, word) if word in world.words and rng.random() < MISTYPED_SHARE else word


def _caption(scene: Scene) -> Turn:
    return Turn("Tell all there is.", scene.told)
