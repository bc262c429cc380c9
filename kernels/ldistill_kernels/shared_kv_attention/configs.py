"""Tile sizes: a fixed table instead of autotuning, so that ranks agree and first steps never stall.

The key is what decides whether a configuration fits and is fast: how much shared memory a block
may use (the device class), the head dim, the element size, and whether queries are dense. The
table in force is the newest one made for a Triton not newer than the installed one, because the
best choice moves between Triton versions. `override` swaps the choice for tests and for sweeps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

# KiB of shared memory one block may use -> the compute capabilities that have it.
# Datacentre Blackwell has no more of it than Hopper, but its code needs more registers.
BLACKWELL = 228
DEVICE_CLASSES = {99: (86, 89, 120), 163: (80,), 227: (90,), BLACKWELL: (100,)}
INTERPRETER = 0
DIM_BUCKETS = (64, 96, 128, 256)


@dataclass(frozen=True)
class Config:
    """Tile of one kernel: lanes x memory positions, warps, pipeline stages.

    `max_registers` keeps ptxas from spilling a few bytes for the sake of occupancy.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of the dQ programs and of the dK/dV programs, which share one launch."""

    dq_m: int
    dq_n: int
    dkv_m: int
    dkv_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


_overrides: dict[str, Config | BackwardConfig] = {}


@contextmanager
def override(**configs: Config | BackwardConfig) -> Iterator[None]:
    """Use `forward=Config(...)` or `backward=BackwardConfig(...)` whatever the table says."""
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def overridden() -> bool:
    return bool(_overrides)


def forward_config(
    device: torch.device, head_dim: int, itemsize: int, dense: bool, plain: bool
) -> Config:
    """Tile of the forward.

    Args:
        dense: most memory positions have a query of their own.
        plain: neither invisible positions nor a second segment.
    """
    if "forward" in _overrides:
        return _overrides["forward"]
    key = device_class(device), dim_bucket(head_dim), itemsize, dense
    return PLAIN_FORWARD[key] if plain and key in PLAIN_FORWARD else forward_table()[key]


def backward_config(
    device: torch.device, head_dim: int, itemsize: int, plain: bool
) -> BackwardConfig:
    """Tiles of the backward; `plain` as in the forward, and no gradient buffers."""
    if "backward" in _overrides:
        return _overrides["backward"]
    key = device_class(device), dim_bucket(head_dim), itemsize
    return PLAIN_BACKWARD[key] if plain and key in PLAIN_BACKWARD else backward_table()[key]


def is_dense(queries: int, batch: int, seq: int) -> bool:
    """Whether queries are so many that a tile of 128 lanes stays within one document.

    Below that, wide tiles straddle documents, and every document pays for all queries of the tile.
    """
    return queries * 4 >= batch * seq


def dim_bucket(head_dim: int) -> int:
    return next(bound for bound in DIM_BUCKETS if head_dim <= bound)


def split_head_dim(head_dim: int, worth: float = 1.0) -> tuple[int, int]:
    """Two powers of two that cover the head dim with less padding than one: 80 -> 64 + 16.

    One, and 0, unless the two together are smaller than `worth` of it.
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    main = whole // 2
    tail = max(16, 1 << (head_dim - main - 1).bit_length()) if head_dim > main else 0
    return (main, tail) if main >= 16 and main + tail < worth * whole else (whole, 0)


def split_backward(head_dim: int) -> tuple[int, int]:
    """The backward holds four such pairs in registers: 64 + 32 needs more of them than one 128."""
    return split_head_dim(head_dim, worth=0.7)


