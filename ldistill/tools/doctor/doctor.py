"""`ldistill doctor`: is this machine fit to train, and if not, what to do about it.

Every check gives lines: ok, warning (slower, or a feature less) or problem (training stops).
Nothing is built and no model is loaded; a check that fails itself becomes a warning, never a
traceback. `doctor_gpu` and `doctor_system` hold the checks of the machine.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from rich.console import Console

from ldistill.tools.doctor.gpu import gpus, kernels, toolkit
from ldistill.tools.doctor.system import (
    OK,
    PROBLEM,
    WARNING,
    Line,
    compilers,
    disks,
    hub,
    shared_memory,
)

_STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}
_OPTIONAL = {
    "flash-attn": "--attention flash_attention_2",
    "lmms-eval": "the benchmarks of the paper",
}


def run() -> int:
    """Print every finding; 1 when something would stop training, else 0."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    worst, counts = 0, {OK: 0, WARNING: 0, PROBLEM: 0}
    for line in findings():
        counts[line.state] += 1
        worst |= line.state == PROBLEM
        mark = f"[{_STYLES[line.state]}]{line.state:8}[/]"
        console.print(f"{mark} {line.what:14} {line.found}", highlight=False, soft_wrap=True)
        if line.advice:
            console.print(f"{'':24}→ {line.advice}", highlight=False, soft_wrap=True, markup=False)
    counted = {OK: "ok", WARNING: "warning(s)", PROBLEM: "problem(s)"}
    summary = ", ".join(f"{n} {counted[state]}" for state, n in counts.items() if n)
    verdict = "training will stop; see the problems above" if worst else "ready to train"
    console.print(f"\n{summary}: {verdict}.", highlight=False)
    return int(worst)


def findings() -> Iterator[Line]:
    """The lines of every check, in the order of printing."""
    for check in (python, packages, gpus, toolkit, kernels, compilers, disks, shared_memory, hub):
        try:
            yield from check()
        except Exception as error:
            yield Line(
                WARNING,
                check.__name__,
                f"could not be checked ({type(error).__name__}: {error})",
                "if training fails too, this is where to look first.",
            )


def python() -> Iterator[Line]:
    """The interpreter against the versions that the package itself states."""
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata("ldistill").get("Requires-Python") or ""
    found = f"{platform.python_version()}, {sys.prefix}"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield Line(OK, "python", found)
    else:
        advice = f"make a new environment with Python {wanted}."
        yield Line(PROBLEM, "python", f"{found}, needs {wanted}", advice)


def packages() -> Iterator[Line]:
    """Installed versions against the bounds that the package itself states."""
    from packaging.requirements import Requirement

    for text in metadata.requires("ldistill") or ():
        wanted = Requirement(text)
        name = wanted.name
        if wanted.marker is not None and name not in _OPTIONAL:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield _missing(name)
            continue
        if wanted.specifier.contains(found, prereleases=True):
            yield Line(OK, name, found)
        else:
            advice = f"pip install --upgrade '{name}{wanted.specifier}'"
            yield Line(PROBLEM, name, f"{found}, needs {wanted.specifier}", advice)


def _missing(name: str) -> Line:
    if name in _OPTIONAL:
        return Line(OK, name, f"not installed; only needed for {_OPTIONAL[name]}")
    return Line(PROBLEM, name, "not installed", "pip install -e . in the repository.")
