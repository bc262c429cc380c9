"""The page of won and lost samples: one file, opens from disk, needs nothing else.

The template is ``failures.html``; data go into it as JSON, pictures as data URIs. Filters (variant,
task, won or lost, mode, a search) stand in the address: ``failures.html#mode=elsewhere&task=...``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ldistill.evaluation.compare.examples import Example
from ldistill.evaluation.compare.failure_modes import MODES

RULES: tuple[tuple[str, str], ...] = (
    (
        MODES["corrected"],
        "The expected text is no word, and the answer is a word near it (PEAEC → peace), or is "
        "spelt like one (meLtiid → meltid).",
    ),
    (
        MODES["shortened"],
        "A number with fewer decimals (5.04 → 5), some of the expected words in order (21–49 years "
        "of age → 21–49 years), the same number or date in another notation, initials; or, if the "
        "picture does not say it so, at least half of the words shared.",
    ),
    (
        MODES["elsewhere"],
        "The answer stands in the picture's text, which comes from the data set, from tesseract, "
        "or from the answers to other questions about the same picture.",
    ),
    (
        MODES["undecided"],
        "No rule fits so far as is known, but the text of the picture is not, or not all of it.",
    ),
    (
        "Order",
        "The first rule that fits counts: corrected, shortened, elsewhere, shared words. The rules "
        "count; they do not explain.",
    ),
)


def write_page(
    path: Path,
    examples: Sequence[Example],
    pictures: Mapping[tuple[str, int], Sequence[str]],
    *,
    baseline: str,
    found: int,
    without_picture: Mapping[str, str],
    notes: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        examples: to be listed, in order.
        pictures: (task, document) → data URIs.
        baseline: name of the variant the others are compared with.
        found: how many samples were judged, listed here or not.
        without_picture: row name → why its samples show no picture.
        notes: sentences under the title.
    """
    variants = list(dict.fromkeys(e.variant for e in examples))
    listed = f"all {found:,}" if found == len(examples) else f"{len(examples):,} of {found:,}"
    data = {
        "title": f"Samples won and lost against {baseline}",
        "lead": (
            f"Listed are {listed} samples of reading tasks on which a variant and {baseline} score "
            "differently. On a lost sample the variant's answer is judged, on a won one the "
            "baseline's."
        ),
        "baseline": baseline,
        "variants": variants,
        "tasks": list(dict.fromkeys(e.row.name for e in examples)),
        "modes": MODES,
        "rules": RULES,
        "notes": list(notes),
        "bare": {e.row.name: without_picture.get(e.row.name, "none in its data") for e in examples},
        "pictures": {f"{task}/{doc}": list(uris) for (task, doc), uris in pictures.items()},
        "examples": [_record(e) for e in examples],
    }
    template = (
        resources.files("ldistill.evaluation.compare").joinpath("failures.html").read_text("utf-8")
    )
    path.write_text(template.replace("__DATA__", _json(data)), encoding="utf-8")


def _record(example: Example) -> dict[str, Any]:
    return {
        "variant": example.variant,
        "task": example.row.name,
        "category": example.category,
        "outcome": example.outcome,
        "mode": example.verdict.mode,
        "rule": example.verdict.rule,
        "reason": example.verdict.reason,
        "doc_id": example.sample.doc_id,
        "question": example.sample.question,
        "expected": " | ".join(example.accepted),
        "baseline_answer": example.baseline_answer,
        "variant_answer": example.variant_answer,
        "picture": f"{example.row.task}/{example.sample.doc_id}",
    }


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
