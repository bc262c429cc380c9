"""The files of a run by name; `training/run_folder.py` says what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECIPE = "recipe.yaml"
RUN = "run.json"
ENVIRONMENT = "environment.json"
ORDER = "order.json"
ORIGINS = "origins.json"
METRICS = "metrics.jsonl"
CURVES = "loss_curves.png"
EVALUATION = "evaluation.json"
STUDENT = "student"
SAMPLES = "samples"
WANDB_RUN = "wandb_run_id"
OF_A_START = (WANDB_RUN, RECIPE, ENVIRONMENT, ORDER, ORIGINS, METRICS, RUN)
"""What lies there before the first step is done."""
JOB = "slurm_job"
"""Which job writes here: slurm/common.sh puts it down before the run starts."""


def run_id(folder: Path) -> str | None:
    """Id of the run that a folder holds; None when none was begun there."""
    return read_json(folder / RUN).get("id")


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
