"""The tiny world's benchmark as local lmms-eval tasks, made once for a chat template and kept."""

from __future__ import annotations

from pathlib import Path

from ldistill.common.locate import default_cache
from ldistill.evaluation.items import write_tasks
from ldistill.tiny.benchmark import ITEMS_PER_TASK, benchmark
from ldistill.tiny.prepare import made_once
from ldistill.tiny.world import DEFAULT_SEED, WORLD_VERSION, World

PREFIX = "tiny_"


def prepare_tasks(
    cache_dir: str | Path | None = None,
    *,
    items_per_task: int | None = None,
) -> Path:
    """Folder for lmms-eval's ``--include_path``, from the cache or made now.

    Args:
        cache_dir: where it is kept; default `default_cache()`.
        items_per_task: held-out items of each task; default `ITEMS_PER_TASK`.

    Raises:
        OSError: no room or no permission in the cache folder.
    """
    count = items_per_task or ITEMS_PER_TASK
    made_from = {"world": WORLD_VERSION, "seed": DEFAULT_SEED, "items_per_task": count, "format": 2}

    def make(folder: Path, final: Path) -> None:
        write_tasks(benchmark(World(), count), folder, PREFIX)
        for path in folder.glob("*.yaml"):  # they name their data by its path
            text = path.read_text(encoding="utf-8").replace(str(folder), str(final))
            path.write_text(text, encoding="utf-8")

    return made_once(Path(cache_dir or default_cache()).resolve(), "tiny-tasks", made_from, make)
