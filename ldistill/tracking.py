"""One run, one Weights & Biases run, however often it is stopped and resumed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

RUN_ID = "wandb_run_id"


def keep_wandb_run(folder: Path, report_to: Sequence[str]) -> str | None:
    """Have wandb go on in the run whose id the run's folder keeps; made at the first start.

    `$WANDB_RUN_ID`, where set, is taken instead and kept. Call it on rank 0, before training.

    Returns:
        the id, or None where nothing is reported to wandb.
    """
    if "wandb" not in report_to:
        return None
    file = folder / RUN_ID
    kept = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    run_id = os.environ.get("WANDB_RUN_ID") or kept or secrets.token_hex(4)
    if run_id != kept:
        file.write_text(run_id + "\n", encoding="utf-8")
    os.environ["WANDB_RUN_ID"] = run_id
    os.environ.setdefault("WANDB_RESUME", "allow")
    return run_id
