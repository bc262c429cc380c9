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
from ldistill.evaluation.compare.ocrbench import row_score
from ldistill.evaluation.compare.results import TaskResult, Variant, other_row
from ldistill.evaluation.compare.samples import (
    CATEGORY_COLUMNS,
    Match,
    Pair,
    Paired,
    document_categories,
    match,
    paired,
    sample_categories,
    sentences,
)
from ldistill.evaluation.compare.tables import ScoreTable, score_table
from ldistill.evaluation.compare.task_data import TaskData, load_task_data
from ldistill.evaluation.suites import OTHER, ROWS, Row, rows, rows_of_tasks

BASELINE = "nanovlm-full"
ORIGINALS = ("nanovlm", "original", "adapted", "teacher")
"""Names taken for the original where --original is not given."""
_USUAL_OPTIONS = {"dtype": "auto", "tiling": "False"}
"""Options of the lmms-eval model that change nothing."""


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
        own = {task: result for v in reversed(variants) for task, result in v.tasks.items()}
        others = [own[task] for task in found if task not in {row.task for row in listed}]
        chosen = (*listed, *map(other_row, others))
    wanted = {row.task for row in chosen} if tasks is None else set(tasks)
    unknown = wanted - {row.task for row in chosen}
    chosen = tuple(row for row in chosen if row.task in wanted)
    if unknown or not any(row.task in found for row in chosen):
        what = f"task {', '.join(sorted(unknown))}" if unknown else "any of these tasks"
        if suite and not unknown:
            what = f"any task of suite {suite}"
        there = ", ".join(found) or "nothing"
        raise ValueError(f"no results for {what}; there are results for: {there}.")
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
            raise ValueError(
                f"{role} {name!r} is none of the variants; there are: {', '.join(names)}. Without "
                f"--{role} the scores can still be put side by side."
            )
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
        baseline: of `choose_roles`: the variant that others are compared with.
        original: of `choose_roles`: the variant before training.
        read_pictures: let tesseract read pictures, where failure modes are looked for.
        missing: sentences on what was asked for and has no results.
    """
    counts, of_ocrbench = _ocrbench(variants, chosen)
    notes = [*missing, *(note for v in variants for note in v.notes), *of_ocrbench]
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
        if original is None:
            notes.append(
                f"No original: no variant is called {', '.join(ORIGINALS[:-1])} or "
                f"{ORIGINALS[-1]} and --original was not given, so there are no shares recovered."
            )
    with_pairs = dict.fromkeys(m.row.task for m in matches if m.pairs)
    data = {task: load_task_data(base.tasks[task], read=read_pictures) for task in with_pairs}
    tests, without = _paired(matches, data)
    return Comparison(
        tuple(variants),
        _table(variants, chosen, baseline, original),
        tuple(matches),
        tuple(tests),
        counts,
        data,
        (*notes, *without),
    )


def _table(
    variants: Sequence[Variant],
    chosen: Sequence[Row],
    baseline: str | None,
    original: str | None,
) -> ScoreTable:
    scores: dict[str, dict[str, float | None]] = {v.name: {} for v in variants}
    notes: dict[tuple[str, str], str] = {}
    for variant in variants:
        for row in (row for row in chosen if row.task in variant.tasks):
            result = variant.tasks[row.task]
            scores[variant.name][row.id] = row_score(result, row)
            if text := "; ".join(_remarks(result, row)):
                notes[variant.name, row.id] = f"{text[0].upper()}{text[1:]}."
    return score_table(scores, chosen, baseline=baseline, original=original, notes=notes)


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
    if ocrbench.limited_score(result) is not None:
        said.append("recomputed from the samples: lmms-eval divides by 1000 regardless")
    return said


def unlike_options(variants: Sequence[Variant], rows: Iterable[Row]) -> list[str]:
    """A sentence for each way in which the options of variants differ, with its tasks."""
    where: dict[str, list[str]] = {}
    for task in dict.fromkeys(row.task for row in rows):
        options = {v.name: _options(v.tasks[task]) for v in variants if task in v.tasks}
        names = dict.fromkeys(name for own in options.values() for name in own)
        differ = [n for n in names if len({own.get(n) for own in options.values()}) > 1]
        if differ:
            each = "; ".join(
                f"{variant} {', '.join(f'{n}={own[n]}' for n in differ if n in own) or 'without'}"
                for variant, own in options.items()
            )
            where.setdefault(each, []).append(task)
    return [
        f"Evaluated with different model options: {each} ({', '.join(tasks)})."
        for each, tasks in where.items()
    ]


def _options(result: TaskResult) -> dict[str, str]:
    usual = _USUAL_OPTIONS | {"pretrained": result.model_args.get("pretrained")}
    return {name: v for name, v in result.model_args.items() if usual.get(name) != v}


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
        elif not categories and (m.row.task in CATEGORY_COLUMNS or m.row.group == OTHER):
            without[m.row.name] = data[m.row.task].reason
    missing = ((name, reason) for name, reason in without.items() if reason)
    return found, [f"{name}: categories are missing: {reason}." for name, reason in missing]


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
