"""The score and the category of a single sample, per task.

lmms-eval logs what each task's own code returns: a number, a dict with ``score`` and what its
aggregation needs, or (MMMU) only the parsed answer. Captions have no score per sample in the logs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldistill.evaluation.compare.results import Sample
from ldistill.evaluation.suites import Row

CATEGORY_COLUMNS: dict[str, str] = {
    "scienceqa": "subject",
    "docvqa_val": "question_types",
    "infovqa_val": "answer_type",
}
"""Task → column of its data that names the category, where the samples themselves don't."""

USUAL_COLUMNS = ("category", "subject", "question_type", "topic")
"""Columns tried for every other task."""


def sample_score(sample: Sample, row: Row) -> float | None:
    """Score of one sample under a row's metric; None where the logs hold none."""
    value = sample.metrics.get(row.metric)
    if isinstance(value, Mapping):
        if "parsed_pred" in value:
            return _mmmu(value)
        value = value.get("score", value.get(row.metric))
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _mmmu(value: Mapping[str, Any]) -> float | None:
    """MMMU judges when it aggregates; choices are compared here, open answers by its own code."""
    if value.get("question_type") == "multiple-choice":
        gold = value["answer"]
        allowed = gold if isinstance(gold, list) else [gold]
        return float(any(parsed in allowed for parsed in value["parsed_pred"]))
    try:
        from lmms_eval.tasks.mmmu.utils import eval_open
    except ImportError:
        return None
    return float(any(eval_open(value["answer"], parsed) for parsed in value["parsed_pred"]))


def sample_categories(sample: Sample, row: Row) -> tuple[str, ...]:
    """Categories that the logged score itself names (OCRBench, MME, MMStar, MMMU)."""
    value = sample.metrics.get(row.metric)
    if not isinstance(value, Mapping):
        return ()
    if row.task == "mmstar":
        return tuple(k for k in sample.metrics if k != row.metric)[:1]
    for key in ("subdomain", "category"):
        if isinstance(value.get(key), str):
            return (value[key],)
    question_type = value.get("question_type")
    return (question_type,) if isinstance(question_type, str) else ()


def document_categories(document: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """Categories by the task's data; a document may have several (DocVQA)."""
    columns = (CATEGORY_COLUMNS[task],) if task in CATEGORY_COLUMNS else USUAL_COLUMNS
    for column in columns:
        value = document.get(column)
        if isinstance(value, str) and value:
            return (value,)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            return tuple(value)
    return ()
