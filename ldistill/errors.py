"""Failures that may pass by themselves, apart from those that somebody has to put right."""

from __future__ import annotations

ERROR_EXIT_CODE = 2
"""Of a command that says what to change: the same command would fail the same way."""
TRANSIENT_EXIT_CODE = 75
"""Of a run that may simply be started again (``EX_TEMPFAIL`` of sysexits.h)."""


class TransientError(OSError):
    """A store out of reach, a disk that is full, a worker that was killed: try again later."""


def exit_code(error: BaseException) -> int:
    """What a program that ends with this error exits with."""
    return TRANSIENT_EXIT_CODE if isinstance(error, TransientError) else ERROR_EXIT_CODE


def worker_died(error: BaseException) -> TransientError | None:
    """The error for a data worker that was killed, if that is what PyTorch's error says.

    PyTorch raises it from a signal handler, wherever the program just stands.
    """
    text = str(error)
    if not (isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid")):
        return None
    return TransientError(
        f"a data worker was killed ({text.splitlines()[0].rstrip('. ')}): when memory is what was "
        "missing, lower --dataloader_num_workers or ask for more"
    )
