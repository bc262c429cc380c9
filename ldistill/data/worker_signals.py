"""Data workers that live through the signals which ask their run to stop.

A scheduler that preempts a job may signal all of its processes. PyTorch's workers die of SIGTERM,
and the rank with them, before it could save anything.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def outlive_signals(worker: int) -> None:
    """Let a worker obey SIGTERM from its parent alone; for ``DataLoader(worker_init_fn=...)``."""
    if not hasattr(signal, "sigwaitinfo"):  # not Linux
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()  # getppid() may be a fork server
    number = os.getppid() if parent is None else parent.pid
    threading.Thread(target=_obey_parent, args=(number,), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
