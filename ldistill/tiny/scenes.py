"""Pictures with questions in The Cauldron's spirit: one small function per source.

Language-heavy sources ask what a picture means (creatures, counts, places, who is higher);
document sources ask what is written in it. None uses a string or a fact that the benchmark holds
out.

Every scene can also be told in words. That is how the language model meets the same questions
without a picture, as real language models do: it can read a table long before it can see one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from ldistill.common.samples import Sample, Turn
from ldistill.tiny.pictures import CELL, FOOT, Canvas
from ldistill.tiny.world import COLOURS, KNOWLEDGE, MARKS, Creature, World, Writing, lettered

PICTURED, TRANSCRIBED, EDITED = Writing(0.5, False), Writing(0.6, True), Writing(0.1, True)
TRANSCRIBED_SHARE = 0.4  # of scenes told in words
NAMING = ("What is the name of this one?", "Who is this?")


@dataclass
class Scene:
    """A picture, the same thing in words, and all questions about it.

    A picture is asked up to `most` of them in any order; without it, all in this order.
    """

    canvas: Canvas
    told: str
    turns: list[Turn]
    most: int | None = None

    @property
    def caption(self) -> Turn:
        return Turn("Tell all there is.", self.told)


def portrait(creature: Creature, rng: Random) -> Canvas:
    """A creature's mark in its colour, anywhere, large or small."""
    canvas = Canvas(rng)
    radius = rng.uniform(10, 22)
    x, y = (rng.uniform(radius + 2, 62 - radius) for _ in range(2))
    canvas.mark(creature.facts["mark"], creature.facts["colour"], x, y, radius)
    return canvas


def _known(world: World, rng: Random, how: Writing) -> tuple[Creature, str, str]:
    """A creature, a fact that may be asked about it, and a question for it."""
    while True:
        creature, attribute = rng.choice(world.creatures), rng.choice(KNOWLEDGE)
        if how.everything or (creature.name, attribute) not in world.never_pictured:
            return creature, attribute, creature.question_unnamed(rng, attribute)


def aokvqa(world: World, rng: Random, how: Writing) -> Scene:
    creature, attribute, asked = _known(world, rng, how)
    turns = [Turn(asked, creature.facts[attribute])]
    if rng.random() < 0.5:
        turns.insert(0, Turn(rng.choice(NAMING), creature.name))
    return Scene(portrait(creature, rng), creature.look, turns)


def scienceqa(world: World, rng: Random, how: Writing) -> Scene:
    creature, attribute, asked = _known(world, rng, how)
    turn = lettered(rng, asked, attribute, creature.facts[attribute])
    return Scene(portrait(creature, rng), creature.look, [turn])


def vqav2(world: World, rng: Random, how: Writing) -> Scene:
    creature = rng.choice(world.creatures)
    colour, mark = creature.facts["colour"], creature.facts["mark"]
    guess = rng.choice((colour, rng.choice(tuple(COLOURS))))
    turns = [
        Turn(rng.choice(NAMING), creature.name),
        Turn("What colour is it?", colour),
        Turn("What mark is it?", mark),
        Turn(f"Is it {guess}?", "yes" if guess == colour else "no"),
        Turn("What does it look like?", f"a {creature.look}"),
    ]
    return Scene(portrait(creature, rng), creature.look, turns, 3)


def _two(world: World, rng: Random) -> tuple[Canvas, str, list[tuple[Creature, str]]]:
    """Two creatures side by side or one above the other: picture, words, who is where."""
    creatures = rng.sample(world.creatures, 2)
    canvas, aside = Canvas(rng), rng.random() < 0.5
    for creature, middle in zip(creatures, (16, 48), strict=True):
        along, across = middle + rng.uniform(-3, 3), 32 + rng.uniform(-14, 14)
        x, y = (along, across) if aside else (across, along)
        canvas.mark(creature.facts["mark"], creature.facts["colour"], x, y, rng.uniform(8, 11))
    places = ("on the left", "on the right") if aside else ("above", "below")
    placed = list(zip(creatures, places, strict=True))
    return canvas, ", ".join(f"{creature.look} {place}" for creature, place in placed), placed


def visual7w(world: World, rng: Random, how: Writing) -> Scene:
    canvas, told, [(first, here), (second, there)] = _two(world, rng)
    turns = [
        Turn(f"What is {here}?", first.look),
        Turn(f"What is {there}?", second.look),
        Turn(f"Where is the {first.look}?", here),
        Turn(f"Who is {there}?", second.name),
    ]
    return Scene(canvas, told, turns, 3)