@lru_cache
def device_class(device: torch.device) -> int:
    """KiB of shared memory one block may use, rounded down to a class; 0: the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if properties.major == 10:
        return BLACKWELL
    limit = properties.shared_memory_per_block_optin // 1024
    fitting = [kib for kib in DEVICE_CLASSES if kib <= limit]
    if not fitting:
        raise ValueError(
            f"{device} gives a block {limit} KiB of shared memory, the Triton kernels need "
            f"{min(DEVICE_CLASSES)}; use kernels='reference'"
        )
    return max(fitting)


@lru_cache
def triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _newest(tables: dict) -> dict:
    fitting = [version for version in tables if version <= triton_version()]
    table = tables[max(fitting, default=min(tables))]
    # Blackwell takes Hopper's tiles but for a few of its own.
    return {(BLACKWELL, *key[1:]): tile for key, tile in table.items() if key[0] == 227} | table


@lru_cache
def forward_table() -> dict[tuple[int, int, int, bool], Config]:
    """(device class, head dim bucket, element size, dense) -> Config."""
    return _newest(_FORWARD)


@lru_cache
def backward_table() -> dict[tuple[int, int, int], BackwardConfig]:
    """(device class, head dim bucket, element size) -> BackwardConfig."""
    return _newest(_BACKWARD)


_FP32_FORWARD = {
    64: Config(32, 32, 8, 1, 255),
    96: Config(32, 16, 8, 1, 255),
    128: Config(32, 32, 8, 1, 255),
    256: Config(16, 16, 8, 1, 255),
}
_FP32_BACKWARD = {
    64: BackwardConfig(16, 16, 16, 16, 4, 1, 255),
    96: BackwardConfig(16, 16, 16, 16, 8, 1, 255),
    128: BackwardConfig(16, 16, 16, 16, 8, 1, 255),
    256: BackwardConfig(16, 16, 16, 16, 8, 1, 255),
}
_FORWARD_38 = {
    (227, 64, 2, True): Config(128, 64, 8, 3),
    (227, 64, 2, False): Config(64, 64, 4, 3),
    (227, 96, 2, True): Config(64, 64, 8, 3),
    (227, 96, 2, False): Config(64, 32, 4, 3),
    (227, 128, 2, True): Config(128, 64, 8, 3),
    (227, 128, 2, False): Config(64, 32, 4, 3),
    (227, 256, 2, True): Config(64, 16, 8, 2),
    (227, 256, 2, False): Config(64, 16, 8, 2),
    (163, 64, 2, True): Config(128, 64, 8, 3),
    (163, 64, 2, False): Config(64, 32, 4, 3, 255),
    (163, 96, 2, True): Config(128, 32, 8, 3),
    (163, 96, 2, False): Config(64, 32, 8, 2),
    (163, 128, 2, True): Config(128, 32, 8, 3),
    (163, 128, 2, False): Config(64, 32, 8, 2),
    (163, 256, 2, True): Config(32, 32, 8, 2, 255),
    (163, 256, 2, False): Config(32, 32, 8, 2, 255),
    (99, 64, 2, True): Config(128, 64, 8, 2),
    (99, 64, 2, False): Config(64, 32, 4, 3, 255),
    (99, 96, 2, True): Config(128, 16, 8, 2, 255),
    (99, 96, 2, False): Config(64, 16, 8, 2, 255),
    (99, 128, 2, True): Config(64, 32, 8, 2),
    (99, 128, 2, False): Config(64, 32, 8, 2),
    (99, 256, 2, True): Config(32, 32, 8, 1, 255),
    (99, 256, 2, False): Config(32, 32, 8, 1, 255),
    **{
        (kib, dim, 4, dense): config
        for kib in DEVICE_CLASSES
        for dim, config in _FP32_FORWARD.items()
        for dense in (False, True)
    },
    **{
        (INTERPRETER, dim, size, dense): Config(64, 64, 4, 1)
        for dim in DIM_BUCKETS
        for size in (2, 4)
        for dense in (False, True)
    },
}
_BACKWARD_38 = {
    (227, 64, 2): BackwardConfig(128, 64, 64, 128, 8, 2),
    (227, 96, 2): BackwardConfig(64, 32, 32, 64, 8, 2),
    (227, 128, 2): BackwardConfig(64, 32, 32, 64, 8, 2),
    (227, 256, 2): BackwardConfig(32, 32, 32, 32, 8, 1, 255),
    (163, 64, 2): BackwardConfig(64, 32, 32, 64, 4, 2),
    (163, 96, 2): BackwardConfig(32, 32, 32, 32, 8, 2, 255),
    (163, 128, 2): BackwardConfig(64, 32, 32, 32, 8, 2),
    (163, 256, 2): BackwardConfig(32, 32, 32, 32, 8, 1, 255),
    (99, 64, 2): BackwardConfig(64, 32, 32, 64, 8, 2),
    (99, 96, 2): BackwardConfig(32, 16, 16, 32, 8, 1, 255),
    (99, 128, 2): BackwardConfig(64, 32, 32, 64, 8, 2),
    (99, 256, 2): BackwardConfig(32, 32, 32, 32, 8, 1, 255),
    **{(kib, dim, 4): x for kib in DEVICE_CLASSES for dim, x in _FP32_BACKWARD.items()},
    **{
        (INTERPRETER, dim, size): BackwardConfig(64, 64, 64, 64, 4, 1)
        for dim in DIM_BUCKETS
        for size in (2, 4)
    },
}
# What fits, on some Triton only, where nothing but keys and values is read. Of no other class, not
# even Blackwell.
PLAIN_FORWARD = {
    (227, 64, 2, False): Config(64, 64, 4, 3, 168),  # three blocks a multiprocessor, not two
    (99, 64, 2, True): Config(128, 64, 8, 2),
}
PLAIN_BACKWARD = {
    (227, 64, 2): BackwardConfig(128, 64, 64, 128, 8, 2),
    (227, 128, 2): BackwardConfig(128, 64, 32, 128, 8, 2),
}
# Earlier compilers need more registers: entries that spilled there take less.
_FORWARD = {
    (3, 6): _FORWARD_38
    | {
        (227, 96, 2, False): Config(64, 32, 4, 3, 255),
        (BLACKWELL, 128, 2, True): Config(128, 32, 8, 3),
        (163, 128, 2, True): Config(64, 32, 8, 2),
        (99, 64, 2, True): Config(128, 32, 8, 2),
    },
    (3, 7): _FORWARD_38
    | {
        (227, 96, 2, False): Config(64, 32, 4, 3, 255),
        (163, 128, 2, True): Config(64, 32, 8, 2),
    },
    (3, 8): _FORWARD_38
    | {
        (BLACKWELL, 128, 2, True): Config(64, 64, 8, 3),
        (BLACKWELL, 128, 2, False): Config(64, 32, 8, 3),
        (BLACKWELL, 256, 2, True): Config(32, 32, 8, 2, 255),
        (BLACKWELL, 256, 2, False): Config(32, 32, 8, 2, 255),
    },
}
_BACKWARD = {
    (3, 6): _BACKWARD_38
    | {
        (BLACKWELL, 64, 2): BackwardConfig(128, 64, 32, 64, 8, 2),
        (BLACKWELL, 128, 2): BackwardConfig(64, 32, 32, 64, 8, 2, 255),
        (227, 64, 2): BackwardConfig(128, 64, 32, 64, 8, 2),
        (163, 64, 2): BackwardConfig(64, 32, 32, 64, 8, 2, 255),
    },
    (3, 7): _BACKWARD_38
    | {
        (227, 64, 2): BackwardConfig(128, 64, 32, 64, 8, 2),
        (163, 64, 2): BackwardConfig(64, 32, 32, 64, 8, 2, 255),
        (99, 64, 2): BackwardConfig(32, 32, 32, 64, 8, 2),
    },
    (3, 8): _BACKWARD_38,
}
