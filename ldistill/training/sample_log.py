"""Which samples every step trained on, where ``--log_samples`` asks for it.

``samples/rank-N.jsonl`` in the run folder has one line a step of that rank, with the packed rows it
took: ``{"step": 3, "packs": [["vqav2-000000012", "docvqa-000000003"], ...]}``. A resumed run cuts
every rank's file back to its checkpoint's step, so the files always tell of one history.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ldistill.common import ranks
from ldistill.common.run_files import SAMPLES
from ldistill.data.archive import sample_key
from ldistill.data.index import ShardIndex
from ldistill.training.metrics import StepLog, read_metrics, rewrite_records


class SampleLog(TrainerCallback):
    """Writes a rank's line when its optimizer step is done.

    Args:
        run: the run's folder.
        index: names the samples.
        resume_step: later lines are cut away.
    """

    def __init__(self, run: Path, index: ShardIndex, resume_step: int) -> None:
        self.folder, self.index, self.resume_step = run / SAMPLES, index, resume_step
        self.file = StepLog(self.folder / f"rank-{ranks.index()}.jsonl")
        self._rows = index.column("row")
        self._pending: list[list[str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ranks.is_first():
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.glob("rank-*.jsonl"):
                rewrite_records(path, self.resume_step)
        ranks.wait()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Note a micro-batch (see `collate`) of the step under way."""
        samples, rows = batch["doc_sample"].numpy(), batch["doc_batch"].numpy()
        names = self._names(samples)
        for row in range(batch["input_ids"].shape[0]):
            self._pending.append([names[i] for i in np.flatnonzero(rows == row)])

    def _names(self, samples: np.ndarray) -> list[str]:
        sources = self.index.source_of(samples)
        rows = self._rows[samples]
        return [sample_key(self.index.sources[s], int(r)) for s, r in zip(sources, rows)]

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
