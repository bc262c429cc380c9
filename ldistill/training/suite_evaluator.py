"""Evaluation while a run goes on: ``--eval_suite tiny --eval_steps 500``.

The student as it stands is written to the run's folder, evaluated by lmms-eval in a process of its
own, and removed; the other ranks wait. The run itself is not touched: no module changes its mode,
no random number is drawn, and a failed evaluation is a message and ``eval_failed``, not the end of
a training that has been going for days.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ldistill.common.telling import telling
from ldistill.evaluation.lmms_run import Evaluation, check, evaluate
from ldistill.models.formats import export_like

if TYPE_CHECKING:
    from ldistill.models.lora import WeightUpdates
    from ldistill.models.pair import Pair
    from ldistill.recipe import Recipe


@dataclass
class SuiteEvaluator:
    """A suite on the weights of a running training; rank 0 alone calls it.

    asked:    what is evaluated; results go to ``step-N`` below its folder.
    base:     folder of the student the training began from.
    give_up:  asked again and again while an evaluation runs: whether to end it.
    """

    asked: Evaluation
    base: Path
    give_up: Callable[[], bool] = lambda: False

    def __call__(self, step: int, updates: WeightUpdates) -> dict[str, float]:
        """Scores by row and by group."""
        out = self.asked.out / f"step-{step}"
        student = out / "student"
        shutil.rmtree(out, ignore_errors=True)  # of a run that was resumed before this step
        try:
            export_like(self.base, updates, student)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # what the allocator only keeps, the other process can use
            with telling(f"evaluating step {step} on suite {self.asked.suite}"):
                asked = replace(self.asked, student=str(student), out=out)
                result = evaluate(asked, self.give_up)
        except (ValueError, OSError) as error:
            why = f"failed, training goes on: {error}"
            if isinstance(error, InterruptedError):
                why = "was given up: the run is to stop"
            print(f"the evaluation of step {step} {why}", flush=True)
            return {"failed": 1.0}
        finally:
            shutil.rmtree(student, ignore_errors=True)
        means = ", ".join(f"{group} {value:.3f}" for group, value in result["groups"].items())
        print(f"step {step}: {means}  ({out})", flush=True)
        return {key: score["value"] for key, score in result["scores"].items()} | result["groups"]


def visible_device(device: torch.device) -> str:
    """``CUDA_VISIBLE_DEVICES`` that leaves a process this device alone (none for a CPU)."""
    if device.type != "cuda":
        return ""
    index = device.index or 0
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return visible[index] if index < len(visible) else str(index)


def evaluator_of(
    recipe: Recipe, pair: Pair, folder: Path, give_up: Callable[[], bool]
) -> SuiteEvaluator | None:
    """What a recipe's ``eval_suite`` asks for, on the first rank's device.
    Raises ValueError: the suite cannot run here (unknown, lmms-eval or Java missing)."""
    args, suite = recipe.training, recipe.run.eval_suite
    if suite is None:
        return None
    given = "per_device_eval_batch_size" in recipe.given
    tiling = {"tiling": True} if recipe.data.tiling else {}
    asked = Evaluation(
        student=str(pair.student_folder),
        out=folder / "eval",
        suite=suite,
        limit=recipe.run.eval_limit,
        batch_size=args.per_device_eval_batch_size if given else None,
        options={"tokenizer": recipe.pair.tokenizer} | tiling,
        processes=1,
        environment={"CUDA_VISIBLE_DEVICES": visible_device(args.device)},
    )
    check(asked)
    return SuiteEvaluator(asked, pair.student_folder, give_up)
