"""What compile_check builds: every entry of the tables, bare and with everything switched on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ldistill_kernels.compile_check import CompileCase
from ldistill_kernels.shared_kv_attention import triton_bwd, triton_fwd, triton_prepare
from ldistill_kernels.shared_kv_attention.configs import (
    DEVICE_CLASSES,
    INTERPRETER,
    PLAIN_BACKWARD,
    PLAIN_FORWARD,
    BackwardConfig,
    Config,
    backward_table,
    forward_table,
    split_backward,
    split_head_dim,
)
from ldistill_kernels.shared_kv_attention.primitives import lane_blocks

_SECOND = ("start2", "end2")
GROUP = 3  # stands for the groups that divide; those of 1, 4 and 8 make other code, which may spill
OTHER_GROUPS = (1, 4, 8)
CORE_GROUPS = {64: (1, 4), 128: (1,)}  # plain: all of them would take CI minutes


def compile_cases() -> list[CompileCase]:
    """Every shipped configuration of the three kernels."""
    cases = []
    for (kib, bucket, size, dense), config in forward_table().items():
        if not dense or forward_table()[kib, bucket, size, False] != config:
            for shape in case_shapes(bucket, size, kib):
                key = kib, bucket, size, dense
                tile = PLAIN_FORWARD.get(key, config) if shape.plain else config
                cases += [_forward(x, tile, dense, kib) for x in shape.variants(not dense)]
    for (kib, bucket, size), table in backward_table().items():
        for shape in case_shapes(bucket, size, kib):
            key = kib, bucket, size
            config = PLAIN_BACKWARD.get(key, table) if shape.plain else table
            cases += [_backward(x, config, kib) for x in shape.variants()]
            cases += [_prepare(x, config, kib) for x in shape.variants(table=False)]
    return cases


@dataclass(frozen=True)
class CaseShape:
    """One thing that compile_check builds of a table entry.

    `full` switches everything on: the mask, the second segment, gradient buffers, a gradient of
    the log-sum-exp. `core` belongs to the part that CI compiles: what language models have.
    `group` is the number of query heads of a key head, `tiles` a table of them, `index` the type
    of the arrays that say what a query sees, `extras` a window, a soft cap and sinks, `v_dim` a
    head dim of the values that is not that of the keys.
    """

    element: str
    head_dim: int
    full: bool
    core: bool
    group: int = GROUP
    tiles: bool = False
    index: str = "i64"  # what training passes
    extras: bool = False
    v_dim: int = 0

    @property
    def label(self) -> str:
        variant = "two segments" if self.full else "plain"
        variant += " extras" if self.extras else ""
        variant += f" values {self.v_dim}" if self.v_dim else ""
        group = "" if self.group == GROUP else f" group {self.group}"
        tiles = " table" if self.tiles else ""
        index = "" if self.index == "i64" else f" {self.index}"
        return f"{self.element} D{self.head_dim} {variant}{group}{tiles}{index}"

    @property
    def plain(self) -> bool:
        """Whether nothing but keys and values as most models have them is read."""
        return not (self.full or self.extras or self.v_dim)

    def variants(self, table: bool = True) -> "list[CaseShape]":
        """With and without a table of tiles (if one is ever passed), a group with both indices."""
        return [
            replace(self, tiles=tiles, index=index, core=self.core and index == "i64")
            for tiles in ((False, True) if table else (False,))
            for index in (("i64", "i32") if self.group == GROUP and not self.extras else ("i64",))
        ]


def case_shapes(bucket: int, itemsize: int, kib: int) -> list[CaseShape]:
    """What is built of the entry of a head dim bucket, an element size and a device class."""
    if kib == INTERPRETER:
        return []
    if itemsize == 4:
        return [
            CaseShape("fp32", bucket, full, bucket == 64 and not full) for full in (False, True)
        ]
    common = bucket in (64, 128)
    shapes = [CaseShape("bf16", bucket, full, common) for full in (False, True)]
    for group in OTHER_GROUPS:
        core = group in CORE_GROUPS.get(bucket, ())
        shapes.append(CaseShape("bf16", bucket, False, core, group))
        if common:
            shapes.append(CaseShape("bf16", bucket, True, False, group))
    if common:
        shapes.append(CaseShape("fp16", bucket, False, False))
    shapes += [
        CaseShape("bf16", bucket, full, common and not full, extras=True) for full in (False, True)
    ]
    odd = {96: 72, 256: 192}.get(bucket)  # two tiles, of 72 the second one masked
    if odd:
        shapes.append(CaseShape("bf16", odd, True, False))
    if odd == 192:
        shapes.append(CaseShape("bf16", odd, False, False, v_dim=128))
    return shapes


def _forward(shape: CaseShape, config: Config, dense: bool, kib: int) -> CompileCase:
    tiles = f"{'dense' if dense else 'sparse'} {config.block_m}x{config.block_n}"
    types = _indices(shape) | _pointers(shape, ("q", "k", "v", "out"), ("k2", "v2"))
    types |= {"lse": "*fp32", "scale2": "fp32", "cap2": "fp32"}
    types |= dict.fromkeys(triton_fwd.INTEGERS, "i32")
    types |= {"visible": "*i1"} if shape.full else {}
    types |= {"sinks": "*fp32"} if shape.extras else {}
    block_m, small_m = lane_blocks(config.block_m, shape.tiles)
    constants = _head_dims(shape, split_head_dim) | {
        "GROUP": shape.group, "HAS_VISIBLE": shape.full, "HAS_SECOND": shape.full,
        "HAS_TILES": shape.tiles, "BLOCK_M": block_m, "SMALL_M": small_m,
        "BLOCK_N": config.block_n, "HAS_WINDOW": shape.extras, "HAS_CAP": shape.extras,
        "HAS_SINKS": shape.extras,
    }  # fmt: skip
    constants |= _absent(shape, "visible", "k2", "v2", *_SECOND)
    constants |= {} if shape.extras else {"sinks": None}
    return _case("forward", shape, tiles, kib, types, constants, **_launch(config))


def _backward(shape: CaseShape, config: BackwardConfig, kib: int) -> CompileCase:
    tiles = f"dq {config.dq_m}x{config.dq_n} dkv {config.dkv_m}x{config.dkv_n}"
    gradients = ("grad_out", "dq", "dk", "dv")
    types = _indices(shape)
    types |= _pointers(shape, ("q", "k", "v", *gradients), ("k2", "v2", "dk2", "dv2"))
    types |= dict.fromkeys(("lse", "delta"), "*fp32") | {"ranges": "*i32"}
    types |= dict.fromkeys(("scale", "scale2", "cap2"), "fp32")
    types |= dict.fromkeys(triton_bwd.INTEGERS, "i32")
    if shape.full:  # the gradients of the memory are added to fp32 buffers
        types |= dict.fromkeys(("dk", "dv"), "*fp32") | {"visible": "*i1"}
    dq_m, small_m = lane_blocks(config.dq_m, shape.tiles)
    constants = _head_dims(shape, split_backward) | {
        "GROUP": shape.group, "HAS_VISIBLE": shape.full, "HAS_SECOND": shape.full,
        "HAS_WINDOW": shape.extras, "HAS_CAP": shape.extras,
        "HAS_TILES": shape.tiles, "DQ_M": dq_m, "SMALL_M": small_m, "DQ_N": config.dq_n,
        "DKV_M": config.dkv_m, "DKV_N": config.dkv_n,
        "DQ": True, "DK": True, "DV": True, "DK2": shape.full, "DV2": shape.full,
        "ADD_K": shape.full, "ADD_V": shape.full,
    }  # fmt: skip
    constants |= _absent(shape, "visible", "k2", "v2", "dk2", "dv2", *_SECOND)
    return _case("backward", shape, tiles, kib, types, constants, **_launch(config))


def _prepare(shape: CaseShape, config: BackwardConfig, kib: int) -> CompileCase:
    types = _indices(replace(shape, tiles=False)) | _pointers(shape, ("out", "grad_out"), ())
    types |= dict.fromkeys(("lse", "base2", "delta"), "*fp32") | {"ranges": "*i32"}
    types |= dict.fromkeys(triton_prepare.INTEGERS, "i32")
    types |= {"grad_lse": "*fp32"} if shape.full else {}
    constants = _head_dims(shape, split_backward)
    values = {name: constants[name] for name in ("ALIGN", "V_DIM", "E1", "E2")}
    constants = values | {
        "HAS_WINDOW": shape.extras, "BLOCK_M": triton_prepare.block_pairs(values["V_DIM"]),
        "BLOCK_N": config.dkv_n, "TILES": triton_prepare.TILES, "GROUP": shape.group,
        "HAS_GRAD_LSE": shape.full, "HAS_SECOND": shape.full,
    }  # fmt: skip
    constants |= dict.fromkeys(() if shape.full else (*_SECOND, "grad_lse"))
    tiles, registers = f"tiles of {config.dkv_n}", triton_prepare.REGISTERS
    return _case("prepare", shape, tiles, kib, types, constants, max_registers=registers)


def _case(
    kernel: str,
    shape: CaseShape,
    tiles: str,
    kib: int,
    types: dict[str, str],
    constants: dict[str, Any],
    **launch: int | None,
) -> CompileCase:
    modules = {"forward": triton_fwd, "backward": triton_bwd, "prepare": triton_prepare}
    return CompileCase(
        f"attention {kernel} {shape.label} {tiles}",
        module=modules[kernel].__name__,
        kernel=f"{kernel}_kernel",
        types=types,
        constants=constants,
        archs=DEVICE_CLASSES[kib],
        core=shape.core,
        **launch,
    )


def _launch(config: Config | BackwardConfig) -> dict[str, int | None]:
    return {name: getattr(config, name) for name in ("num_warps", "num_stages", "max_registers")}


def _indices(shape: CaseShape) -> dict[str, str]:
    """Types of the arrays that say what a query sees."""
    names = ("batch", "start", "position", *(_SECOND if shape.full else ()))
    tiles = {"tiles": "*i32"} if shape.tiles else {}
    return dict.fromkeys(names, f"*{shape.index}") | tiles


def _pointers(shape: CaseShape, plain: tuple, second: tuple) -> dict[str, str]:
    """Types of the tensors of the element type."""
    return dict.fromkeys(plain + (second if shape.full else ()), f"*{shape.element}")


def _absent(shape: CaseShape, *full: str) -> dict[str, None]:
    """Values of the tensors that are not passed."""
    return dict.fromkeys((() if shape.full else full) + (() if shape.tiles else ("tiles",)))


def _head_dims(shape: CaseShape, split: Callable[[int], tuple[int, int]]) -> dict[str, int]:
    """How the head dims of keys and of values are cut into tiles."""
    v_dim = shape.v_dim or shape.head_dim
    (d1, d2), (e1, e2) = split(shape.head_dim), split(v_dim)
    keys = {"ALIGN": 8, "HEAD_DIM": shape.head_dim, "D1": d1, "D2": d2}
    return keys | {"V_DIM": v_dim, "E1": e1, "E2": e2}
