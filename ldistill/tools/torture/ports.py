"""A port for a run on this machine, and what its ranks leave behind under that port's number."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens on, from below those that the system gives to connections."""
    while True:
        port = 10_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def discard_buffers(port: str) -> None:
    """Remove DeepSpeed's buffers in shared memory; ranks on a CPU may hold hundreds of MiB."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink(missing_ok=True)
