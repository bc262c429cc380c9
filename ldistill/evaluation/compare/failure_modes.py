"""How a wrong answer went wrong: the three failure modes of the paper's Appendix E.2, by rule.

Rules in the order in which they are tried, the first that fits counts:

corrected    *word*: the expected token is no word, the answer is a word near it (PEAEC → peace)
             *near-word*: every run of three letters of the answer is usual in the language, unlike
             the expected token's (meLtiid → meltid)
shortened    *number cut*: fewer decimals, cut off or rounded (5.04 → 5)
             *part*: some of the expected words, in order (21–49 years of age → 21–49 years)
             *notation*: the same number or date written otherwise ($1,000 → 1000)
             *initials*: NSF for National Science Foundation, or the reverse
elsewhere    the answer is text of the picture, but not the text that was asked for
shortened    *reworded*: half of the words or more are shared, and the picture does not say it so

Near is an edit distance (a swap of neighbours counts 1) of at most half the expected length. What
no rule takes is ``other``, or ``undecided`` where only the unknown text of the picture could tell.
The rules count: a misread 13.40 that also stands on the receipt is ``elsewhere``.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from functools import cached_property
from typing import NamedTuple

CORRECTED, ELSEWHERE, SHORTENED = "corrected", "elsewhere", "shortened"
OTHER, UNDECIDED = "other", "undecided"
MODES = {
    CORRECTED: "Text corrected into a word",
    ELSEWHERE: "Right text from the wrong spot",
    SHORTENED: "Shortened or paraphrased",
    OTHER: "None of the three",
    UNDECIDED: "Undecided",
}
"""Mode → title, in the order of a report."""
USUAL = 20  # words that must have a run of three letters before it counts as usual
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_DATE = re.compile(r"\d{1,4}([/.-])\d{1,2}\1\d{1,4}")
_STOP = {"a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to"}
_STOP |= {"with"}


class Lexicon:
    """Words of a language, and which letter runs are usual in it."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = {word.lower() for word in words if word.isalpha()}

    def __contains__(self, word: str) -> bool:
        return word.lower() in self.words

    @cached_property
    def _found(self) -> Counter[str]:
        return Counter(run for word in self.words for run in self._runs(word))

    def usual(self, word: str) -> bool:
        """Whether every run of three letters, edges included, is usual."""
        return all(self._found[run] >= USUAL for run in self._runs(word.lower()))

    @staticmethod
    def _runs(word: str) -> list[str]:
        edged = f"^{word}$"
        return [edged[i : i + 3] for i in range(len(edged) - 2)]


def english() -> Lexicon | None:
    """Pyspellchecker's English words; None when the package is not installed."""
    try:
        from spellchecker import SpellChecker
    except ImportError:
        return None
    return Lexicon(SpellChecker(language="en").word_frequency.dictionary)


@dataclass(frozen=True)
class PictureText:
    """What is known of the text in a picture."""

    texts: tuple[str, ...] = ()
    source: str = ""
    whole: bool = False  # all of it: only then can a text be said not to be there

    def holds(self, text: str) -> bool:
        """Whether ``text`` stands there, token for token (or, if long, letter for letter)."""
        wanted, found = tokens(text), [tokens(known) for known in self.texts]
        joined = "".join(wanted)
        long = len(joined) >= 6 and any(joined in "".join(known) for known in found)
        return long or any(_run_in(wanted, known) for known in found)


class Verdict(NamedTuple):
    """The mode of a wrong answer, the rule that took it and a sentence that says why."""

    mode: str
    rule: str
    reason: str


def judge(
    answer: str,
    accepted: Sequence[str],
    text: Callable[[], PictureText],
    lexicon: Lexicon | None,
) -> Verdict:
    """The failure mode of a wrong answer, held against the nearest of at least one accepted.

    The picture's ``text`` is looked up when a rule asks for it: reading a picture takes seconds.
    """
    expected = min(accepted, key=lambda a: distance(_plain(answer), _plain(a)))
    return Verdict(*next(_rules(answer, expected, text, lexicon)))


def accepted_answers(target: str) -> list[str]:
    """Accepted answers of a logged target, which is a string or the string of a list."""
    with suppress(ValueError, SyntaxError):
        values = ast.literal_eval(target) if target.startswith("[") else None
        if values and isinstance(values, list):
            return [str(value) for value in values]
    return [target]


