"""The tiny world's benchmark as local lmms-eval tasks, made once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from ldistill.evaluation.items import write_tasks
from ldistill.tiny.benchmark import ITEMS_PER_TASK, benchmark
from ldistill.tiny.prepare import default_cache
from ldistill.tiny.world import DEFAULT_SEED, WORLD_VERSION, World

PREFIX = "tiny_"


def prepare_tasks(
    cache_dir: str | Path | None = None,
    *,
    seed: int = DEFAULT_SEED,
    items_per_task: int | None = None,
) -> Path:
    """Folder for lmms-eval's ``--include_path``, from the cache or made now.

    Args:
        cache_dir: where it is kept; default `default_cache()`.
        seed: of the world; the shipped pair knows the default one.
        items_per_task: held-out items of each task; default `ITEMS_PER_TASK`.

    Raises:
        OSError: no room or no permission in the cache folder.
    """
    count = items_per_task or ITEMS_PER_TASK
    recipe = {"world": WORLD_VERSION, "seed": seed, "items_per_task": count, "format": 2}
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(cache_dir or default_cache()).resolve()
    folder = cache / f"tiny-tasks-{name}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
        try:
            write_tasks(benchmark(World(seed), count), making, PREFIX)
            _settle(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder


def _settle(making: Path, folder: Path) -> None:
    """Rename into place with the paths in the YAML files put right; another may be first."""
    for path in making.glob("*.yaml"):
        text = path.read_text(encoding="utf-8").replace(str(making), str(folder))
        path.write_text(text, encoding="utf-8")
    try:
        os.rename(making, folder)  # noqa: PTH104 - fails where a folder is, as it must
    except OSError:
        if not folder.is_dir():
            raise
