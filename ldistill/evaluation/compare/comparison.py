"""Comparing variants: scores side by side, samples won and lost, OCRBench's parts.

    variants = read_variants(["runs/nanovlm-full", "runs/lingudistill", "nanovlm=eval/original"])
    comparison = compare(variants, choose_rows(variants))
    print(comparison.table.markdown())

What cannot be compared is said in `Comparison.notes`; a score that is not there is a footnote of
the table, never a hole. `report.write` writes all of it down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ldistill.evaluation.compare import ocrbench
from ldistill.evaluation.compare.conditions import unlike_options
from ldistill.evaluation.compare.matching import Match, Pair, match, sentences
from ldistill.evaluation.compare.paired import Paired, paired
from ldistill.evaluation.compare.results import TaskResult, Variant
from ldistill.evaluation.compare.sample_scores import (
    CATEGORY_COLUMNS,
    document_categories,
    sample_categories,
)
from ldistill.evaluation.compare.tables import OTHER, ScoreTable, score_table, unknown_variant
from ldistill.evaluation.compare.task_data import TaskData, load_task_data
from ldistill.evaluation.compare.task_scores import other_row, row_score
from ldistill.evaluation.suites import ROWS, Row, rows, rows_of_tasks

BASELINE = "nanovlm-full"
ORIGINALS = ("nanovlm", "original", "adapted", "teacher")
"""Names taken for the original where --original is not given."""


@dataclass(frozen=True)
class PairedRow:
    """Won and lost of one variant on one row, or on one category of its samples."""

    variant: str
    row: Row
    category: str | None
    result: Paired


@dataclass(frozen=True)
class Comparison:
    """All that was found; plain values, ready to be written."""

    variants: tuple[Variant, ...]
    table: ScoreTable
    matches: tuple[Match, ...]
    paired: tuple[PairedRow, ...]
    ocrbench: Mapping[str, Mapping[str, ocrbench.Count]]
    """Variant → sub-task → count."""
    data: Mapping[str, TaskData]
    """Task → its documents, of the tasks that have pairs."""
    notes: tuple[str, ...]


def choose_rows(
    variants: Sequence[Variant], suite: str | None = None, tasks: Iterable[str] | None = None
) -> tuple[Row, ...]:
    """Rows of the table.

    Args:
        variants: whose results there are.
        suite: all rows of that suite; default: every row of each group that somebody has results
            for, and a row per task that is in no suite.
        tasks: only these tasks.

    Raises:
        ValueError: unknown suite or task, or nothing left.
    """
    found = list(dict.fromkeys(task for v in variants for task in v.tasks))
    if suite is not None:
        chosen = rows(suite)
    else:
        groups = {row.group for row in rows_of_tasks(found)}
        listed = [row for row in ROWS if row.group in groups]
        known = {row.task for row in listed}
        others = (
            next(v.tasks[t] for v in variants if t in v.tasks) for t in found if t not in known
        )
        chosen = (*listed, *map(other_row, others))
    if tasks is not None:
        wanted = set(tasks)
        unknown = wanted - {row.task for row in chosen}
        if unknown:
            raise ValueError(
                f"no results for task {', '.join(sorted(unknown))}; there are results for: "
                f"{', '.join(found)}."
            )
        chosen = tuple(row for row in chosen if row.task in wanted)
    if not any(row.task in found for row in chosen):
        raise ValueError(
            f"no results for any task of {f'suite {suite}' if suite else 'these'}; there are "
            f"results for: {', '.join(found) or 'nothing'}."
        )
    return chosen


def choose_roles(
    names: Sequence[str], baseline: str | None, original: str | None
) -> tuple[str | None, str | None]:
    """Baseline and original: as asked, or by their usual names, or none.

    Raises:
        ValueError: an asked one is not there, or both are the same.
    """
    for role, name in (("baseline", baseline), ("original", original)):
        if name is not None and name not in names:
            raise ValueError(unknown_variant(role, name, names))
    if baseline is None and BASELINE in names:
        baseline = BASELINE
    if original is None:
        original = next((name for name in ORIGINALS if name in names and name != baseline), None)
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
    """Compare variants on some rows.

    Args:
        variants: of `read_variants`.
        chosen: of `choose_rows`.
        baseline: name of the variant that others are compared with; see `choose_roles`.
        original: name of the variant before training.
        read_pictures: let tesseract read pictures, where failure modes are looked for.
        missing: sentences on what was asked for and has no results.

    Raises:
        ValueError: an unknown baseline or original.
    """
    baseline, original = choose_roles([v.name for v in variants], baseline, original)
    counts, notes = _ocrbench(variants, chosen)
    table = _table(variants, chosen, baseline, original)
    notes = [*missing, *(note for v in variants for note in v.notes), *notes]
    notes += unlike_options(variants, chosen)
    matches: list[Match] = []
    base = next((v for v in variants if v.name == baseline), None)
    if base is None:
        notes.append(
            f"No baseline: no variant is called {BASELINE} and --baseline was not given, so there "
            "are no changes, no shares recovered and no won or lost samples."
        )
    else:
        others = [v for v in variants if v is not base]
        matches = [match(row, base, v) for v in others for row in chosen if row.task in v.tasks]
        notes += sentences(matches)
    if base is not None and original is None:
        notes.append(
            f"No original: no variant is called {', '.join(ORIGINALS[:-1])} or {ORIGINALS[-1]} and "
            "--original was not given, so there are no shares recovered."
        )
    data = _data(base, matches, read_pictures)
    pairs, more = _paired(matches, data)
    return Comparison(
        tuple(variants), table, tuple(matches), tuple(pairs), counts, data, (*notes, *more)
    )


def _table(
    variants: Sequence[Variant],
    chosen: Sequence[Row],
    baseline: str | None,
    original: str | None,
) -> ScoreTable:
    scores: dict[str, dict[str, float]] = {}
    notes: dict[tuple[str, str], str] = {}
    for variant in variants:
        scores[variant.name] = {}
        for row in chosen:
            result = variant.tasks.get(row.task)
            if result is None:
                continue
            value, said = row_score(result, row), _remarks(result, row)
            if ocrbench.limited_score(result) is not None:
                said.append("recomputed from the samples: lmms-eval divides by 1000 regardless")
            if value is not None:
                scores[variant.name][row.id] = value
            if said:
                notes[variant.name, row.id] = _sentence(said)
    return score_table(scores, chosen, baseline=baseline, original=original, notes=notes)


def _sentence(clauses: Sequence[str]) -> str:
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}."


def _remarks(result: TaskResult, row: Row) -> list[str]:
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
    return said


def _ocrbench(
    variants: Sequence[Variant], chosen: Sequence[Row]
) -> tuple[dict[str, dict[str, ocrbench.Count]], list[str]]:
    """Counts by variant, and what stands against them."""
    counts, notes = {}, []
    row = next((row for row in chosen if row.task == ocrbench.TASK), None)
    for variant in variants if row else ():
        result = variant.tasks.get(ocrbench.TASK)
        samples = result.samples(row.filter) if result else {}
        if not samples:
            what = "results" if result is None else "samples"
            notes.append(f"OCRBench: {variant.name} has no {what}: its sub-tasks are missing.")
            continue
        try:
            counts[variant.name] = ocrbench.count(samples.values())
        except ValueError as error:
            notes.append(f"{error} {variant.name}'s sub-tasks are missing.")
            continue
        whole, told = ocrbench.total(counts[variant.name]), result.scores.get(row.key)
        if not ocrbench.complete(counts[variant.name]):
            notes.append(
                f"OCRBench: {variant.name} has {whole.of:,} of the 1,000 samples; sub-tasks show "
                "right answers out of the samples there are."
            )
        elif told is not None and abs(told * 1000 - whole.right) > 0.5:
            notes.append(
                f"OCRBench: {variant.name}'s samples add up to {whole.right:g}, its results file "
                f"says {told * 1000:g}: are they of one evaluation?"
            )
    return counts, notes


def _data(
    base: Variant | None, matches: Iterable[Match], read_pictures: bool
) -> dict[str, TaskData]:
    """Documents of every task that has pairs, loaded once."""
    tasks = dict.fromkeys(m.row.task for m in matches if m.pairs)
    return {task: load_task_data(base.tasks[task], read=read_pictures) for task in tasks}


def _paired(
    matches: Iterable[Match], data: Mapping[str, TaskData]
) -> tuple[list[PairedRow], list[str]]:
    found: list[PairedRow] = []
    without: dict[str, str] = {}
    known: dict[tuple[str, int], tuple[str, ...]] = {}
    for m in matches:
        if not m.pairs:
            continue
        found.append(PairedRow(m.variant, m.row, None, _test(m.pairs)))
        categories = _by_category(m, data[m.row.task], known)
        if len(categories) > 1:
            tests = ((name, _test(pairs)) for name, pairs in categories.items())
            found += [PairedRow(m.variant, m.row, name, test) for name, test in tests]
        elif not categories and _has_categories(m.row) and data[m.row.task].documents is None:
            without[m.row.name] = data[m.row.task].reason
    notes = [f"{name}: categories are missing: {reason}." for name, reason in without.items()]
    return found, notes


def _has_categories(row: Row) -> bool:
    """Whether the task's data name categories, as far as is known."""
    return row.task in CATEGORY_COLUMNS or row.group == OTHER


def _test(pairs: Sequence[Pair]) -> Paired:
    return paired([p.before for p in pairs], [p.after for p in pairs])


def _by_category(
    m: Match, data: TaskData, known: dict[tuple[str, int], tuple[str, ...]]
) -> dict[str, list[Pair]]:
    """Pairs by category; ``known`` keeps what was looked up for (row, document)."""
    categories: dict[str, list[Pair]] = {}
    for pair in m.pairs:
        key = (m.row.id, pair.baseline.doc_id)
        if key not in known:
            known[key] = sample_categories(pair.baseline, m.row)
            if not known[key] and (document := data.document(pair.baseline)) is not None:
                known[key] = document_categories(document, m.row.task)
        for name in known[key]:
            categories.setdefault(name, []).append(pair)
    return dict(sorted(categories.items()))
