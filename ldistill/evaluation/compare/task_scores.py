"""The score of a row in one variant's results, as `eval` prints and `compare` tables it."""

from __future__ import annotations

from ldistill.evaluation.compare import ocrbench
from ldistill.evaluation.compare.results import TaskResult
from ldistill.evaluation.compare.tables import OTHER
from ldistill.evaluation.suites import Row


def row_score(result: TaskResult, row: Row) -> float | None:
    """The row's score, of a limited OCRBench recounted; None when it is not there or no number."""
    recounted = ocrbench.limited_score(result)
    return result.scores.get(row.key) if recounted is None else recounted


def other_row(result: TaskResult) -> Row:
    """A row for a task of no suite: its first metric of which more is better."""
    for key in result.scores:
        metric, filter = key.split(",", 1)
        if result.higher_is_better.get(metric, True):
            return Row(result.task, result.task, OTHER, metric, filter)
    return Row(result.task, result.task, OTHER, "score")
