"""A longer step says in a log that it goes on, and stops saying it when it is over."""

from __future__ import annotations

import threading
import time

import pytest

from ldistill.common import telling


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(telling, "INTERVAL", 0.1)


def test_a_log_says_what_begins_and_how_far_it_is(capsys):
    with telling.telling("counting", 8, note="once") as told:
        told.advance(3)
        time.sleep(0.35)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "counting (once) ..."
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("counting: 3 of 8, ") for line in lines[1:])


def test_other_lines_count_as_a_sign_of_life(capsys):
    told = telling.Telling("training")
    for number in range(6):
        time.sleep(0.06)
        told.line(f"step {number}")
    told.end()
    assert capsys.readouterr().out.splitlines() == [f"step {number}" for number in range(6)]


def test_nothing_is_said_after_the_end_even_of_a_failure(capsys):
    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"), telling.telling("breaking"):
        raise ValueError("broken")
    assert threading.active_count() == before
    time.sleep(0.25)
    assert capsys.readouterr().out == "breaking ...\n"