def _rules(
    answer: str, expected: str, text: Callable[[], PictureText], lexicon: Lexicon | None
) -> Iterator[tuple[str, str, str]]:
    """The verdict of each rule that holds; the next is tried when it is asked for."""
    got, wanted = tokens(answer), tokens(expected)
    if changed := _corrected(got, wanted, lexicon):
        (was, now), usual = changed[0], lexicon.usual
        if all(g in lexicon for _, g in changed):
            yield CORRECTED, "word", f"{was!r} is no word, {now!r} is one"
        if all(g in lexicon or (usual(g) and not usual(w)) for w, g in changed):
            yield CORRECTED, "near-word", f"{now!r} is spelt like a word, {was!r} is not"

    number, other = _only_number(answer), _only_number(expected)
    if number is not None and other is not None and number != other:
        places, had = -number.as_tuple().exponent, -other.as_tuple().exponent
        for how, name in ((ROUND_DOWN, "cut off"), (ROUND_HALF_UP, "rounded")):
            if places < had and other.quantize(Decimal(1).scaleb(-places), how) == number:
                yield SHORTENED, "number cut", f"{number} is {other} {name}"

    rest, said = iter(wanted), set(got) - _STOP
    if len(got) < len(wanted) and said and all(token in rest for token in got):
        yield SHORTENED, "part", f"{len(got)} of {len(wanted)} words"

    if _plain(answer) != _plain(expected):
        added = set(got) - set(wanted)
        if number is not None and number == other and not any(t.isalpha() for t in added):
            yield SHORTENED, "notation", "the same number, written otherwise"
        date = _date(answer)
        if date is not None and date == _date(expected):
            yield SHORTENED, "notation", "the same date, written otherwise"

    for short, long in ((got, wanted), (wanted, got)):
        if len(short) == 1 and len(long) >= 2 and short[0].isalpha() and len(short[0]) >= 2:
            firsts = ("".join(t[0] for t in long), "".join(t[0] for t in long if t not in _STOP))
            if short[0] in firsts:
                yield SHORTENED, "initials", f"{short[0].upper()} for {' '.join(long)}"

    if said and len("".join(got)) >= 2 and not _run_in(wanted, got):
        known = text()
        if known.holds(answer):
            yield ELSEWHERE, "elsewhere", f"it stands in {known.source}"

    words = set(wanted) - _STOP
    shared = len(said & words)
    if len(words) >= 2 and shared and got != wanted and 4 * shared >= len(said) + len(words):
        yield SHORTENED, "reworded", f"{shared} of {len(words)} words kept"

    if not got:
        yield OTHER, "empty", "nothing was answered"
    known = text()
    if not known.whole:
        reason = "not in what is known of the picture's text" if known.texts else "no text known"
        yield UNDECIDED, "no text", reason
    yield OTHER, "none", "no rule applies"


def _corrected(
    got: Sequence[str], wanted: Sequence[str], lexicon: Lexicon | None
) -> list[tuple[str, str]]:
    """(expected, answered) tokens that differ, if each may be one corrected into the other."""
    if lexicon is None or len(got) != len(wanted):
        return []
    changed = [(w, g) for w, g in zip(wanted, got, strict=True) if w != g]
    letters = all(w.isalpha() and g.isalpha() and len(w) >= 3 and len(g) >= 2 for w, g in changed)
    near = letters and all(distance(w, g) <= len(w) // 2 for w, g in changed)
    return changed if near and not any(w in lexicon for w, _ in changed) else []


def tokens(text: str) -> list[str]:
    """Words and numbers of a text in lower case, thousands separators taken out."""
    found = _TOKEN.findall(text.lower())
    return [re.sub(r"(?<=\d),(?=\d{3}\b)", "", token) for token in found]


def distance(a: str, b: str) -> int:
    """Edit distance between two strings in which a swap of neighbours counts 1."""
    before, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, older[j - 2] + 1)
            row.append(best)
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _run_in(wanted: list[str], found: list[str]) -> bool:
    size = len(wanted)
    return size > 0 and any(found[i : i + size] == wanted for i in range(len(found) - size + 1))


def _only_number(text: str) -> Decimal | None:
    """The number of a text that holds one number, a unit or a currency at most."""
    numbers = _NUMBER.findall(text)
    if len(numbers) != 1 or _DATE.search(text) or len(tokens(_NUMBER.sub(" ", text))) > 1:
        return None
    return Decimal(numbers[0].replace(",", ""))


def _date(text: str) -> object | None:
    """The day a text names; None for anything that is not clearly a whole date."""
    from dateutil import parser

    if _DATE.search(text) or re.search(r"[a-z]{3,}.*\d{4}|\d{4}.*[a-z]{3,}", text.lower()):
        with suppress(ValueError, OverflowError):
            return parser.parse(text).date()
    return None
