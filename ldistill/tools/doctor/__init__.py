"""Is this machine fit to train, and if not, what to do about it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

OK, WARNING, PROBLEM = "ok", "warning", "problem"


class Line(NamedTuple):
    """One finding; ``advice`` is a single sentence, empty when all is well."""

    state: str
    what: str
    found: str
    advice: str = ""


def judged(good: bool, what: str, found: str, advice: str, otherwise: str = PROBLEM) -> Line:
    """A finding that needs its advice only where it is not good."""
    return Line(OK, what, found) if good else Line(otherwise, what, found, advice)


def driver_present() -> bool:
    """Whether an NVIDIA driver shows a GPU, usable by torch or not."""
    return Path("/dev/nvidia0").exists()


def output(*command: str) -> str:
    """What a quick command prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
