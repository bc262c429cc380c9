"""Writes what lmms-eval 0.7.3 writes: results and samples files, for tests of `compare`.

`test_results.py` holds it against lmms-eval's own writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIME = "20261101_120000"


def sample(
    doc_id: int,
    answer: Any,
    target: Any,
    question: str | None = None,
    **metrics: Any,
) -> dict[str, Any]:
    """One line of a samples file; ``answer`` is text, or pairs (loss, greedy) of choices."""
    return {
        "doc_id": doc_id,
        "target": str(target),
        "filtered_resps": answer,
        "token_counts": [None],
        "doc_hash": f"{doc_id:064x}",
        **metrics,
        "input": f"Question {doc_id}?" if question is None else question,
    }


def write_results(
    folder: Path,
    scores: Mapping[str, Mapping[str, float]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    *,
    model: str = "",
    time: str = TIME,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    expected: Mapping[str, int] | None = None,
    available: Mapping[str, int] | None = None,
) -> Path:
    """A results file (and samples files) of one evaluation in ``folder/<model>/``.

    Args:
        scores: task → ``metric,filter`` → value.
        samples: task → lines.
        expected, available: task → documents asked for, documents there are.
    """
    samples = samples or {}
    inside = folder / "model__name"
    inside.mkdir(parents=True, exist_ok=True)
    counts = {t: len(samples.get(t, ())) or 10 for t in scores} | dict(expected or {})
    results = {
        task: {"alias": task}
        | {k: v for key, value in of.items() for k, v in _with_errors(key, value)}
        | {"samples": counts[task]}
        for task, of in scores.items()
    }
    record = {
        "results": results,
        "group_subtasks": {task: [] for task in scores},
        "configs": {
            task: {"task": task, "output_type": "generate_until"}
            | dict((configs or {}).get(task, {}))
            for task in scores
        },
        "versions": dict.fromkeys(scores, "Yaml"),
        "n-shot": dict.fromkeys(scores, 0),
        "higher_is_better": {
            task: {key.split(",")[0]: True for key in of} for task, of in scores.items()
        },
        "n-samples": {
            task: {"original": (available or {}).get(task, counts[task]), "effective": counts[task]}
            for task in scores
        },
        "config": {"model": "ldistill_nanovlm", "model_args": f"pretrained={model}", "limit": None},
        "date": time,
        "model_source": "ldistill_nanovlm",
        "model_name": model or str(folder),
        "model_name_sanitized": "model__name",
    }
    path = inside / f"{time}_results.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
    for task, lines in samples.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (inside / f"{time}_samples_{task}.jsonl").write_text(text, encoding="utf-8")
    return path


def _with_errors(key: str, value: float) -> list[tuple[str, Any]]:
    metric, filter = key.split(",")
    return [
        (key, value),
        (f"{metric}_stderr,{filter}", "N/A"),
        (f"{metric}_stderr_clt,{filter}", 0.1),
    ]


TABLE_6 = {
    "Regular Text Recognition": (50, 47, 48),
    "Irregular Text Recognition": (50, 40, 44),
    "Artistic Text Recognition": (50, 46, 45),
    "Handwriting Recognition": (50, 30, 36),
    "Digit String Recognition": (50, 38, 42),
    "Non-Semantic Text Recognition": (50, 39, 46),
    "Handwritten Mathematical Expression Recognition": (100, 46, 52),
    "Scene Text-centric VQA": (200, 140, 150),
    "Key Information Extraction": (200, 84, 147),
    "Doc-oriented VQA": (200, 90, 116),
}
"""The paper's Table 6: sub-task → samples, LinguDistill, nanoVLM-full."""


def ocrbench_samples(column: int) -> list[dict[str, Any]]:
    """1000 samples that give a column of Table 6 (1: LinguDistill, 2: nanoVLM-full)."""
    lines: list[dict[str, Any]] = []
    for kind, counts in TABLE_6.items():
        for i in range(counts[0]):
            right = i < counts[column]
            answer = f"text {len(lines)}" if right else "wrong"
            lines.append(ocrbench_sample(len(lines), kind, [f"text {len(lines)}"], answer, right))
    return lines


def ocrbench_sample(
    doc_id: int,
    kind: str,
    accepted: list[str],
    answer: str,
    right: bool,
    question: str | None = None,
) -> dict[str, Any]:
    """A line of OCRBench's samples."""
    logged = {
        "question_type": kind,
        "score": int(right),
        "prediction": answer,
        "ground_truth": accepted,
    }
    return sample(doc_id, answer, accepted, question, ocrbench_accuracy=logged)
