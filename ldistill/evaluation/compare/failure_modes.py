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

Near is an edit distance (a swap of neighbours counts 1) of at most half the expected length. Words
are compared without case; tokens are words and numbers. With several accepted answers the nearest
counts. What no rule takes is ``other``, or ``undecided`` where only the unknown text of the picture
could tell. The rules count, they don't explain: a misread 13.40 that also stands on the receipt is
``elsewhere``.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal, InvalidOperation
from functools import cached_property

CORRECTED, ELSEWHERE, SHORTENED = "corrected", "elsewhere", "shortened"
OTHER, UNDECIDED = "other", "undecided"
MODES: dict[str, str] = {
    CORRECTED: "Text corrected into a word",
    ELSEWHERE: "Right text from the wrong spot",
    SHORTENED: "Shortened or paraphrased",
    OTHER: "None of the three",
    UNDECIDED: "Undecided",
}
"""Mode → title, in the order of a report."""

USUAL = 20
"""Words that must have a run of three letters before it counts as usual."""

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_DATE = re.compile(r"\d{1,4}([/.-])\d{1,2}\1\d{1,4}")
_STOP = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with")
)


class Lexicon:
    """Words of a language, and which letter runs are usual in it."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = frozenset(word.lower() for word in words if word.isalpha())

    def __contains__(self, word: str) -> bool:
        return word.lower() in self.words

    @cached_property
    def _runs(self) -> Counter[str]:
        return Counter(run for word in self.words for run in _runs(word))

    def usual(self, word: str) -> bool:
        """Whether every run of three letters, edges included, is usual."""
        return all(self._runs[run] >= USUAL for run in _runs(word.lower()))


def english() -> Lexicon | None:
    """Pyspellchecker's English words; None when the package is not installed."""
    try:
        from spellchecker import SpellChecker
    except ImportError:
        return None
    return Lexicon(SpellChecker(language="en").word_frequency.dictionary)


def _runs(word: str) -> list[str]:
    edged = f"^{word}$"
    return [edged[i : i + 3] for i in range(len(edged) - 2)]


@dataclass(frozen=True)
class PictureText:
    """What is known of the text in a picture.

    ``whole`` says whether it is all of it: only then can a text be said not to be there.
    """

    texts: tuple[str, ...] = ()
    source: str = ""
    whole: bool = False

    def holds(self, text: str) -> bool:
        """Whether ``text`` stands there, token for token (or, if long, letter for letter)."""
        wanted = tokens(text)
        squashed = "".join(wanted)
        for known in self.texts:
            found = tokens(known)
            if wanted and _run_in(wanted, found):
                return True
            if len(squashed) >= 6 and squashed in "".join(found):
                return True
        return False


@dataclass(frozen=True)
class Verdict:
    """The mode of a wrong answer, the rule that took it and a sentence that says why."""

    mode: str
    rule: str
    reason: str
    expected: str
    """The accepted answer it was compared with."""


KnownText = Callable[[], PictureText]
"""The picture's text, looked up when a rule asks for it: reading a picture takes seconds."""


def judge(
    answer: str, accepted: Sequence[str], text: KnownText, lexicon: Lexicon | None
) -> Verdict:
    """The failure mode of a wrong answer.

    Args:
        answer: what the model said.
        accepted: answers that would have been right; at least one.
        text: gives what is known of the picture's text.
        lexicon: words; without one the first mode is not looked for.

    Raises:
        ValueError: no accepted answer.
    """
    if not accepted:
        raise ValueError("a wrong answer can only be judged against an accepted one.")
    expected = min(accepted, key=lambda a: distance(_plain(answer), _plain(a)))
    for mode, rule in _RULES:
        found = rule(answer, expected, text, lexicon)
        if found is not None:
            return Verdict(mode, *found, expected)
    if not tokens(answer):
        return Verdict(OTHER, "empty", "nothing was answered", expected)
    known = text()
    if not known.whole:
        reason = "not in what is known of the picture's text" if known.texts else "no text known"
        return Verdict(UNDECIDED, "no text", reason, expected)
    return Verdict(OTHER, "none", "no rule applies", expected)


def accepted_answers(target: str) -> list[str]:
    """Accepted answers of a logged target, which is a string or the string of a list."""
    if target.startswith("["):
        try:
            values = ast.literal_eval(target)
        except (ValueError, SyntaxError):
            return [target]
        if isinstance(values, list) and values:
            return [str(value) for value in values]
    return [target]


_Found = tuple[str, str] | None


def _corrected(answer: str, expected: str, text: KnownText, lexicon: Lexicon | None) -> _Found:
    got, wanted = tokens(answer), tokens(expected)
    if lexicon is None or len(got) != len(wanted):
        return None
    changed = [(w, g) for w, g in zip(wanted, got) if w != g]
    if not changed or not all(_can_be_word(w, g, lexicon) for w, g in changed):
        return None
    old, new = changed[0]
    if all(g in lexicon for _, g in changed):
        return "word", f"{old!r} is no word, {new!r} is one"
    if all(g in lexicon or (lexicon.usual(g) and not lexicon.usual(w)) for w, g in changed):
        return "near-word", f"{new!r} is spelt like a word, {old!r} is not"
    return None


