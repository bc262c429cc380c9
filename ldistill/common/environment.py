"""What the libraries below us are and read from the environment, settled before they are loaded."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def check_versions() -> None:
    """Raise ValueError for what is too old or not there, before an import of it fails somewhere."""
    try:
        wanted = metadata.requires("ldistill") or []
    except metadata.PackageNotFoundError:  # run from its folder, without being installed
        return
    for need in map(Requirement, wanted):
        if need.marker is not None:
            continue
        there = "not installed"
        with suppress(metadata.PackageNotFoundError):
            found = metadata.version(need.name)
            if need.specifier.contains(found, prereleases=True):
                continue
            there = f"{found}, and {need.specifier} is needed"
        raise ValueError(
            f"{need.name} is {there}: pip install --upgrade '{need.name}{need.specifier}'"
        )


def settle_environment() -> None:
    """Defaults for threads, of which the user's own settings win; call it before torch is loaded.

    Threads of OpenMP that wait for one another spin: on a machine that others use as well, the one
    that they wait for does not get to run, and a training came down to a tenth of its speed.
    """
    settings = {"TOKENIZERS_PARALLELISM": "false"}
    if "OMP_WAIT_POLICY" not in os.environ:
        # Every OpenMP reads the first; the second is GNU's, PyTorch's own, in microseconds.
        settings |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    # torchrun and slurm/common.sh say how many threads a rank has, DeepSpeed's launcher does not.
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if ranks > 1:
        settings["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # An environment that was not activated: ops are compiled with its ninja all the same.
    if shutil.which("ninja") is None and "PATH" in os.environ:
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
