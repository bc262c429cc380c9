"""The work on one row of input, done by a pool: read, check pictures, tokenise, lay out bytes.

Everything slow in a build happens here; the main process only appends finished bytes to a shard.
Results come back in the order of the rows, whatever the number of workers, and only a bounded
number of rows is under way at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ldistill.common.images import storable
from ldistill.common.samples import BadImage, Drop, Processor, Sample
from ldistill.data.archive import MOST_TILES, pack_sample, sample_key

Convert = Callable[[int, Any], list[Sample | Drop]]
ROWS_PER_TASK = 8
TASKS_PER_WORKER = 3


@dataclass
class Prepared:
    """What became of one row: the bytes and counts of its sample, or the drops."""

    row: int
    block: bytes | None = None
    tokens: int = 0
    supervised: int = 0
    prompt: int = 0
    tiles: int = 0
    drops: list[Drop] = field(default_factory=list)


def keep(row: int, value: Any) -> list[Sample | Drop]:
    """The converter of rows that are samples or drops already."""
    return [value]


def prepare(row: int, items: list[Sample | Drop], source: str, processor: Processor) -> Prepared:
    """Check and encode the (at most one) sample among `items`."""
    result = Prepared(row)
    for item in items:
        if isinstance(item, Drop):
            result.drops.append(item)
            continue
        try:
            _encode(result, item, source, processor)
        except BadImage as error:
            result.drops.append(Drop(error.reason, item.id, detail=error.detail))
    return result


def _encode(result: Prepared, sample: Sample, source: str, processor: Processor) -> None:
    if reason := _unusable(sample, processor):
        result.drops.append(Drop(reason[0], sample.id, detail=reason[1]))
        return
    stored = [storable(data) for data in sample.images]
    sizes = [(int(d["width"]), int(d["height"])) for _, d in stored]
    document = processor.encode(sample.turns, sizes, sample.system)
    if not document.supervised:
        result.drops.append(Drop("no answer", sample.id))
        return
    images = tuple(data for data, _ in stored)
    kept = replace(sample, source=source, images=images)
    result.block = pack_sample(sample_key(source, result.row), kept, [d for _, d in stored])
    result.tokens, result.supervised = len(document.input_ids), document.supervised
    result.prompt = document.prompt
    image_tokens = int((document.input_ids == processor.image_token_id).sum())
    result.tiles = min(image_tokens // processor.images.tokens_per_tile, MOST_TILES)


def _unusable(sample: Sample, processor: Processor) -> tuple[str, str] | None:
    """Why a sample cannot be used, in short and in detail."""
    most = processor.images.max_images
    if not sample.turns:
        return "no turns", ""
    if len(sample.images) > most:
        return "too many images", f"{len(sample.images)} pictures: raise --max-images from {most}"
    if sample.system and not processor.takes_system:
        return "system turn", "the student's chat template takes none"
    try:
        texts = (turn.user + turn.assistant for turn in sample.turns)
        "".join([sample.id, sample.system, *texts]).encode()
    except UnicodeEncodeError as error:
        return "invalid text", str(error)
    return None


_processor: Processor | None = None


def _start_worker(processor: Processor) -> None:
    global _processor
    _processor = processor
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the pool in order
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A build that is killed must not leave idle workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_task(rows: list[tuple[int, Any]], convert: Convert, source: str) -> list[Prepared]:
    assert _processor is not None
    return [prepare(row, convert(row, value), source, _processor) for row, value in rows]


class Workers:
    """A pool that prepares rows; `count` 0 or 1 works in this process. Use as a context manager."""

    def __init__(self, processor: Processor, count: int) -> None:
        self.processor, self.count = processor, count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count > 1:
            self._pool = ProcessPoolExecutor(
                self.count,
                # Tokenizers run threads of their own, which a forked child would miss.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.processor,),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self, rows: Iterable[tuple[int, Any]], convert: Convert, source: str
    ) -> Iterator[Prepared]:
        """Prepared rows in the order of `rows`."""
        if self._pool is None:
            for row, value in rows:
                yield prepare(row, convert(row, value), source, self.processor)
            return
        rows, waiting = iter(rows), deque[Future[list[Prepared]]]()
        try:
            while True:
                while len(waiting) < TASKS_PER_WORKER * self.count and (
                    task := list(islice(rows, ROWS_PER_TASK))
                ):
                    waiting.append(self._pool.submit(_run_task, task, convert, source))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                f"a worker of the build of {source} died, probably for want of memory: run the "
                "same command again with fewer workers; finished shards are kept"
            ) from error
        finally:
            for future in waiting:
                future.cancel()