def _can_be_word(wanted: str, got: str, lexicon: Lexicon) -> bool:
    letters = wanted.isalpha() and got.isalpha() and len(wanted) >= 3 and len(got) >= 2
    return letters and wanted not in lexicon and distance(wanted, got) <= len(wanted) // 2


def _number_cut(answer: str, expected: str, text: KnownText, lexicon: Lexicon | None) -> _Found:
    got, wanted = _only_number(answer), _only_number(expected)
    if got is None or wanted is None:
        return None
    places, had = -got.as_tuple().exponent, -wanted.as_tuple().exponent
    if not places < had:
        return None
    for how, name in ((ROUND_DOWN, "cut off"), (ROUND_HALF_UP, "rounded")):
        if wanted != got and wanted.quantize(Decimal(1).scaleb(-places), how) == got:
            return "number cut", f"{got} is {wanted} {name}"
    return None


def _part(answer: str, expected: str, text: KnownText, lexicon: Lexicon | None) -> _Found:
    got, wanted = tokens(answer), tokens(expected)
    if not 0 < len(got) < len(wanted) or not set(got) - _STOP:
        return None
    rest = iter(wanted)
    if all(token in rest for token in got):
        return "part", f"{len(got)} of {len(wanted)} words"
    return None


def _notation(answer: str, expected: str, text: KnownText, lexicon: Lexicon | None) -> _Found:
    if _plain(answer) == _plain(expected):
        return None
    got, wanted = _only_number(answer), _only_number(expected)
    added = set(tokens(answer)) - set(tokens(expected))
    if got is not None and got == wanted and not any(token.isalpha() for token in added):
        return "notation", "the same number, written otherwise"
    got_date, wanted_date = _date(answer), _date(expected)
    if got_date is not None and got_date == wanted_date:
        return "notation", "the same date, written otherwise"
    return None


def _initials(answer: str, expected: str, text: KnownText, lexicon: Lexicon | None) -> _Found:
    got, wanted = tokens(answer), tokens(expected)
    for short, long in ((got, wanted), (wanted, got)):
        if len(short) == 1 and len(long) >= 2 and short[0].isalpha() and len(short[0]) >= 2:
            firsts = ("".join(t[0] for t in long), "".join(t[0] for t in long if t not in _STOP))
            if short[0] in firsts:
                return "initials", f"{short[0].upper()} for {' '.join(long)}"
    return None


def _elsewhere(answer: str, expected: str, text: KnownText, lexicon: Lexicon | None) -> _Found:
    words = tokens(answer)
    if not words or not set(words) - _STOP or words == tokens(expected):
        return None
    if len("".join(words)) < 2 or _run_in(tokens(expected), words):
        return None
    known = text()
    return ("elsewhere", f"it stands in {known.source}") if known.holds(answer) else None


def _reworded(answer: str, expected: str, text: KnownText, lexicon: Lexicon | None) -> _Found:
    got, wanted = set(tokens(answer)) - _STOP, set(tokens(expected)) - _STOP
    shared = len(got & wanted)
    if len(wanted) < 2 or shared == 0 or tokens(answer) == tokens(expected):
        return None
    if 2 * shared / (len(got) + len(wanted)) >= 0.5:
        return "reworded", f"{shared} of {len(wanted)} words kept"
    return None


_RULES = (
    (CORRECTED, _corrected),
    (SHORTENED, _number_cut),
    (SHORTENED, _part),
    (SHORTENED, _notation),
    (SHORTENED, _initials),
    (ELSEWHERE, _elsewhere),
    (SHORTENED, _reworded),
)


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


def _run_in(wanted: Sequence[str], found: Sequence[str]) -> bool:
    size = len(wanted)
    return size > 0 and any(
        list(found[i : i + size]) == list(wanted) for i in range(len(found) - size + 1)
    )


def _only_number(text: str) -> Decimal | None:
    """The number of a text that holds one number, a unit or a currency at most."""
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) != 1 or _DATE.search(text):
        return None
    around = text[: numbers[0].start()] + " " + text[numbers[0].end() :]
    if len(tokens(around)) > 1:
        return None
    try:
        return Decimal(numbers[0].group().replace(",", ""))
    except InvalidOperation:
        return None


def _date(text: str) -> object | None:
    """The day a text names; None for anything that is not clearly a whole date."""
    from dateutil import parser

    if not _DATE.search(text) and not re.search(r"[a-z]{3,}.*\d{4}|\d{4}.*[a-z]{3,}", text.lower()):
        return None
    try:
        return parser.parse(text).date()
    except (ValueError, OverflowError):
        return None
