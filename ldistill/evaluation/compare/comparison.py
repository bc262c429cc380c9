"""Comparing variants: scores side by side, samples won and lost, OCRBench's parts.

What cannot be compared is said in `Comparison.notes`; a score that is not there is a footnote of
the table, never a hole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ldistill.evaluation.compare import ocrbench
from ldistill.evaluation.compare import samples as sampled
from ldistill.evaluation.compare.ocrbench import row_score
from ldistill.evaluation.compare.results import TaskResult, Variant, other_rows
from ldistill.evaluation.compare.samples import Match, Pair, Paired, match, paired
from ldistill.evaluation.compare.tables import ScoreTable, score_table
from ldistill.evaluation.compare.task_data import TaskData, load_task_data
from ldistill.evaluation.suites import OTHER, ROWS, Row, rows_of_tasks
from ldistill.evaluation.suites import suite as suite_of

BASELINE = "nanovlm-full"
ORIGINALS = ("nanovlm", "original", "adapted", "teacher")  # names taken for it without --original
_USUAL_OPTIONS = {"dtype": "auto", "tiling": "False"}  # of the lmms-eval model, change nothing


@dataclass(frozen=True)
class Comparison:
    """All that was found, ready to be written."""

    variants: Sequence[Variant]
    table: ScoreTable
    matches: list[Match]  # that have pairs
    paired: list[tuple[str, Row, str | None, Paired]]
    """Variant, row, category of its samples (None: all), won and lost."""
    ocrbench: Mapping[str, Mapping[str, ocrbench.Count]]  # variant → sub-task → count
    data: Mapping[str, TaskData]  # task → its documents, of the tasks that have pairs
    notes: list[str]


def choose_rows(
    variants: Sequence[Variant], suite: str | None = None, tasks: Iterable[str] | None = None
) -> tuple[Row, ...]:
    """Rows of the table: all of a suite, or only those of some tasks.

    By default every row of each group that somebody has results for, and a row per task that is
    in no suite. Raises ValueError: unknown suite or task, or nothing left.
    """
    found: dict[str, TaskResult] = {}
    for variant in variants:
        found |= {**variant.tasks, **found}
    if suite is not None:
        chosen = suite_of(suite).rows
    else:
        groups = {row.group for row in rows_of_tasks(found)}
        chosen = (*(row for row in ROWS if row.group in groups), *other_rows(found))
    wanted = {row.task for row in chosen} if tasks is None else set(tasks)
    unknown = wanted - {row.task for row in chosen}
    chosen = tuple(row for row in chosen if row.task in wanted)
    if unknown or not any(row.task in found for row in chosen):
        what = f"any task of suite {suite}" if suite else "any of these tasks"
        what = f"task {', '.join(sorted(unknown))}" if unknown else what
        raise ValueError(f"no results for {what}; there are results for: {', '.join(found)}.")
    return chosen


def choose_roles(
    names: Sequence[str], baseline: str | None, original: str | None
) -> tuple[str | None, str | None]:
    """Baseline and original: as asked, or by their usual names, or none.

    Raises ValueError: an asked one is not there, or both are the same.
    """
    for role, name in (("baseline", baseline), ("original", original)):
        if name is not None and name not in names:
            raise ValueError(
                f"{role} {name!r} is none of the variants; there are: {', '.join(names)}."
            )
    baseline = baseline or next((name for name in names if name == BASELINE), None)
    usual = (name for name in ORIGINALS if name in names and name != baseline)
    original = original or next(usual, None)
    if baseline is not None and baseline == original:
        raise ValueError(f"baseline and original are both {baseline!r}; they must differ.")
    return baseline, original


def compare(
    variants: Sequence[Variant],
    chosen: Sequence[Row],
    baseline: str | None = None,
    original: str | None = None,
    *,
    read_pictures: bool = True,
    missing: Sequence[str] = (),
) -> Comparison:
    """Compare variants on some rows, each with the baseline: see `choose_rows`, `choose_roles`.

    ``read_pictures``: whether tesseract reads them; ``missing``: sentences on what has no results.
    """
    counts, of_ocrbench = _ocrbench(variants, chosen)
    notes = [*missing, *(note for v in variants for note in v.notes), *of_ocrbench]
    notes += unlike_options(variants, chosen)
    matches: list[Match] = []
    base = next((v for v in variants if v.name == baseline), None)
    if base is None:
        notes.append(f"No baseline: give --baseline, or call one {BASELINE}, for more than scores.")
    else:
        others = [v for v in variants if v is not base]
        matches = [match(row, base, v) for v in others for row in chosen if row.task in v.tasks]
        notes += sampled.sentences(matches)
        if original is None:
            usual = " or ".join(ORIGINALS)
            notes.append(
                f"No original: give --original, or call one {usual}, for shares recovered."
            )
    matches = [m for m in matches if m.pairs]
    with_pairs = dict.fromkeys(m.row.task for m in matches)
    data = {task: load_task_data(base.tasks[task], read=read_pictures) for task in with_pairs}
    tests, without = _paired(matches, data)
    scores: dict[str, dict[str, float | None]] = {v.name: {} for v in variants}
    remarks: dict[tuple[str, str], str] = {}
    for v in variants:
        for row in (row for row in chosen if row.task in v.tasks):
            scores[v.name][row.id] = row_score(v.tasks[row.task], row)
            if text := _remarks(v.tasks[row.task], row):
                remarks[v.name, row.id] = f"{text[0].upper()}{text[1:]}."
    table = score_table(scores, chosen, baseline=baseline, original=original, notes=remarks)
    return Comparison(variants, table, matches, tests, counts, data, [*notes, *without])


def _remarks(result: TaskResult, row: Row) -> str:
    """What the reader of a score must know, without capital and full stop."""
    said = []
    if row_score(result, row) is None:
        there = ", ".join(result.scores) or "no numbers"
        said.append(f"the results have no {row.key} for {row.task} (there are: {there})")
    if result.limited:
        said.append(f"on {result.expected:,} of the task's {result.available:,} samples")
    if result.expected and result.samples_path.is_file():
        logged = len(result.samples(row.filter))
        if logged < result.expected:
            said.append(f"partial: {logged:,} of {result.expected:,} samples are logged")
    if ocrbench.recounted(result) is not None:
        said.append("recomputed from the samples: lmms-eval divides by 1000 regardless")
    return "; ".join(said)


def unlike_options(variants: Sequence[Variant], rows: Iterable[Row]) -> list[str]:
    """A sentence for each way in which the options of variants differ, with its tasks."""
    where: dict[str, list[str]] = defaultdict(list)
    usual = _USUAL_OPTIONS.items()
    for task in dict.fromkeys(row.task for row in rows):
        own = {v.name: v.tasks[task].model_args.items() for v in variants if task in v.tasks}
        options = {v: dict(i for i in items if i not in usual) for v, items in own.items()}
        names = dict.fromkeys(name for of in options.values() for name in of)
        names.pop("pretrained", None)
        if differ := [n for n in names if len({of.get(n) for of in options.values()}) > 1]:
            each = (
                f"{v} {', '.join(f'{n}={of[n]}' for n in differ if n in of) or 'without'}"
                for v, of in options.items()
            )
            where["; ".join(each)].append(task)
    return [
        f"Evaluated with different model options: {each} ({', '.join(tasks)})."
        for each, tasks in where.items()
    ]


def unlike_samples(variants: Sequence[Variant], table: ScoreTable) -> list[str]:
    """A sentence for each row whose shares recovered mix scores of different sample counts."""
    said = []
    for row in table.rows:
        found = {v.name: v.tasks[row.task].expected for v in variants if table.cell(v.name, row)}
        counts = {name: count for name, count in found.items() if count is not None}
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{counts[v]:,} for {v}" for v in table.variants if v in counts)
            said.append(f"{row.name}: scores of different samples ({each}), also in its group.")
    return said


def _ocrbench(
    variants: Sequence[Variant], chosen: Sequence[Row]
) -> tuple[dict[str, dict[str, ocrbench.Count]], list[str]]:
    """Counts by variant, and what stands against them."""
    counts, notes = {}, []
    row = next((row for row in chosen if row.task == ocrbench.TASK), None)
    for variant in variants if row else ():
        name, result = variant.name, variant.tasks.get(ocrbench.TASK)
        samples = result.samples(row.filter) if result else {}
        if not samples:
            what = "samples" if result else "results"
            notes.append(f"OCRBench: {name} has no {what}: its sub-tasks are missing.")
            continue
        try:
            counts[name] = ocrbench.count(samples.values())
        except ValueError as error:
            notes.append(f"{error} {name}'s sub-tasks are missing.")
            continue
        right, told = ocrbench.total(counts[name]).right, result.scores.get(row.key)
        if not result.limited and told is not None and abs(told * 1000 - right) > 0.5:
            notes.append(
                f"OCRBench: {name}'s samples add up to {right:g}, its results file says "
                f"{told * 1000:g}: are they of one evaluation?"
            )
    return counts, notes


def _paired(
    matches: Iterable[Match], data: Mapping[str, TaskData]
) -> tuple[list[tuple[str, Row, str | None, Paired]], list[str]]:
    """Tests by row and category, and sentences on rows whose categories are not known."""
    found = []
    without: dict[str, None] = {}
    known: dict[tuple[str, int], tuple[str, ...]] = {}  # categories of (row, document)
    for m in matches:
        task, documents = m.row.task, data[m.row.task]
        categories: dict[str, list[Pair]] = defaultdict(list)
        for pair in m.pairs:
            key, sample = (m.row.id, pair.baseline.doc_id), pair.baseline
            if key not in known:
                known[key] = sampled.sample_categories(sample, m.row) or (
                    sampled.document_categories(documents.document(sample) or {}, task)
                )
            for name in known[key]:
                categories[name].append(pair)
        parts: list[tuple[str | None, Sequence[Pair]]] = [(None, m.pairs)]
        parts += sorted(categories.items()) if len(categories) > 1 else []
        for name, pairs in parts:
            test = paired([p.before for p in pairs], [p.after for p in pairs])
            found.append((m.variant, m.row, name, test))
        expected = task in sampled.CATEGORY_COLUMNS or m.row.group == OTHER
        if expected and not categories and documents.reason:
            without[f"{m.row.name}: categories are missing: {documents.reason}."] = None
    return found, list(without)
