"""`ldistill doctor`, the system's part: compilers, disks, shared memory, the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_ENOUGH_GIB, _LEAST_GIB = 20, 1
_HUB_SECONDS = 3.0


@dataclass(frozen=True)
class Line:
    """One finding; ``advice`` is a single sentence, empty when all is well."""

    state: str
    what: str
    found: str
    advice: str = ""


def driver_present() -> bool:
    """Whether an NVIDIA driver shows a GPU, usable by torch or not."""
    return Path("/dev/nvidia0").exists()


def compilers() -> Iterator[Line]:
    """What DeepSpeed's first start needs: a C++ compiler, ninja and Python's headers."""
    # Without a GPU DeepSpeed builds its communication op at once; with one, only offload builds.
    severity = WARNING if driver_present() else PROBLEM
    names = (os.environ.get("CXX") or "c++", "g++")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        advice = "install one (apt install g++, or conda install gxx) for DeepSpeed's ops."
        yield Line(severity, "C++ compiler", "none in PATH", advice)
    else:
        version = (output(compiler, "--version").splitlines() or ["version unknown"])[0]
        yield Line(OK, "C++ compiler", version)
    yield _ninja(severity)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if header.is_file():
        yield Line(OK, "Python.h", str(header.parent))
    else:
        advice = (
            "install Python's headers (apt install python3-dev) for DeepSpeed's ops and Triton."
        )
        yield Line(severity, "Python.h", f"not in {header.parent}", advice)
    if all((compiler, shutil.which("ninja"), header.is_file())) and not driver_present():
        yield Line(OK, "DeepSpeed ops", "cpu_adam and the communication op can be built")


def _ninja(severity: str) -> Line:
    if path := shutil.which("ninja"):
        return Line(OK, "ninja", path)
    own = Path(sys.executable).parent
    if (own / "ninja").exists():
        advice = f"it is in {own}: activate this environment, or add that folder to PATH."
    else:
        advice = "pip install ninja, and keep the environment's bin folder in PATH."
    return Line(severity, "ninja", "not in PATH", advice)


def output(*command: str) -> str:
    """What a quick command prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def disks() -> Iterator[Line]:
    """Room where runs and caches go."""
    home = Path.home()
    folders = {
        "disk, here": Path.cwd(),
        "disk, cache": Path(os.environ.get("LDISTILL_CACHE", home / ".cache" / "ldistill")),
        "disk, hub": Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface")),
    }
    for name, folder in folders.items():
        standing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(standing).free / 2**30
        found = f"{free:.0f} GiB free in {folder}"
        if not os.access(standing, os.W_OK):
            advice = (
                "choose a folder that you may write to (--output_dir, LDISTILL_CACHE, HF_HOME)."
            )
            yield Line(PROBLEM, name, f"{standing} is not writable", advice)
        elif free < _LEAST_GIB:
            yield Line(PROBLEM, name, found, "make room, or work in another folder.")
        elif free < _ENOUGH_GIB:
            advice = "enough for the embedded default; the paper's run wants 100 GiB and more."
            yield Line(WARNING, name, found, advice)
        else:
            yield Line(OK, name, found)


def shared_memory() -> Iterator[Line]:
    """Loader workers hand their batches over through /dev/shm."""
    folder = Path("/dev/shm")
    if not folder.exists():
        return
    free = shutil.disk_usage(folder).free / 2**30
    if free < _LEAST_GIB:
        advice = "loader workers need it: docker run --shm-size=8g, or --dataloader_num_workers 0."
        yield Line(WARNING, "/dev/shm", f"{free * 1024:.0f} MiB free", advice)
    else:
        yield Line(OK, "/dev/shm", f"{free:.0f} GiB free")


def hub() -> Iterator[Line]:
    """Whether the hub answers, unless this process is told to stay offline."""
    offline = [
        name
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        if os.environ.get(name, "0").upper() not in ("", "0", "FALSE", "NO")
    ]
    if offline:
        yield Line(OK, "hub", f"not asked: {offline[0]} is set")
        return
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reason = _within(_HUB_SECONDS, lambda: _reach(address))
    if reason == "":
        yield Line(OK, "hub", f"{address} answers")
    else:
        advice = "give local folders for student, teacher and data, and set HF_HUB_OFFLINE=1."
        yield Line(WARNING, "hub", f"{address} does not answer ({reason})", advice)


def _reach(address: str) -> str:
    """Empty when anything answers, an HTTP error included; else why not."""
    try:
        urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=_HUB_SECONDS
        ).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def _within(seconds: float, ask: Callable[[], str]) -> str:
    """``ask()``, or "no answer" after that time: a name server may hang longer than any timeout."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"nothing within {seconds:.0f} s"
