"""Compile every shipped kernel configuration for every supported GPU, on a machine without one.

    python -m ldistill_kernels.compile_check                    # all
    python -m ldistill_kernels.compile_check --core             # the part that CI compiles
    python -m ldistill_kernels.compile_check --arch 90 --only "attention forward" --jobs 4

Prints registers, spilled bytes and shared memory of each, and exits with 1 when one does not
compile, spills, or needs more shared memory than its device gives a block. `--core` leaves out
rare types, head dims and sizes of groups: every kernel for every architecture, bf16 with head dims
64 and 128 in every variant, fp32 with head dim 64, and the loss in all of its variants remain.

Convention: what ships kernels has a function `compile_cases() -> list[CompileCase]`, one case per
configuration in its table, and the module of that function stands in `MODULES` below. A case names
the kernel, the types of its arguments (`"*bf16"`, `"i32"`, `"fp32"`) and the values of its
constexpr arguments (None for an absent tensor). Pointers are taken as 16-byte aligned, integers as
unspecialised, as `do_not_specialize` makes them.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Modules with compile_cases().
MODULES = (
    "ldistill_kernels.shared_kv_attention.compile_cases",
    "ldistill_kernels.distill_loss.triton",
)
# Compute capability -> bytes of shared memory a block may use (CUDA programming guide, opt-in).
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one configuration.

    Attributes:
        name: what the table prints, "op pass dtype head-dim variant".
        kernel: name of the `@triton.jit` function in `module`.
        types: argument name -> Triton type, for every argument that is not a constexpr.
        constants: argument name -> value, for constexpr arguments and absent tensors.
        fp_fusion: whether products and sums may become one instruction.
        archs: the compute capabilities this configuration is shipped for.
        core: whether `--core` compiles it too.
    """

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None
    fp_fusion: bool = True
    archs: tuple[int, ...] = field(default=tuple(SHARED_MEMORY))
    core: bool = False

    @property
    def binary(self) -> str:
        """What decides the binary: two cases that agree in this are compiled once."""
        what = (self.module, self.kernel, sorted(self.types.items()))
        how = (self.num_warps, self.num_stages, self.max_registers, self.fp_fusion)
        return repr((*what, sorted(self.constants.items()), *how))


@dataclass(frozen=True)
class Result:
    """What the compiler made of one case on one architecture."""

    name: str
    arch: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_MEMORY[self.arch]:
            return (
                f"needs more than the {SHARED_MEMORY[self.arch]} bytes of shared memory there are"
            )
        return ""


def shipped_cases() -> list[CompileCase]:
    """The cases of all modules that exist in this installation."""
    cases = []
    for module in MODULES:
        try:
            cases += importlib.import_module(module).compile_cases()
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("ldistill_kernels"):
                raise
    return cases


def compile_case(case: CompileCase, arch: int) -> Result:
    """Compile one case for one compute capability and read the resources of the binary."""
    begin = time.monotonic()
    try:
        compiled = build(case, arch)
    except Exception as error:  # the compiler raises many types; the table reports them all
        while error.__cause__ is not None:  # one for every inlined call
            error = error.__cause__
        reason = str(error).strip().splitlines()[-1:]  # what is wrong stands below the source line
        return Result(case.name, arch, error=": ".join([type(error).__name__, *reason]))
    registers, spilled = resource_usage(compiled.asm["cubin"])
    seconds = time.monotonic() - begin
    return Result(case.name, arch, registers, spilled, compiled.metadata.shared, seconds)


def build(case: CompileCase, arch: int) -> Any:
    """What Triton makes of a case; `.asm` holds every stage from its own code to the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.kernel)
    unknown = set(kernel.arg_names) ^ (set(case.types) | set(case.constants))
    if unknown:
        raise ValueError(f"{case.name}: arguments {sorted(unknown)} do not match {case.kernel}")
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in case.constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "maxnreg": case.max_registers,
            "enable_fp_fusion": case.fp_fusion,
        },
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack and local memory per thread) of a binary."""
    from triton import backends

    tool = Path(next(iter(backends.__path__))) / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {name: max(map(int, re.findall(rf"{name}:(\d+)", text))) for name in _USAGE}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


_USAGE = ("REG", "STACK", "LOCAL")


def check(cases: list[CompileCase], archs: list[int], jobs: int) -> Iterator[Result]:
    """Compile the cases for those of the architectures they are shipped for, each binary once."""
    pairs = [(case, arch) for arch in archs for case in cases if arch in case.archs]
    work = list({(case.binary, arch): (case, arch) for case, arch in reversed(pairs)}.values())[
        ::-1
    ]
    if not work:
        return
    if jobs <= 1:
        yield from (compile_case(case, arch) for case, arch in work)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, *zip(*work, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 when a case does not compile, spills or does not fit."""
    parser = argparse.ArgumentParser(prog="compile_check", description=__doc__.splitlines()[0])
    archs = list(SHARED_MEMORY)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=archs, choices=archs, help="90 stands for sm_90"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--core", action="store_true", help="the part that CI compiles")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler; unset it for compile_check")
    cases = [
        case
        for case in shipped_cases()
        if options.only in case.name and (case.core or not options.core)
    ]
    if not cases:
        raise ValueError(f"no case has {options.only!r} in its name")
    begin, results = time.monotonic(), []
    print(
        f"{'kernel':<58} {'arch':>6} {'registers':>9} {'spilled':>8} {'shared':>7} {'seconds':>7}"
    )
    for result in check(cases, options.arch, options.jobs):
        results.append(result)
        line = f"{result.name:<58} sm_{result.arch:<4} {result.registers:>8} {result.spilled:>8}"
        line = f"{line} {result.shared:>7} {result.seconds:>7.1f}  {result.problem}"
        print(line.rstrip(), flush=True)
    problems = sum(bool(result.problem) for result in results)
    seconds = time.monotonic() - begin
    print(f"{len(results)} compiled, {problems} with a problem, {seconds:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
