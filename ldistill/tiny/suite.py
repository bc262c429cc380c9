"""The suite ``tiny`` of `ldistill eval`; importing this module makes it known."""

from __future__ import annotations

from pathlib import Path

from ldistill.evaluation.suites import Row, Suite, add

GROUPS = {
    "tiny_language": "Language",
    "tiny_reading": "Reading",
    "tiny_vision": "Vision and knowledge",
}
ROWS = (
    Row("tiny_facts", "Facts", "tiny_language", "acc"),
    Row("tiny_statements", "Statements", "tiny_language", "acc"),
    Row("tiny_spelling", "Spelling", "tiny_language", "exact_match"),
    Row("tiny_words", "Words", "tiny_reading", "exact_match"),
    Row("tiny_codes", "Codes", "tiny_reading", "exact_match"),
    Row("tiny_fields", "Fields", "tiny_reading", "exact_match"),
    Row("tiny_naming", "Naming", "tiny_vision", "exact_match"),
    Row("tiny_knowledge", "Knowledge", "tiny_vision", "acc"),
)


def _make_tasks(items_per_task: int | None) -> Path:
    from ldistill.tiny.prepare import prepare_tasks  # draws pictures: not for --help

    return prepare_tasks(items_per_task)


add(Suite("tiny", tuple(GROUPS), 64, _make_tasks), GROUPS, ROWS, ("tiny_reading",))