def vsr(world: World, rng: Random, how: Writing) -> Scene:
    canvas, told, placed = _two(world, rng)
    turns = []
    for creature, place in rng.sample(placed, rng.randint(1, 2)):
        _, claimed = rng.choice(placed)
        true = "true" if claimed == place else "false"
        turns.append(Turn(f"The {creature.look} is {claimed}.", true))
    return Scene(canvas, told, turns)


def iconqa(world: World, rng: Random, how: Writing) -> Scene:
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


def _bars(rng: Random, labelled: bool = True) -> tuple[Canvas, str, dict[str, int], str, str]:
    """Three bars of different colours, labelled with their value: picture, words, values, ends."""
    canvas = Canvas(rng)
    values = dict(zip(rng.sample(tuple(COLOURS), 3), rng.sample(range(1, 10), 3), strict=True))
    for place, (colour, value) in enumerate(values.items()):
        left, height = 7 + 20 * place + rng.randint(-2, 2), 4 * value + 4
        canvas.bar(colour, left, height)
        if labelled:
            canvas.write(str(value), (left - 3) / CELL, (FOOT - height) / CELL - 1, jitter=0)
    told = ", ".join(f"{name} {value}" for name, value in values.items())
    return canvas, told, values, max(values, key=values.get), min(values, key=values.get)


def figureqa(world: World, rng: Random, how: Writing) -> Scene:
    canvas, told, values, high, low = _bars(rng, labelled=False)
    one, other = rng.sample(tuple(values), 2)
    turns = [
        Turn(f"Is {one} higher than {other}?", "yes" if values[one] > values[other] else "no"),
        Turn("Which one is highest?", high),
        Turn("Which one is lowest?", low),
    ]
    return Scene(canvas, told, turns, 3)


def chartqa(world: World, rng: Random, how: Writing) -> Scene:
    canvas, told, values, *_ = _bars(rng)
    turns = [Turn(f"What is the value of {name}?", str(value)) for name, value in values.items()]
    return Scene(canvas, told, turns, 3)


def chart2text(world: World, rng: Random, how: Writing) -> Scene:
    canvas, told, *_ = _bars(rng)
    return Scene(canvas, told, [Turn("Write down the chart.", told)])


def vistext(world: World, rng: Random, how: Writing) -> Scene:
    canvas, told, values, high, low = _bars(rng)
    caption = f"The highest is {high} with {values[high]}, the lowest is {low} with {values[low]}."
    return Scene(canvas, told, [Turn("Describe the chart.", caption)])


def _listed(values: Mapping[str, object], between: str = ":") -> str:
    return "\n".join(f"{key}{between}{value}" for key, value in values.items())


def robut_sqa(world: World, rng: Random, how: Writing) -> Scene:
    """A table of words and numbers."""
    canvas = Canvas(rng)
    words = rng.sample(world.words if how.everything else world.shown_words, 3)
    rows = dict(zip(words, rng.sample(range(1, 10), 3), strict=True))
    canvas.write(_listed(rows, ""))
    word = rng.choice(words)
    turns = [
        Turn(f'What is the value of "{word}"?', str(rows[word])),
        Turn("Which one is highest?", max(rows, key=rows.get)),
    ]
    return Scene(canvas, _listed(rows), turns, 2)


def sign(rng: Random, text: str) -> tuple[Canvas, str, str]:
    """Writing and a mark below it: the picture, the mark's colour, the same in words."""
    canvas = Canvas(rng)
    colour, mark = rng.choice(tuple(COLOURS)), rng.choice(MARKS)
    canvas.mark(mark, colour, rng.uniform(18, 46), rng.uniform(34, 46), rng.uniform(9, 14))
    canvas.write(text)
    return canvas, colour, f'{colour} {mark} with "{text}"'


def textvqa(world: World, rng: Random, how: Writing) -> Scene:
    text = world.writing(rng, how)
    canvas, colour, told = sign(rng, text)
    turns = [Turn(rng.choice(("What does the sign say?", "What is written here?")), text)]
    if rng.random() < 0.3:
        turns.append(Turn("What colour is it?", colour))
    return Scene(canvas, told, turns)


