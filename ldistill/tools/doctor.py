"""`ldistill doctor`: is this machine fit to train, and if not, what to do about it.

Nothing is built and no model is loaded. `doctor_gpu` holds the checks that need torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

from ldistill.common.locate import default_cache

OK, WARNING, PROBLEM = "ok", "warning", "problem"  # fine; slower, or a feature less; no training
MISSING = "not installed"
_STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}
_EXTRAS = {
    "flash": "--attention flash_attention_2",
    "eval": "`ldistill eval`, the paper's benchmarks",
    "lora": "adapters that peft reads",
    "s3": "shards at s3://",
}
_ENOUGH_GIB, _LEAST_GIB = 20, 1
_HUB_SECONDS = 3.0
DRIVER = Path("/dev/nvidia0")  # there where an NVIDIA driver shows a GPU, usable by torch or not


class Line(NamedTuple):
    """One finding; ``advice`` is a single sentence, empty when all is well."""

    state: str
    what: str
    found: str
    advice: str = ""


def judged(good: bool, what: str, found: str, advice: str, otherwise: str = PROBLEM) -> Line:
    return Line(OK, what, found) if good else Line(otherwise, what, found, advice)


def output(*command: str) -> str:
    """What a quick command prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def run() -> int:
    """Print every finding; 1 when something would stop training, else 0."""
    console = Console(highlight=False, soft_wrap=True)
    counts = dict.fromkeys(_STYLES, 0)
    for state, what, found, advice in findings():
        counts[state] += 1
        console.print(f"[{_STYLES[state]}]{state:8}[/] {what:14} {found}")
        if advice:
            console.print(f"{'':24}→ {advice}", markup=False)
    told = {state: state if state == OK else f"{state}(s)" for state in counts}
    summary = ", ".join(f"{n} {told[state]}" for state, n in counts.items() if n)
    verdict = "training will stop; see the problems above" if counts[PROBLEM] else "ready to train"
    console.print(f"\n{summary}: {verdict}.")
    return int(counts[PROBLEM] > 0)


def findings() -> Iterator[Line]:
    """The lines of every check, in the order of printing."""
    return _tried(python, packages, graphics, compilers, disks, shared_memory, hub)


