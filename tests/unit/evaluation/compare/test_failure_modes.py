"""The failure modes' rules on hand-made cases: the paper's examples, and what they are not."""

from __future__ import annotations

import random
import string

import pytest

from ldistill.evaluation.compare.failure_modes import (
    Lexicon,
    PictureText,
    accepted_answers,
    distance,
    english,
    judge,
    tokens,
)

RECEIPT = PictureText(
    ("MON–SUN: 1000 hrs - 2200 hrs\nDate 02/02/2018  06/03/18  08/03/18 18:04\n"
     "Sub total 13.40 Total RM 14.20\nNutrition staff and program staff, 21–49 years of age",),
    "the picture's text",
    whole=True,
)  # fmt: skip
UNKNOWN = PictureText()
LEXICON = Lexicon(["peace", "saul", "soul", "the", "total", "house"])


def mode(answer, expected, text=RECEIPT, lexicon=LEXICON):
    accepted = expected if isinstance(expected, list) else [expected]
    verdict = judge(answer, accepted, lambda: text, lexicon)
    return verdict.mode, verdict.rule


@pytest.mark.parametrize(
    ("expected", "answer", "rule"),
    [
        ("PEAEC", "peace", "word"),  # the paper's own
        ("hosue st", "house st", "word"),
    ],
)
def test_corrected_into_words(expected, answer, rule):
    assert mode(answer, expected) == ("corrected", rule)


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("soul", "saul"),  # the expected one is a word: a misreading
        ("PEAEC", "total"),  # a word, but not near
        ("PEAEC", "peaek"),  # near, but no word
        ("PEAEC", "the peace"),  # not the same number of words
        ("P3A3C", "peace"),  # digits are no letters
        ("xq", "the"),  # too short to tell
    ],
)
def test_not_corrected(expected, answer):
    assert mode(answer, expected, UNKNOWN)[0] != "corrected"


def test_near_words_need_a_language():
    lexicon = english()
    if lexicon is None:
        pytest.skip("pyspellchecker is not installed")
    assert mode("meltid", "meLtiid", lexicon=lexicon) == ("corrected", "near-word")
    assert mode("peace", "PEAEC", lexicon=lexicon) == ("corrected", "word")
    assert mode("meltiid", "meLtid", lexicon=lexicon)[0] != "corrected"
    assert mode("xkqzj", "xkqzv", lexicon=lexicon)[0] != "corrected"


def test_without_words_the_mode_is_not_looked_for():
    assert mode("peace", "PEAEC", lexicon=None)[0] == "other"


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("02/02/2018", "mon–sun: 1000 hrs – 2200 hrs"),  # the paper's three
        ("06/03/18", "08/03/18 18:04"),
        ("14.20", "13.40"),
        ("program staff", "Nutrition staff"),  # shares a word, but stands there
    ],
)
def test_read_from_the_wrong_spot(expected, answer):
    assert mode(answer, expected) == ("elsewhere", "elsewhere")


@pytest.mark.parametrize(
    ("expected", "answer", "text", "expected_mode"),
    [
        ("14.20", "13.41", RECEIPT, "other"),  # stands nowhere
        ("14.20", "3.40", RECEIPT, "other"),  # only a part of a number that stands there
        ("14.20", "and", RECEIPT, "other"),  # a word that stands everywhere
        ("14.20", "13.40", UNKNOWN, "undecided"),
        ("14.20", "", RECEIPT, "other"),
        ("14.20", "14.20 total", RECEIPT, "other"),  # holds the answer
    ],
)
def test_not_the_wrong_spot(expected, answer, text, expected_mode):
    assert mode(answer, expected, text)[0] == expected_mode


def test_a_part_of_the_text_cannot_rule_out():
    some = PictureText(("13.40",), "the answer to another question", whole=False)
    assert mode("13.40", "14.20", some)[0] == "elsewhere"
    assert mode("13.41", "14.20", some)[0] == "undecided"


@pytest.mark.parametrize(
    ("expected", "answer", "rule"),
    [
        ("5.04", "5", "number cut"),  # the paper's
        ("25.9", "25", "number cut"),
        ("25.9", "26", "number cut"),  # rounded
        ("$25.90", "25.9", "notation"),
        ("21–49 years of age", "21–49 years", "part"),
        ("Federal Department of Agriculture", "Department of Agriculture", "part"),
        ("$1,000", "1000", "notation"),
        ("06/03/18", "June 3, 2018", "notation"),
        ("National Science Foundation", "NSF", "initials"),
        ("NSF", "national science foundation", "initials"),
        ("director of the nutrition program", "nutrition program leader", "reworded"),
    ],
)
def test_shortened_or_paraphrased(expected, answer, rule):
    assert mode(answer, expected) == ("shortened", rule)


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("5.04", "6"),
        ("5.04", "50"),
        ("25.9", "24"),
        ("12345", "1234"),  # a digit lost is a misreading
        ("21–49 years of age", "of"),
        ("21–49 years of age", "49 months old"),  # little of it
        ("National Science Foundation", "NFS"),
        ("total", "tota"),
        ("06/03/18", "July 3, 2018"),
    ],
)
def test_not_shortened(expected, answer):
    assert mode(answer, expected, UNKNOWN)[0] == "undecided"


def test_the_nearest_accepted_answer_counts():
    verdict = judge("5", ["five and a bit", "5.04"], lambda: UNKNOWN, LEXICON)
    assert verdict == ("shortened", "number cut", "5 is 5.04 cut off")


def test_pictures_are_read_only_when_they_decide():
    def never():
        raise AssertionError("the picture was read")

    assert judge("5", ["5.04"], never, LEXICON).mode == "shortened"


@pytest.mark.parametrize(
    ("target", "accepted"),
    [("total", ["total"]), ("['a', 'b c']", ["a", "b c"]), ("[sic]", ["[sic]"]), ("[]", ["[]"])],
)
def test_accepted_answers(target, accepted):
    assert accepted_answers(target) == accepted


def test_tokens():
    assert tokens("It's RM 1,234.50 – 02/02/2018!") == ["it's", "rm", "1234.50", "02", "02", "2018"]


def test_distance_against_recursion():
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        best = min(slow(a[:-1], b), slow(a, b[:-1])) + 1
        best = min(best, slow(a[:-1], b[:-1]) + (a[-1] != b[-1]))
        if len(a) > 1 and len(b) > 1 and a[-2:] == b[-1] + b[-2]:
            best = min(best, slow(a[:-2], b[:-2]) + 1)
        return best

    rng = random.Random(0)
    for _ in range(60):
        a, b = ("".join(rng.choices(string.ascii_lowercase[:3], k=rng.randint(0, 5))) for _ in "ab")
        assert distance(a, b) == slow(a, b) == distance(b, a)
