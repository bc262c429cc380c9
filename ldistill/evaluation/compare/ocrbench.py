"""OCRBench in its ten sub-tasks and four groups, recomputed from samples (the paper's Table 6).

lmms-eval's results file holds only the total, and divides it by 1000 however many samples were
run. The paper groups by how much of a document's layout the model must understand: reading printed
text, reading what a language prior cannot help with, text in scenes, and extraction from documents
(key information and questions about documents), where 71% of its loss lay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ldistill.evaluation.compare.results import Sample, TaskResult

TASK = "ocrbench"
METRIC = "ocrbench_accuracy"

GROUPS: dict[str, tuple[str, ...]] = {
    "Text recognition": (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
    ),
    "Handwriting and non-semantic": (
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
        "Handwritten Mathematical Expression Recognition",
    ),
    "Scene text VQA": ("Scene Text-centric VQA",),
    "Layout extraction": ("Key Information Extraction", "Doc-oriented VQA"),
}
"""Group → lmms-eval's ``question_type``, in the order of Table 6."""

SIZES: dict[str, int] = {
    "Regular Text Recognition": 50,
    "Irregular Text Recognition": 50,
    "Artistic Text Recognition": 50,
    "Handwriting Recognition": 50,
    "Digit String Recognition": 50,
    "Non-Semantic Text Recognition": 50,
    "Handwritten Mathematical Expression Recognition": 100,
    "Scene Text-centric VQA": 200,
    "Key Information Extraction": 200,
    "Doc-oriented VQA": 200,
}
"""Samples of each sub-task in the whole benchmark."""


@dataclass(frozen=True)
class Count:
    """Right answers out of the samples there were."""

    right: float
    of: int

    def __add__(self, other: Count) -> Count:
        return Count(self.right + other.right, self.of + other.of)


def count(samples: Iterable[Sample]) -> dict[str, Count]:
    """Right answers by sub-task; a sub-task without samples is not in it.

    Raises:
        ValueError: a sample without OCRBench's score, or of an unknown sub-task.
    """
    right: Counter[str] = Counter()
    of: Counter[str] = Counter()
    for sample in samples:
        logged = sample.metrics.get(METRIC)
        kind = logged.get("question_type") if isinstance(logged, Mapping) else None
        if kind not in SIZES:
            raise ValueError(
                f"OCRBench sample {sample.doc_id} has no known sub-task ({kind!r}): is this "
                "lmms-eval's task ocrbench?"
            )
        right[kind] += logged["score"]
        of[kind] += 1
    return {kind: Count(right[kind], of[kind]) for kind in SIZES if of[kind]}


def grouped(counts: Mapping[str, Count]) -> dict[str, Count]:
    """Counts by group, of the sub-tasks that are there."""
    groups = {}
    for group, kinds in GROUPS.items():
        parts = [counts[kind] for kind in kinds if kind in counts]
        if parts:
            groups[group] = sum(parts, Count(0, 0))
    return groups


def total(counts: Mapping[str, Count]) -> Count:
    """All sub-tasks together."""
    return sum(counts.values(), Count(0, 0))


def complete(counts: Mapping[str, Count]) -> bool:
    """Whether these are all 1000 samples."""
    return {kind: c.of for kind, c in counts.items()} == SIZES


def limited_score(result: TaskResult) -> float | None:
    """Share of right answers where a limit was set, of which lmms-eval makes thousandths.

    None for another task, the whole benchmark, or samples that cannot be counted.
    """
    if result.task != TASK or not result.limited:
        return None
    try:
        whole = total(count(result.samples().values()))
    except ValueError:
        return None
    return whole.right / whole.of if whole.of else None


def losses(
    baseline: Mapping[str, Count], variant: Mapping[str, Count]
) -> dict[str, tuple[float, float]]:
    """Group → (points gained, their share of the whole change); the share is nan without change."""
    before, after = grouped(baseline), grouped(variant)
    change = {g: after[g].right - before[g].right for g in before if g in after}
    whole = sum(change.values())
    return {g: (c, c / whole if whole else float("nan")) for g, c in change.items()}
