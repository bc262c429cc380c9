"""What the terminal and the run folder show while a run goes on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ldistill.checkpoint.logs import read_metrics
from ldistill.common.telling import Telling
from ldistill.training.metrics import MetricsFile

_SHOWN = (
    ("loss", "loss", ".3f"),
    ("language/ce", "CE lang", ".3f"),
    ("document/ce", "CE doc", ".3f"),
    ("kd", "KD", ".2g"),
    ("tokens_per_second", "tok/s", ",.0f"),
)


def short_line(
    step: int, steps: int, logs: dict[str, float], kd_scales: Mapping[str, float]
) -> str:
    """One line of a logged step: the few numbers one watches.

    Args:
        kd_scales: by source, of the KL, whose mean is logged, in the loss.
    """
    if logs.get("kd_rows"):
        kds = {n: logs.get(f"source/{n}/kd", 0) * logs[f"source/{n}/kd_rows"] for n in kd_scales}
        total = sum(kd_scales[name] * kd for name, kd in kds.items())
        logs = logs | {"kd": total / logs["kd_rows"]}
    parts = [f"{label} {logs[key]:{form}}" for key, label, form in _SHOWN if key in logs]
    return f"step {step}/{steps}: " + ", ".join(parts)


class ShortProgress(ProgressCallback):
    """The Trainer's bar, with one short line instead of all of a step's metrics.

    The bar is for terminals: in a job's log it would be a line a step.
    """

    def __init__(self, kd_scales: Mapping[str, float]) -> None:
        super().__init__()
        self._kd_scales = kd_scales
        self._log: Telling | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)
        elif state.is_world_process_zero:
            self._log = Telling("training", state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)
        if self._log is not None:
            self._log.done = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        evaluated = {k.removeprefix("eval_"): v for k, v in (logs or {}).items() if "eval_" in k}
        logs = logs if "loss" in (logs or {}) else evaluated
        if not state.is_world_process_zero or "loss" not in logs:
            return
        line = short_line(state.global_step, state.max_steps, logs, self._kd_scales)
        if logs is evaluated:
            line = f"validation at {line}"
        if self.training_bar is not None:
            self.training_bar.write(line)
        elif self._log is not None:
            self._log.line(line)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(*args, **kwargs)
        self.close()

    def close(self) -> None:
        """Say nothing more, also where the training failed."""
        if self._log is not None:
            self._log.end()


class WriteMetrics(TrainerCallback):
    """Logged steps to ``metrics.jsonl``."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.file, self.resume_step = MetricsFile(path), resume_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.file.begin(self.resume_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        told = "loss" in logs or any(k.startswith("eval_") for k in logs)
        if state.is_world_process_zero and told:
            self.file.write(state.global_step, logs)


def plot_curves(metrics: Path, target: Path) -> bool:
    """Picture of CE and KD by source category over steps; False when there is nothing to draw.

    Validation is dashed.
    """
    records = [r for r in read_metrics(metrics) if "ce" in r or "eval_ce" in r]
    if not records:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("ce", "cross-entropy (nats)")]
    if any("kd" in r for r in records):
        panels.append(("kd", "KL to the teacher at τ (nats)"))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for category, colour in (("language", "tab:blue"), ("document", "tab:orange")):
            for prefix, style, held in (("", "-", ""), ("eval_", "--", ", held out")):
                metric = f"{prefix}{category}/{key}"
                if points := [(r["step"], r[metric]) for r in records if metric in r]:
                    shown = {"color": colour, "label": category + held}
                    axis.plot(*zip(*points, strict=True), style, **shown)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, title="sources")
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return True
