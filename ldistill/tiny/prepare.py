"""The tiny run's data: training shards and benchmark items, made once and kept.

    paths = prepare()            # shards and items under the cache folder, built if need be

The folder's name is a fingerprint of everything the data follows from, so another version, seed
or tokenizer never meets stale shards. It appears under that name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldistill.common.samples import Sample
from ldistill.common.telling import telling
from ldistill.data.build.builder import build_shards
from ldistill.evaluation.items import save_items
from ldistill.models.nanovlm_format import load_processor
from ldistill.models.processor import Processor
from ldistill.tiny.benchmark import ITEMS_PER_TASK, benchmark
from ldistill.tiny.scenes import SOURCES, samples
from ldistill.tiny.world import DEFAULT_SEED, WORLD_VERSION, World

STUDENT = "pkg://ldistill.tiny/pair/student"
TEACHER = "pkg://ldistill.tiny/pair/teacher"
SAMPLES_PER_SOURCE = 720


@dataclass(frozen=True)
class TinyData:
    """Where the tiny run's data lies: a folder of shards and a JSONL file of items."""

    shards: Path
    items: Path


def default_cache() -> Path:
    """`$LDISTILL_CACHE`, or `ldistill` in the user's cache folder."""
    if configured := os.environ.get("LDISTILL_CACHE"):
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldistill"


def prepare(
    cache_dir: str | Path | None = None,
    *,
    seed: int = DEFAULT_SEED,
    samples_per_source: int = SAMPLES_PER_SOURCE,
    items_per_task: int = ITEMS_PER_TASK,
    processor: Processor | None = None,
    show_progress: bool = True,
) -> TinyData:
    """Shards and items of the tiny world, from the cache or built now.

    Args:
        cache_dir: where prepared data is kept; default `default_cache()`.
        seed: of the world; the shipped pair knows the default one.
        samples_per_source: training samples of each of the 17 sources.
        items_per_task: held-out items of each task.
        processor: of the student that will train; default the shipped pair's.
        show_progress: whether to draw a progress bar.

    Raises:
        OSError: no room or no permission in the cache folder.
    """
    processor = processor or load_processor(STUDENT)
    recipe = {
        "world": WORLD_VERSION,
        "seed": seed,
        "samples_per_source": samples_per_source,
        "items_per_task": items_per_task,
        "processor": processor.fingerprint(),
    }
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir or default_cache()) / f"tiny-{name}"
    if not folder.is_dir():
        _build(folder, recipe, processor, show_progress)
    return TinyData(folder / "shards", folder / "items.jsonl")


def _build(folder: Path, recipe: dict, processor: Processor, show_progress: bool) -> None:
    """Make everything beside `folder`, then rename: a killed build leaves no half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        world, count = World(recipe["seed"]), recipe["samples_per_source"]
        shown = telling("making the tiny shards", count * len(SOURCES))
        with shown if show_progress else nullcontext() as told:
            rendered = {source: _counted(world, source, count, told) for source in SOURCES}
            build_shards(rendered, making / "shards", processor)
        save_items(benchmark(world, recipe["items_per_task"]), making / "items.jsonl")
        (making / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        _publish(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _publish(making: Path, folder: Path) -> None:
    """Rename into place, unless another process finished the same data first."""
    try:
        making.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _counted(world: World, source: str, count: int, told: Any) -> Iterator[Sample]:
    for sample in samples(world, source, count):
        if told is not None:
            told.advance()
        yield sample
