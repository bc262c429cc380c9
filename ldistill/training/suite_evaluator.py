"""Evaluation while a run goes on: ``--eval_suite tiny --eval_steps 500``.

The student as it stands is written to the run's folder, evaluated by lmms-eval in a process of its
own, and removed; the other ranks wait. The run itself is not touched: no module changes its mode,
no random number is drawn, and a failed evaluation is a message and ``eval_failed``, not the end of
a training that has been going for days.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldistill.common import ranks
from ldistill.common.telling import telling
from ldistill.evaluation.lmms_run import Evaluation, check, evaluate
from ldistill.models.formats import export_like

if TYPE_CHECKING:
    from ldistill.models.lora import WeightUpdates
    from ldistill.models.pair import Pair
    from ldistill.recipe import Recipe

FOLDER = "eval"
FAILED = "failed"


class SuiteEvaluator:
    """A suite on the weights of a running training.

    Args:
        suite: name of the suite.
        base: folder of the student the training began from.
        folder: of the run; results go to ``eval/step-N`` below it.
        device: of the training: the evaluation runs on the first rank's.
        limit: documents of every task, or None for all.
        batch_size: requests per forward, or None for the suite's own.
        options: of the lmms-eval model.
        give_up: asked again and again while an evaluation runs: whether to end it.

    Raises:
        ValueError: the suite cannot run here (unknown, lmms-eval or Java missing).
    """

    def __init__(
        self,
        suite: str,
        base: Path,
        folder: Path,
        device: torch.device,
        limit: int | None = None,
        batch_size: int | None = None,
        options: Mapping[str, Any] | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.suite, self.base, self.folder = suite, base, folder / FOLDER
        self.device, self.limit, self.batch_size = device, limit, batch_size
        self.options, self.give_up = dict(options or {}), give_up
        check(self._asked(0))

    def __call__(self, step: int, updates: WeightUpdates) -> dict[str, float]:
        """Scores by row and by group, on every rank. Every rank must call it.

        Args:
            step: of the training.
            updates: what training made of the student; only the first rank's are read.
        """
        return ranks.from_first(lambda: self._evaluate(step, updates))

    def _asked(self, step: int) -> Evaluation:
        out = self.folder / f"step-{step}"
        return Evaluation(
            student=str(out / "student"),
            out=out,
            suite=self.suite,
            limit=self.limit,
            batch_size=self.batch_size,
            options=self.options,
            processes=1,
            environment={"CUDA_VISIBLE_DEVICES": visible_device(self.device)},
        )

    def _evaluate(self, step: int, updates: WeightUpdates) -> dict[str, float]:
        asked = self._asked(step)
        shutil.rmtree(asked.out, ignore_errors=True)  # of a run that was resumed before this step
        try:
            export_like(self.base, updates, Path(asked.student))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what the allocator only keeps, the other process can use
            with telling(f"evaluating step {step} on suite {self.suite}"):
                result = evaluate(asked, self.give_up)
        except InterruptedError:
            print(f"the evaluation of step {step} was given up: the run is to stop", flush=True)
            return {FAILED: 1.0}
        except (ValueError, OSError) as error:
            print(f"the evaluation of step {step} failed, training goes on: {error}", flush=True)
            return {FAILED: 1.0}
        finally:
            shutil.rmtree(asked.student, ignore_errors=True)
        means = ", ".join(f"{group} {value:.3f}" for group, value in result["groups"].items())
        print(f"step {step}: {means}  ({asked.out})", flush=True)
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
    """What a recipe's ``eval_suite`` and ``eval_steps`` ask for.

    Raises:
        ValueError: the suite cannot run here.
    """
    args = recipe.training
    if recipe.run.eval_suite is None:
        return None
    given = "per_device_eval_batch_size" in recipe.given
    options: dict[str, Any] = {"tokenizer": recipe.pair.tokenizer}
    if recipe.data.tiling:
        options["tiling"] = True
    return SuiteEvaluator(
        recipe.run.eval_suite,
        pair.student_folder,
        folder,
        args.device,
        recipe.run.eval_limit,
        args.per_device_eval_batch_size if given else None,
        options,
        give_up,
    )
