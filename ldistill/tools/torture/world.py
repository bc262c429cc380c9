"""What a tortured run trains on, and where its ranks meet.

Shards are small enough to be read twice. Each document is a question and an answer of a few words
about a picture, or without one.
"""

from __future__ import annotations

import io
import random
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ldistill.common.samples import Sample, Turn
from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.models.formats import load_processor
from ldistill.tiny.prepare import STUDENT

RECIPE = Path(__file__).with_name("recipe.yaml")
_WORDS = ("red", "green", "blue", "cat", "dog", "fish", "seven", "nine", "total", "date", "left")


def write_shards(
    folder: Path,
    documents: Mapping[str, int],
    text_only: float = 0.2,
    *,
    student: str | Path = STUDENT,
    shard_bytes: int = 40_000,
) -> Path:
    """Build shards for a student under ``folder``, several per source; returns their folder.

    ``documents`` says how many by source; a share of them, ``text_only``, has no picture.
    """
    samples = {
        source: [_sample(source, number, text_only) for number in range(count)]
        for source, count in documents.items()
    }
    options = BuildOptions(shard_bytes=shard_bytes)
    build_shards(samples, folder, load_processor(student), options=options)
    return folder


def _sample(source: str, number: int, text_only: float) -> Sample:
    name = f"{source}-{number}"
    rng, picture = random.Random(name), io.BytesIO()
    words = rng.choices(_WORDS, k=rng.randint(2, 6))
    turn = Turn(f"what is {' '.join(words)}?", " ".join(reversed(words)))
    if rng.random() < text_only:
        return Sample(name, source, (turn,), ())
    Image.frombytes("RGB", (4, 4), rng.randbytes(48)).resize((64, 64), 0).save(picture, "PNG")
    return Sample(name, source, (turn,), (picture.getvalue(),))


def place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment in which a launcher starts a rank of one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    numbers["MASTER_PORT"] = port
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(n) for name, n in numbers.items()}


def free_port() -> int:
    """A port that nobody listens on, from below those that the system gives to connections."""
    while True:
        port = 10_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def discard_buffers(port: int) -> None:
    """Remove DeepSpeed's buffers in shared memory; ranks on a CPU may hold hundreds of MiB."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink(missing_ok=True)
