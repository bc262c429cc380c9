"""The tiny run's data: training shards and benchmark items, made once and kept.

    prepare()            # shards and items under the cache folder, built if need be
    prepare_tasks()      # the items as tasks of lmms-eval

The folder's name is a fingerprint of everything the data follows from, so another version, seed
or tokenizer never meets stale shards. It appears under that name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ldistill.common.locate import default_cache
from ldistill.common.samples import Sample
from ldistill.common.telling import telling
from ldistill.data.build.builder import build_shards
from ldistill.evaluation.items import save_items, write_tasks
from ldistill.models.formats import load_processor
from ldistill.tiny.benchmark import ITEMS_PER_TASK, benchmark
from ldistill.tiny.corpus import TEXT, replayed
from ldistill.tiny.scenes import SOURCES, sample
from ldistill.tiny.world import DEFAULT_SEED, WORLD_VERSION, World

STUDENT = "pkg://ldistill.tiny/pair/student"
TEACHER = "pkg://ldistill.tiny/pair/teacher"


class TinyData(NamedTuple):
    """Where the tiny run's data lies: a folder of shards and a JSONL file of items."""

    shards: Path
    items: Path


def prepare(
    cache_dir: str | Path | None = None,
    *,
    samples_per_source: int = 720,
    items_per_task: int = ITEMS_PER_TASK,
    texts: int = 0,
) -> TinyData:
    """Shards and items of the tiny world, from the cache or built now.

    Args:
        cache_dir: where prepared data is kept; default `default_cache()`.
        samples_per_source: training samples of each of the 17 sources.
        items_per_task: held-out items of each task.
        texts: chats of one source more, `text`, which has no pictures; 0: without it.

    Raises:
        OSError: no room or no permission in the cache folder.
    """
    processor = load_processor(STUDENT)
    made_from = {
        "world": WORLD_VERSION,
        "seed": DEFAULT_SEED,
        "samples_per_source": samples_per_source,
        "items_per_task": items_per_task,
        "processor": processor.fingerprint(),
    } | ({"texts": texts} if texts else {})

    def make(folder: Path, final: Path) -> None:
        world = World()
        with telling("making the tiny shards", samples_per_source * len(SOURCES)) as told:

            def samples(source: str) -> Iterator[Sample]:
                for index in range(samples_per_source):
                    told.advance()
                    yield sample(world, source, index)

            made = {source: samples(source) for source in SOURCES}
            made |= {TEXT: replayed(world, texts)} if texts else {}
            about = {"extra": {TEXT: "language"}, "origin": {"licence": "apache-2.0"}}
            build_shards(made, folder / "shards", processor, **about)
        save_items(benchmark(world, items_per_task), folder / "items.jsonl")
        recipe = json.dumps(made_from, indent=2) + "\n"
        (folder / "recipe.json").write_text(recipe, encoding="utf-8")

    folder = _made_once(cache_dir, "tiny", made_from, make)
    return TinyData(folder / "shards", folder / "items.jsonl")


def prepare_with_text() -> TinyData:
    """The same and a text source, for a recipe that replays text: `--mix text=25%`."""
    return prepare(texts=14_400)


def prepare_tasks(items_per_task: int | None = None) -> Path:
    """The benchmark as tasks of lmms-eval: a folder for its ``--include_path``; see `prepare`."""
    count = items_per_task or ITEMS_PER_TASK
    made_from = {"world": WORLD_VERSION, "seed": DEFAULT_SEED, "items_per_task": count, "format": 2}

    def make(folder: Path, final: Path) -> None:
        write_tasks(benchmark(World(), count), folder, "tiny_")
        for path in folder.glob("*.yaml"):  # they name their data by its path
            text = path.read_text(encoding="utf-8").replace(str(folder), str(final))
            path.write_text(text, encoding="utf-8")

    return _made_once(None, "tiny-tasks", made_from, make)


def _made_once(
    cache_dir: str | Path | None, kind: str, made_from: dict, make: Callable[[Path, Path], None]
) -> Path:
    """`cache/KIND-FINGERPRINT`, found, or made beside it and renamed: a killed process leaves no
    half of it."""
    cache = Path(cache_dir or default_cache()).resolve()
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"{kind}-{name}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        make(making, folder)
        making.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder
