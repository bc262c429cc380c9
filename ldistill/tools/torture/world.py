"""What a tortured run trains on: the shipped tiny pair, and shards small enough to be read twice.

Each document is a question and an answer of a few words; one in five has no picture. ``mixture``
says how many documents each source has and how many of them are text alone.
"""

from __future__ import annotations

import io
import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from ldistill.common.locate import resolve
from ldistill.common.samples import Sample, Turn
from ldistill.data.build.build_types import BuildOptions
from ldistill.data.build.builder import build_shards
from ldistill.models.nanovlm_format import load_processor

STUDENT = "pkg://ldistill.tiny/pair/student"
TEACHER = "pkg://ldistill.tiny/pair/teacher"
_WORDS = ("red", "green", "blue", "cat", "dog", "fish", "seven", "nine", "total", "date", "left")


@dataclass(frozen=True)
class Mixture:
    """Documents by source, and the share of them without a picture."""

    documents: dict[str, int]
    text_only: float = 0.2


ORDINARY = Mixture({"docvqa": 48, "vqav2": 48})
TEXTUAL = Mixture({"docvqa": 16, "vqav2": 32}, text_only=0.8)
HARDLY_DISTILLING = Mixture({"docvqa": 56, "vqav2": 8})


def write_world(folder: Path, mixture: Mixture = ORDINARY) -> Path:
    """Build shards under ``folder``, several per source; returns their folder."""
    processor = load_processor(resolve(STUDENT))
    samples = {name: _samples(name, n, mixture) for name, n in mixture.documents.items()}
    build_shards(samples, folder, processor, options=BuildOptions(shard_bytes=40_000))
    return folder


def _samples(source: str, count: int, mixture: Mixture) -> list[Sample]:
    rng = random.Random(zlib.crc32(source.encode()))
    made = []
    for number in range(count):
        words = rng.choices(_WORDS, k=rng.randint(2, 6))
        turn = Turn(f"what is {' '.join(words)}?", " ".join(reversed(words)))
        textual = rng.random() < mixture.text_only
        images = () if textual else (_picture(rng.randrange(2**31)),)
        made.append(Sample(f"{source}-{number}", source, (turn,), images))
    return made


def _picture(seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def write_recipe(path: Path, shards: Path, **fields: object) -> Path:
    """A recipe for many small steps with frequent checkpoints; ``fields`` override."""
    values = {
        "student": STUDENT,
        "teacher": TEACHER,
        "shards": str(shards),
        "sources": ",".join(sorted(p.parent.name for p in shards.glob("*/index.json"))),
        "max_length": 96,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "distil": "language",
        "logging_steps": 1,
        "save_steps": 3,
        "save_total_limit": 2,
        "health_steps": 0,
        "log_samples": True,
        "seed": 11,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_num_workers": 0,
    }
    path.write_text(yaml.safe_dump(values | fields), encoding="utf-8")
    return path


def write_engine(path: Path, stage: int) -> Path:
    """A DeepSpeed configuration of a ZeRO stage."""
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu")
    automatic += ("gradient_accumulation_steps", "gradient_clipping")
    config = dict.fromkeys(automatic, "auto")
    config |= {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage}}
    path.write_text(json.dumps(config), encoding="utf-8")
    return path