def _tried(*checks: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            found = f"could not be checked ({type(error).__name__}: {error})"
            advice = "if training fails too, this is where to look first."
            yield Line(WARNING, check.__name__, found, advice)


def graphics() -> Iterator[Line]:
    """GPUs, CUDA toolkit, kernels: apart, so that a torch that cannot be loaded is a line, too."""
    from ldistill.tools import doctor_gpu as gpu

    return _tried(gpu.gpus, gpu.toolkit, gpu.kernels, gpu.ops)


def python() -> Iterator[Line]:
    wanted, found = metadata.metadata("ldistill").get("Requires-Python"), platform.python_version()
    good = SpecifierSet(wanted or "").contains(found, prereleases=True)
    advice = f"make a new environment with Python {wanted}."
    yield judged(good, "python", f"{found}, {sys.prefix}", advice)


def packages() -> Iterator[Line]:
    """Installed versions against the bounds that this package itself states."""
    wanted = [Requirement(text) for text in metadata.requires("ldistill") or ()]
    for need in (need for need in wanted if need.marker is None):
        found, good = _installed(need)
        found += "" if good else f", needs {need.specifier or 'any'}"
        yield judged(good, need.name, found, f"pip install --upgrade '{need.name}{need.specifier}'")
    for extra, purpose in _EXTRAS.items():
        needs = [n for n in wanted if n.marker and n.marker.evaluate({"extra": extra})]
        there = {need.name: _installed(need) for need in needs}
        lacking = [need for need in needs if not there[need.name][1]]
        found = ", ".join(f"{name} {version}" for name, (version, _) in there.items())
        if all(version == MISSING for version, _ in there.values()):
            lacking, found = [], f"{MISSING}; only needed for {purpose}"
        elif lacking:  # what the extra is for fails in the middle
            names = ", ".join(need.name for need in lacking)
            found = f"{names} missing or too old, for {purpose}"
        names = " ".join(f"'{need.name}{need.specifier}'" for need in lacking)
        advice = f"pip install --upgrade {names}"
        yield judged(not lacking, f"extra {extra}", found, advice, WARNING)


def _installed(need: Requirement) -> tuple[str, bool]:
    found = next((d.version for d in metadata.distributions(name=need.name)), MISSING)
    return found, found != MISSING and need.specifier.contains(found, prereleases=True)


def compilers() -> Iterator[Line]:
    """What DeepSpeed's first start needs: a C++ compiler, ninja and Python's headers."""
    from ldistill.training.launch import compiler

    # Without a GPU DeepSpeed builds its communication op at once; with one, only offload builds.
    severity = WARNING if DRIVER.exists() else PROBLEM
    path = compiler()
    found = output(path, "--version").partition("\n")[0] if path else "none in PATH"
    advice = "install one (apt install g++, or conda install gxx) for DeepSpeed's ops."
    yield judged(bool(path), "C++ compiler", found, advice, severity)
    path, own = shutil.which("ninja"), Path(sys.executable).parent
    advice = "pip install ninja, and keep the environment's bin folder in PATH."
    if (own / "ninja").exists():
        advice = f"it is in {own}: activate this environment, or add that folder to PATH."
    yield judged(bool(path), "ninja", path or "not in PATH", advice, severity)
    folder = Path(sysconfig.get_paths()["include"])
    good = (folder / "Python.h").is_file()
    advice = "install Python's headers (apt install python3-dev) for DeepSpeed's ops and Triton."
    yield judged(good, "Python.h", str(folder) if good else f"not in {folder}", advice, severity)


def disks() -> Iterator[Line]:
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for name, folder in {"here": Path.cwd(), "cache": default_cache(), "hub": hub}.items():
        standing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(standing).free / 2**30
        what, found = f"disk, {name}", f"{free:.0f} GiB free in {folder}"
        if not os.access(standing, os.W_OK):
            advice = "choose one that you may write to (--output_dir, LDISTILL_CACHE, HF_HOME)."
            yield Line(PROBLEM, what, f"{standing} is not writable", advice)
        elif free < _LEAST_GIB:
            yield Line(PROBLEM, what, found, "make room, or work in another folder.")
        else:
            advice = "enough for the embedded default; the paper's run wants 100 GiB and more."
            yield judged(free >= _ENOUGH_GIB, what, found, advice, WARNING)


def shared_memory() -> Iterator[Line]:
    """Loader workers hand their batches over through /dev/shm."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    found = f"{free:.0f} GiB free" if free >= _LEAST_GIB else f"{free * 1024:.0f} MiB free"
    advice = "loader workers need it: docker run --shm-size=8g, or --dataloader_num_workers 0."
    yield judged(free >= _LEAST_GIB, "/dev/shm", found, advice, WARNING)


def hub() -> Iterator[Line]:
    """Whether the hub answers, unless this process is told to stay offline."""
    from huggingface_hub import get_session

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "0").upper() not in ("", "0", "FALSE", "NO"):
            yield Line(OK, "hub", f"not asked: {name} is set")
            return
    address, reasons = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), []

    def ask() -> None:
        try:
            get_session().head(address, timeout=_HUB_SECONDS)  # an HTTP error is an answer, too
            reasons.append("")
        except Exception as error:
            reasons.append(str(error) or type(error).__name__)

    # in a thread, for a name server may hang longer than any timeout
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS)
    reason = reasons[0] if reasons else f"nothing within {_HUB_SECONDS:.0f} s"
    found = f"{address} does not answer ({reason})" if reason else f"{address} answers"
    advice = "give local folders for student, teacher and data, and set HF_HUB_OFFLINE=1."
    yield judged(not reason, "hub", found, advice, WARNING)
