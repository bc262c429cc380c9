"""One run, one Weights & Biases run, however often it is stopped; and no run lost for its sake."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import WandbCallback

RUN_ID = "wandb_run_id"


def keep_wandb_run(folder: Path, report_to: Sequence[str]) -> None:
    """Have wandb go on in the run whose id the run's folder keeps; made at the first start.

    `$WANDB_RUN_ID`, where set, is taken instead and kept. Call it on rank 0, before training.
    """
    if "wandb" not in report_to:
        return
    file = folder / RUN_ID
    kept = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    run_id = os.environ.get("WANDB_RUN_ID") or kept or secrets.token_hex(4)
    if run_id != kept:
        file.write_text(run_id + "\n", encoding="utf-8")
    os.environ["WANDB_RUN_ID"] = run_id
    os.environ.setdefault("WANDB_RESUME", "allow")


class PatientWandb(WandbCallback):
    """The Trainer's wandb callback, whose failures are told and do not end the run.

    wandb sends through a process of its own. A scheduler that signals a whole job ends that
    process first, and the next record would raise, just before the checkpoint is saved.
    """

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_log, *args, **kwargs)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_save, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_end, *args, **kwargs)

    def _try(self, report: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self._wandb is None:
            return
        try:
            report(*args, **kwargs)
        except Exception as error:  # of its sockets or its own, whatever they are
            _tell_lost(error)
            self._wandb = None


def close_wandb() -> None:
    """Have everything sent, if this process has a wandb run: a launcher may end it any moment."""
    wandb = sys.modules.get("wandb")
    if wandb is None or getattr(wandb, "run", None) is None:
        return
    try:
        wandb.finish()
    except Exception as error:
        _tell_lost(error)


def _tell_lost(error: Exception) -> None:
    told = f"wandb is lost ({type(error).__name__}: {error}); metrics.jsonl has every record."
    print(told, file=sys.stderr, flush=True)
