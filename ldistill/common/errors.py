"""Failures that may pass by themselves, apart from those that somebody has to put right."""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ERROR_EXIT_CODE = 2
"""Of a command that says what to change: the same command would fail the same way."""
TRANSIENT_EXIT_CODE = 75
"""Of a run that may simply be started again (``EX_TEMPFAIL`` of sysexits.h)."""
_DISK_FAILURES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE})


class TransientError(OSError):
    """A store out of reach, a disk that is full, a worker that was killed: try again later."""


def disk_failed(error: BaseException) -> bool:
    """Whether a disk is full, fails, has become read-only or is out of reach."""
    return isinstance(error, OSError) and error.errno in _DISK_FAILURES


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise TransientError with the path where the disk failed; other errors stay what they are."""
    try:
        yield
    except OSError as error:
        if not disk_failed(error):
            raise
        raise TransientError(
            f"{path} could not be written ({error.strerror}): make room or mend the disk"
        ) from error


def may_pass(error: BaseException) -> bool:
    """Whether the same command may go well another time."""
    return isinstance(error, TransientError) or disk_failed(error)


def exit_code(error: BaseException) -> int:
    """What a program that ends with this error exits with."""
    return TRANSIENT_EXIT_CODE if may_pass(error) else ERROR_EXIT_CODE


def did_you_mean(name: str, known: Iterable[str], form: str = "{!r}") -> str:
    """A question behind "no such ...", a space before it; empty where nothing known is alike."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {form.format(close[0])}?" if close else ""


def refuse(cases: Mapping[str, object]) -> None:
    """Raise ValueError with the first of the sentences whose condition holds."""
    if found := [sentence for sentence, holds in cases.items() if holds]:
        raise ValueError(found[0])


def worker_died(error: BaseException) -> TransientError | None:
    """The error for a data worker that was killed, if that is what PyTorch's error says.

    PyTorch raises it from a signal handler, wherever the program just stands. For where a run ends:
    further deaths then no longer interrupt what tells the first one to ranks and user.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text = str(error)
    if not (isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid")):
        return None
    return TransientError(
        f"a data worker was killed ({text.splitlines()[0].rstrip('. ')}): when memory is what was "
        "missing, lower --dataloader_num_workers or ask for more"
    )
