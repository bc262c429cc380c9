"""What the ranks of a run say to one another; on one rank without a launcher, nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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
    return not distributed() or dist.get_rank() == 0


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


def gather(value: T) -> list[T]:
    """Every rank's value (picklable), on every rank."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(make: Callable[[], T]) -> T:
    """``make()`` on every rank; where it fails on some, all raise a sentence that names one.

    Raises:
        ValueError, OSError: this rank's own where every rank failed, else ValueError.
    """
    value, problem = None, None
    try:
        value = make()
    except (ValueError, OSError) as error:
        problem = error
    texts = gather(str(problem) if problem is not None else None)
    if problem is not None and all(text is not None for text in texts):
        raise problem
    hosts = gather(socket.gethostname()) if any(texts) else []
    for rank, text in enumerate(texts):
        if text is not None:
            raise ValueError(f"rank {rank} on {hosts[rank]}: {text}")
    return value


def from_first(make: Callable[[], T]) -> T:
    """``make()`` on rank 0, its result on every rank; an error there is an error everywhere."""
    if not distributed():
        return make()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [(make(), None)]
        except (ValueError, OSError) as error:
            box = [(None, error)]
    dist.broadcast_object_list(box)
    result, error = box[0]
    if error is not None:
        raise error
    return result
