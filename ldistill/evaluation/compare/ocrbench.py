"""OCRBench in its ten sub-tasks and four groups, recomputed from samples (the paper's Table 6).

lmms-eval's results file holds only the total, and divides it by 1000 however many samples were
run. The paper groups by how much of a document's layout the model must understand; 71% of its loss
lay in extraction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ldistill.evaluation.compare.results import Sample, TaskResult
from ldistill.evaluation.suites import Row

TASK = "ocrbench"
GROUPS = {
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
"""Group → its sub-tasks, lmms-eval's ``question_type``, in the order of Table 6."""
KINDS = [kind for kinds in GROUPS.values() for kind in kinds]


@dataclass(frozen=True)
class Count:
    """Right answers out of the samples there were."""

    right: float
    of: int


def count(samples: Iterable[Sample]) -> dict[str, Count]:
    """Right answers by sub-task; a sub-task without samples is not in it.

    Raises:
        ValueError: a sample without OCRBench's score, or of an unknown sub-task.
    """
    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for sample in samples:
        logged = sample.metrics.get("ocrbench_accuracy")
        kind = logged.get("question_type") if isinstance(logged, Mapping) else None
        if kind not in scores:
            raise ValueError(f"OCRBench sample {sample.doc_id} has no known sub-task ({kind!r}).")
        scores[kind].append(logged["score"])
    return {kind: Count(sum(own), len(own)) for kind, own in scores.items() if own}


def total(counts: Mapping[str, Count], kinds: Iterable[str] = KINDS) -> Count | None:
    """Some sub-tasks together; None where none of them is there."""
    there = [counts[kind] for kind in kinds if kind in counts]
    return Count(sum(c.right for c in there), sum(c.of for c in there)) if there else None


def recounted(result: TaskResult) -> float | None:
    """Share of right answers where a limit was set, of which lmms-eval makes thousandths.

    None for another task, the whole benchmark, or samples that cannot be counted.
    """
    if result.task == TASK and result.limited:
        try:
            whole = total(count(result.samples().values()))
        except ValueError:
            return None
        return whole and whole.right / whole.of
    return None


def row_score(result: TaskResult, row: Row) -> float | None:
    """The row's score, of a limited OCRBench recounted; None when it is not there or no number."""
    own = recounted(result)
    return result.scores.get(row.key) if own is None else own


def losses(
    baseline: Mapping[str, Count], variant: Mapping[str, Count]
) -> dict[str, tuple[float, float]]:
    """Group → (points gained, their share of the whole change); the share is nan without change."""
    change = {}
    for group, kinds in GROUPS.items():
        before, after = total(baseline, kinds), total(variant, kinds)
        if before and after:
            change[group] = after.right - before.right
    whole = sum(change.values())
    return {g: (c, c / whole if whole else float("nan")) for g, c in change.items()}
