"""What the libraries below us read from the environment, settled before they are loaded."""

from __future__ import annotations

import os


def settle_environment() -> None:
    """Defaults for threads, of which the user's own settings win; call it before torch is loaded.

    Threads of OpenMP that wait for one another spin, as if the cores were theirs: on a machine that
    others use as well, the one that they wait for does not get to run meanwhile, and a training
    came down to a tenth of its speed. Ranks on one machine share its cores out.
    """
    settings = {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "passive",  # read by every OpenMP
        "GOMP_SPINCOUNT": "1000",  # by GNU's, which PyTorch brings: microseconds, not a time slice
    }
    # torchrun and slurm/common.sh say how many threads a rank has, DeepSpeed's launcher does not.
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if ranks > 1:
        settings["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    for name, value in settings.items():
        os.environ.setdefault(name, value)
