"""What the terminal and the run folder show while a run goes on."""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import WandbCallback
from transformers.trainer_callback import ProgressCallback

from ldistill.checkpoint.logs import StepLog, read_metrics, rewrite_records
from ldistill.common import ranks
from ldistill.common.run_files import SAMPLES, WANDB_RUN
from ldistill.common.telling import Telling
from ldistill.data.index import ShardIndex

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
    """The few numbers of a logged step that one watches; KD is the KL as scaled, by source, in the
    loss."""
    if logs.get("kd_rows"):
        kds = {n: logs.get(f"source/{n}/kd", 0) * logs[f"source/{n}/kd_rows"] for n in kd_scales}
        total = sum(kd_scales[name] * kd for name, kd in kds.items())
        logs = logs | {"kd": total / logs["kd_rows"]}
    parts = [f"{label} {logs[key]:{form}}" for key, label, form in _SHOWN if key in logs]
    return f"step {step}/{steps}: " + ", ".join(parts)


class ShortProgress(ProgressCallback):
    """The Trainer's bar (on a terminal), one short line instead of all of a step's metrics."""

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
    """``metrics.jsonl``: an object a logged step; a resumed run forgets what it does again."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.file, self.resume_step = StepLog(path), resume_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.file.path.parent.mkdir(parents=True, exist_ok=True)
            rewrite_records(self.file.path, self.resume_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        told = any(name == "loss" or name.startswith("eval_") for name in logs or {})
        if state.is_world_process_zero and told:
            finite = {k: v for k, v in logs.items() if not isinstance(v, float) or math.isfinite(v)}
            self.file.append({"step": state.global_step} | finite)


class SampleLog(TrainerCallback):
    """Which samples every step trained on, where ``--log_samples`` asks for it.

    ``samples/rank-N.jsonl`` in the run folder has one line a step of that rank, with the packed
    rows it took: ``{"step": 3, "packs": [["vqav2-000000012", "docvqa-000000003"], ...]}``. Later
    lines than a resumed run's checkpoint are cut away: the files always tell of one history.
    """

    def __init__(self, run: Path, index: ShardIndex, resume_step: int) -> None:
        self.folder, self.index, self.resume_step = run / SAMPLES, index, resume_step
        self.file = StepLog(self.folder / f"rank-{ranks.index()}.jsonl")
        self._pending: list[list[str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ranks.is_first():
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.glob("rank-*.jsonl"):
                rewrite_records(path, self.resume_step)
        ranks.wait()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Note a micro-batch (see `collate`) of the step under way."""
        packs: list[list[str]] = [[] for _ in batch["input_ids"]]
        for sample, pack in zip(batch["doc_sample"].tolist(), batch["doc_batch"].tolist()):
            packs[pack].append(self.index.locate(sample)[2])
        self._pending += packs

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.file.append({"step": state.global_step, "packs": self._pending})
        self._pending = []


def read_samples(run: Path) -> dict[int, list[list[str]]]:
    """``{step: [samples of pack 0, of pack 1, ...]}`` in the plan's order, whatever the ranks."""
    steps: dict[int, list[list[list[str]]]] = defaultdict(list)
    paths = (run / SAMPLES).glob("rank-*.jsonl")
    for path in sorted(paths, key=lambda p: int(p.stem.partition("-")[2])):
        for record in read_metrics(path):
            steps[record["step"]].append(record["packs"])
    # Rank r of R takes packs r, r + R, ...: reading them in turns restores the order.
    return {s: [p for turn in zip(*of) for p in turn] for s, of in sorted(steps.items())}


# ---- Weights & Biases: one run there, however often this one stops ----


def keep_wandb_run(folder: Path, report_to: Sequence[str]) -> None:
    """Have wandb go on in the run whose id the run's folder keeps; made at the first start.

    `$WANDB_RUN_ID`, where set, is taken instead and kept. Call it on rank 0, before training.
    """
    if "wandb" not in report_to:
        return
    file = folder / WANDB_RUN
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
        if self._wandb is not None and not _reported(report, *args, **kwargs):
            self._wandb = None


def close_wandb() -> None:
    """Have everything sent, if this process has a wandb run: a launcher may end it any moment."""
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:
        _reported(wandb.finish)


def _reported(report: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
    try:
        report(*args, **kwargs)
    except Exception as error:  # of wandb's sockets or its own, whatever they are
        told = f"wandb is lost ({type(error).__name__}: {error}); metrics.jsonl has every record."
        print(told, file=sys.stderr, flush=True)
        return False
    return True


def plot_curves(metrics: Path, target: Path) -> bool:
    """Picture of CE and KD by category over steps, validation dashed; False: nothing to draw."""
    records = [r for r in read_metrics(metrics) if "ce" in r or "eval_ce" in r]
    if not records:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"ce": "cross-entropy (nats)", "kd": "KL to the teacher at τ (nats)"}
    if not any("kd" in r for r in records):
        del panels["kd"]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        for category, colour in (("language", "tab:blue"), ("document", "tab:orange")):
            for prefix, style, held in (("", "-", ""), ("eval_", "--", ", held out")):
                metric = f"{prefix}{category}/{key}"
                if points := [(r["step"], r[metric]) for r in records if metric in r]:
                    axis.plot(*zip(*points), style, color=colour, label=category + held)
        axis.set(xlabel="step", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, title="sources")
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return True
