"""What the ranks of a run say to one another; on one rank without a launcher, nothing."""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch import Tensor

from ldistill.common.errors import TransientError, may_pass

T = TypeVar("T")
_rounds = itertools.count()


def distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """Ranks of the run."""
    return dist.get_world_size() if distributed() else 1


def index() -> int:
    """This rank's number."""
    return dist.get_rank() if distributed() else 0


def is_first() -> bool:
    """Whether this is rank 0."""
    return index() == 0


def say(text: str) -> None:
    """Print on rank 0."""
    if is_first():
        print(text, flush=True)


def wait() -> None:
    """Until every rank is here."""
    if distributed():
        dist.barrier()


def sum_over(tensor: Tensor) -> Tensor:
    """The tensor, summed in place over all ranks."""
    if distributed():
        dist.all_reduce(tensor)
    return tensor


def end_process(code: int) -> NoReturn:
    """End this process with its own exit code, after what others have registered for its end.

    Python's own end would tear itself down under the C++ threads of torch and its communication;
    one that calls back just then aborts the process, and a run that is done counts as a crash.
    """
    atexit._run_exitfuncs()  # wandb sends what it has, data workers end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(value: T) -> list[T]:
    """Every rank's value (picklable), on every rank."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_first() -> None:
    """Until rank 0 is here too, however long it works alone (minutes to hours).

    A collective gives up after the group's timeout; a key in the group's store has none.
    """
    if not distributed():
        return
    store, key = dist.distributed_c10d._get_default_store(), f"ldistill/round-{next(_rounds)}"
    if dist.get_rank() == 0:
        store.set(key, "here")
    else:
        store.wait([key], timedelta(days=7))


def from_first(make: Callable[[], T]) -> T:
    """``make()`` on rank 0, its result on every rank; an error there is an error everywhere.

    ``make`` must not wait for other ranks. They wait as long as it takes, and what it loads is
    whole: under ZeRO-3 ``generate``, too, would else ask all ranks whether they are done.
    """
    if not distributed():
        return make()
    box: list[Any] = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            with partitioned_by(None):
                box[0] = make()
        except (ValueError, OSError) as error:
            box[1] = error
    wait_for_first()
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise shared(box[1])
    return box[0]


def everywhere(make: Callable[[], T]) -> T:
    """``make()`` on every rank, each its own result; an error on one is an error everywhere.

    For what may differ between machines, such as the files on their disks. ``make`` must not
    wait for other ranks.

    Raises:
        ValueError, OSError: the error, with the names of its machines where others have it not;
            a TransientError where all that failed may pass by itself.
    """
    result, error = None, None
    try:
        result = make()
    except (ValueError, OSError) as caught:
        error = caught

    def told(found: dict[int, tuple[str, str, bool]]) -> BaseException:
        if error is not None and len(found) == count():
            return error
        _, text, passing = min(found.values(), key=lambda said: said[2])
        hosts = ", ".join(sorted({host for host, *_ in found.values()}))
        failed = ", ".join(map(str, found))
        kind = TransientError if passing else ValueError
        return kind(f"on {hosts} (rank {failed}), but not elsewhere: {text}")

    relay(error and (socket.gethostname(), str(error), may_pass(error)), told)
    return result


def relay(own: T | None, told: Callable[[dict[int, T]], BaseException]) -> None:
    """Raise on every rank what any of them has met; nothing where none has. Every rank calls it.

    ``own`` is what this one has met (picklable), None or empty for nothing; ``told`` makes an error
    of what was met, by rank.
    """
    if found := {rank: met for rank, met in enumerate(gather(own)) if met}:
        raise shared(told(found))


def shared(error: T) -> T:
    """Mark an error as one that every rank raises, so that only rank 0 need tell it."""
    error.of_all_ranks = True  # type: ignore[attr-defined]
    return error


@contextmanager
def partitioned_by(config: dict[str, Any] | None) -> Iterator[None]:
    """Partition what transformers loads within over the ranks, by a DeepSpeed configuration; None
    keeps it whole, also while a ZeRO-3 run's own is alive, by which all would be partitioned."""
    from transformers.integrations import deepspeed as integration

    outer = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    kept = integration.HfDeepSpeedConfig(config) if config is not None else None
    try:
        yield
    finally:
        del kept
        integration._hf_deepspeed_config_weak_ref = outer


@contextmanager
def partitioned_by_the_run() -> Iterator[None]:
    """Partition what is loaded within as the run's own configuration says (whole below stage 3)."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        import deepspeed

        # Partitioning counts the ranks by DeepSpeed's own communication, which starts later else.
        deepspeed.init_distributed()
    yield