def textcaps(world: World, rng: Random, how: Writing) -> Scene:
    canvas, _, told = sign(rng, world.writing(rng, how))
    return Scene(canvas, told, [Turn("Describe the picture.", f"a {told}")])


def ocrvqa(world: World, rng: Random, how: Writing) -> Scene:
    """A cover: title above, author below."""
    canvas, title, author = Canvas(rng), world.writing(rng, how), world.writing(rng, how)
    canvas.write(title, line=0)
    canvas.write(author, line=2)
    turns = [Turn("What is the title?", title), Turn("Who wrote it?", author)]
    return Scene(canvas, f"{title}\n{author}", turns, 2)


def form(rng: Random, values: Sequence[str]) -> tuple[Canvas, dict[str, str]]:
    """A form: a number and a value per line."""
    canvas, fields = Canvas(rng), {str(number): value for number, value in enumerate(values, 1)}
    canvas.write(_listed(fields, ""))
    return canvas, fields


def docvqa(world: World, rng: Random, how: Writing) -> Scene:
    canvas, fields = form(rng, _writings(world, rng, how))
    turns = [Turn(f"What stands after {key}?", value) for key, value in fields.items()]
    return Scene(canvas, _listed(fields), turns, 2)


def _writings(world: World, rng: Random, how: Writing) -> list[str]:
    return [world.writing(rng, how) for _ in range(rng.randint(2, 3))]


def infographic_vqa(world: World, rng: Random, how: Writing) -> Scene:
    """Coloured marks, each with a word beside it."""
    canvas = Canvas(rng)
    labels = {colour: world.writing(rng, how) for colour in rng.sample(tuple(COLOURS), 3)}
    for line, (colour, text) in enumerate(labels.items()):
        canvas.mark(rng.choice(MARKS), colour, 8, 8 + CELL * line, rng.uniform(5, 7))
        canvas.write(text, 1, line)
    turns = [Turn(f"What is the label of {colour}?", text) for colour, text in labels.items()]
    return Scene(canvas, _listed(labels), turns, 2)


def visualmrc(world: World, rng: Random, how: Writing) -> Scene:
    """Lines of a text, to be written down."""
    canvas, lines = Canvas(rng), _writings(world, rng, how)
    turns = [
        Turn("Write down the text.", "\n".join(lines)),
        Turn("What is the first word?", lines[0]),
        Turn("What is the last word?", lines[-1]),
    ]
    canvas.write("\n".join(lines))
    return Scene(canvas, "\n".join(lines), turns, 1)


SOURCES: dict[str, Callable[[World, Random, Writing], Scene]] = {
    make.__name__: make
    for make in (aokvqa, chart2text, chartqa, docvqa, figureqa, iconqa, infographic_vqa, ocrvqa,
                 robut_sqa, scienceqa, textcaps, textvqa, vistext, visual7w, visualmrc, vqav2, vsr)
}  # fmt: skip


def sample(world: World, source: str, index: int, *, aligning: bool = False) -> Sample:
    """A sample for training, or for alignment, where every second one has a full caption first; a
    function of these arguments alone."""
    rng = world.stream("alignment" if aligning else "train", source, index)
    scene = SOURCES[source](world, rng, PICTURED)
    turns = scene.turns
    if scene.most is not None:
        turns = rng.sample(turns, min(len(turns), rng.randint(1, scene.most)))
    if aligning and rng.random() < 0.5:
        turns = [scene.caption, *turns]
    return Sample(f"{source}-{index:06d}", source, tuple(turns), (scene.canvas.png(),))


def told(world: World, source: str, rng: Random) -> tuple[Turn, ...]:
    """A scene of a source in words, as a chat without a picture: told, or laid out in lines.

    Some are transcribed first and read to the letter. In the others a word is often mistyped and
    answered as it should be: so the model learns to correct what is no word, as language models do.
    """
    transcribed = rng.random() < TRANSCRIBED_SHARE
    scene = SOURCES[source](world, rng, TRANSCRIBED if transcribed else EDITED)
    words = f"{scene.told}\n" if rng.random() < 0.3 else scene.canvas.layout()
    turns = scene.turns if scene.most is None else rng.sample(scene.turns, len(scene.turns))
    if transcribed:
        turns = [scene.caption, *turns]
    else:
        words = re.sub("[A-Z]{4}", lambda word: world.mistyped(rng, word[0]), words)
    first, *rest = turns
    return (Turn(f"{words}{first.user}", first.assistant), *rest)
