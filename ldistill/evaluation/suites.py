"""The suites: which tasks belong together, what they are called, which number counts.

A package with tasks of its own adds its suite by `add`, as ``ldistill.tiny.suite`` does. The
paper's Appendix B lists realworldqa under documents and ai2d under general; its result tables,
which are followed, the other way. Where it leaves the metric open: ARC and HellaSwag are `acc`
(not length-normalised), captions CIDEr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ldistill.common.errors import did_you_mean


@dataclass(frozen=True)
class Row:
    """One row of a result table: one score of one lmms-eval task."""

    task: str  # lmms-eval's name of the task
    name: str  # in a table
    group: str  # key in `GROUPS`
    metric: str  # lmms-eval's; more is better for all of them
    filter: str = "none"  # that the answers pass before they are scored
    top: float = 1.0  # highest possible score (CIDEr has none; 1 is the references' own scale)
    digits: int = 3  # decimals in a table

    @property
    def key(self) -> str:
        """Of the score in lmms-eval's results."""
        return f"{self.metric},{self.filter}"

    @property
    def id(self) -> str:
        """Unique over rows: the task, with the metric where a task has several rows (MME)."""
        return f"{self.task}:{self.metric}" if self.task == "mme" else self.task


@dataclass(frozen=True)
class Suite:
    """Groups of rows that are run by one command."""

    name: str
    groups: tuple[str, ...]
    batch_size: int = 1  # the paper's; answers don't depend on it beyond rounding
    make_tasks: Callable[[int | None], Path] | None = None
    """Of tasks made here, so that nothing need be fetched: items per task → their folder."""

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for group in self.groups for row in ROWS if row.group == group)

    @property
    def tasks(self) -> tuple[str, ...]:
        """lmms-eval's tasks, each once, in table order."""
        return tuple(dict.fromkeys(row.task for row in self.rows))


GROUPS = {
    "language": "Language and knowledge-heavy",
    "document": "Document and OCR",
    "general": "General multimodal",
}
"""Group → title, in the order of the tables."""
OTHER = "other"  # the group of tasks that are in no suite
READING = {"document", OTHER}  # groups whose generated answers are text to be read in pictures

ROWS: list[Row] = [
    Row("ai2d", "AI2D", "language", "exact_match", "flexible-extract"),
    Row("coco2017_cap_val", "COCO 2017 Captioning", "language", "coco_CIDEr"),
    Row("scienceqa", "ScienceQA", "language", "exact_match"),
    Row("arc_easy", "ARC Easy", "language", "acc"),
    Row("arc_challenge", "ARC Challenge", "language", "acc"),
    Row("hellaswag", "HellaSwag", "language", "acc"),
    Row("docvqa_val", "DocVQA", "document", "anls"),
    Row("infovqa_val", "InfographicVQA", "document", "anls"),
    Row("ocrbench", "OCRBench", "document", "ocrbench_accuracy"),
    Row("realworldqa", "RealWorldQA", "general", "exact_match"),
    Row("mme", "MME Cognition", "general", "mme_cognition_score", top=800, digits=0),
    Row("mme", "MME Perception", "general", "mme_perception_score", top=2000, digits=0),
    Row("mmmu_val", "MMMU", "general", "mmmu_acc"),
    Row("mmstar", "MMStar", "general", "average"),
]
"""Every row of every table, in table order."""
SUITES = {group: Suite(group, (group,)) for group in GROUPS}
SUITES["paper"] = Suite("paper", tuple(GROUPS))


def add(
    new: Suite, groups: Mapping[str, str], own: Iterable[Row], reading: Iterable[str] = ()
) -> None:
    """Make a suite known, with its groups (key → title; which of them read) and rows."""
    SUITES[new.name] = new
    GROUPS.update(groups)
    ROWS.extend(own)
    READING.update(reading)


def group_title(group: str) -> str:
    return GROUPS.get(group, "Other tasks" if group == OTHER else group)


def suite(name: str) -> Suite:
    """The suite of that name; ValueError: an unknown one."""
    if name not in SUITES:
        hint = did_you_mean(name, SUITES)
        raise ValueError(f"no suite {name!r}.{hint} There are: {', '.join(SUITES)}.")
    return SUITES[name]


def rows_of_tasks(tasks: Iterable[str]) -> tuple[Row, ...]:
    """Known rows of some lmms-eval tasks, in table order; unknown tasks have none."""
    wanted = set(tasks)
    return tuple(row for row in ROWS if row.task in wanted)
