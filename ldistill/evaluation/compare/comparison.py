"""Comparing variants: scores side by side, samples won and lost, OCRBench's parts.

What cannot be compared is said in `Comparison.notes`; a score that is not there is a footnote of
the table, never a hole.

Samples of two runs belong together when document number, prompt and expected answer agree:
lmms-eval's own ``doc_hash`` differs between runs wherever a document holds a picture. A sample is
*won* where the variant scores higher than the baseline, *lost* where it scores lower. For
right/wrong scores the test on won and lost is McNemar's exact test; for graded scores (ANLS) the
same arithmetic is the sign test.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from ldistill.common.errors import refuse
from ldistill.evaluation.compare import ocrbench
from ldistill.evaluation.compare.ocrbench import row_score
from ldistill.evaluation.compare.results import Sample, TaskResult, Variant, other_rows
from ldistill.evaluation.compare.tables import ScoreTable, score_table
from ldistill.evaluation.compare.task_data import TaskData, load_task_data
from ldistill.evaluation.suites import OTHER, ROWS, Row, rows_of_tasks, suite

BASELINE = "nanovlm-full"
ORIGINALS = ("nanovlm", "original", "adapted", "teacher")  # names taken for it without --original
_USUAL_OPTIONS = {"dtype": "auto", "tiling": "False"}  # of the lmms-eval model, change nothing
CATEGORY_COLUMNS = {
    "scienceqa": "subject",
    "docvqa_val": "question_types",
    "infovqa_val": "answer_type",
}
"""Task → column of its data that names the category, where the samples themselves don't."""
USUAL_COLUMNS = ("category", "subject", "question_type", "topic")  # tried for every other task
DRAWN_AT_ONCE = 1 << 20  # counts in memory: graded scores have as many distinct values as samples


def sample_score(sample: Sample, row: Row) -> float | None:
    """Score of one sample under a row's metric; None where the logs hold none."""
    value = sample.metrics.get(row.metric)
    if isinstance(value, Mapping) and "parsed_pred" in value:
        # MMMU judges when it aggregates: choices are compared here, open answers by its own code.
        gold, parsed = value["answer"], value["parsed_pred"]
        if value.get("question_type") == "multiple-choice":
            gold = gold if isinstance(gold, list) else [gold]
            return float(any(one in gold for one in parsed))
        try:
            from lmms_eval.tasks.mmmu.utils import eval_open
        except ImportError:
            return None
        return float(any(eval_open(gold, one) for one in parsed))
    if isinstance(value, Mapping):
        value = value.get("score", value.get(row.metric))
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def sample_categories(sample: Sample, row: Row) -> tuple[str, ...]:
    """Categories that the logged score itself names (OCRBench, MME, MMStar, MMMU)."""
    value = sample.metrics.get(row.metric)
    if not isinstance(value, Mapping):
        return ()
    if row.task == "mmstar":
        return tuple(k for k in sample.metrics if k != row.metric)[:1]
    named = (value.get(key) for key in ("subdomain", "category", "question_type"))
    return next(((name,) for name in named if isinstance(name, str)), ())


def document_categories(document: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """Categories by the task's data; a document may have several (DocVQA)."""
    columns = (CATEGORY_COLUMNS[task],) if task in CATEGORY_COLUMNS else USUAL_COLUMNS
    for value in map(document.get, columns):
        values = value if isinstance(value, list) else [value]
        if any(values) and all(isinstance(v, str) for v in values):
            return tuple(values)
    return ()


class Pair(NamedTuple):
    """One document as baseline and variant answered it, with their scores."""

    baseline: Sample
    before: float
    variant: Sample
    after: float


class Match(NamedTuple):
    """Pairs in document order, and a clause for everything that could not be paired."""

    row: Row
    variant: str
    pairs: list[Pair]
    gaps: list[str]


def match(row: Row, baseline: Variant, variant: Variant) -> Match:
    """Pair the samples of a row's task; no pairs and a gap where that cannot be done."""
    gaps: list[str] = []
    first, second = (_scored(v, row, gaps) for v in (baseline, variant))
    if not (first and second):
        return Match(row, variant.name, [], gaps)
    both = sorted(first.keys() & second.keys())
    for own, one, other in ((first, baseline, variant), (second, variant, baseline)):
        if only := len(own) - len(both):
            gaps.append(f"{only:,} samples of {one.name} are not among {other.name}'s")
    pairs = [Pair(*first[doc], *second[doc]) for doc in both]
    asked = attrgetter("question", "target")
    pairs = [p for p in pairs if asked(p.baseline) == asked(p.variant)]
    if different := len(both) - len(pairs):
        gaps.append(
            f"{different:,} samples have another prompt or expected answer in {variant.name} than "
            f"in {baseline.name} (another version of the data, or another prompt format?)"
        )
    return Match(row, variant.name, pairs, gaps)


def _scored(variant: Variant, row: Row, gaps: list[str]) -> dict[int, tuple[Sample, float]]:
    """Document → sample and score; what is lacking goes to ``gaps``."""
    name, result = variant.name, variant.tasks.get(row.task)
    if result is None:
        gaps.append(f"{name} has no results")
        return {}
    if result.unreadable:
        gaps.append(f"{name}'s samples file has lines that are no samples (cut off?)")
    samples = result.samples(row.filter)
    if not samples:
        what = "an empty" if result.samples_path.is_file() else "no"
        gaps.append(f"{name} has {what} samples file (evaluate with samples logged)")
        return {}
    scores = {i: sample_score(s, row) for i, s in samples.items() if row.metric in s.metrics}
    unscored = sum(score is None for score in scores.values())
    if unscored == len(scores):
        gaps.append(f"{name}'s samples carry no score of their own, only the whole has one")
    elif unscored:
        gaps.append(f"{unscored:,} of {name}'s samples carry no score of their own")
    return {i: (samples[i], score) for i, score in scores.items() if score is not None}


def sentences(matches: Iterable[Match]) -> list[str]:
    """The gaps of all matches, each named once, with the rows it holds for."""
    where: dict[tuple[str, bool], dict[str, None]] = defaultdict(dict)
    for m in matches:
        rest = f" (the other {len(m.pairs):,} are paired)" if m.pairs else ""
        for gap in m.gaps:
            where[gap, bool(m.pairs)][m.row.name + rest] = None
    ends = {True: ".", False: "; not compared sample by sample, scores are."}
    return [f"{gap}: {', '.join(rows)}{ends[some]}" for (gap, some), rows in where.items()]


@dataclass(frozen=True)
class Paired:
    """How a variant compares with the baseline on the samples both answered."""

    samples: int
    baseline: float  # mean score
    score: float  # of the variant
    difference: float
    low: float  # end of the 95% interval of `difference`
    high: float
    won: int
    lost: int
    p: float  # two-sided, of won against lost


def paired(baseline: Sequence[float], variant: Sequence[float]) -> Paired:
    """Compare two score vectors [samples], at least one, whose entries are of the same samples."""
    first, second = np.asarray(baseline, float), np.asarray(variant, float)
    gained = second - first
    won, lost = int((gained > 0).sum()), int((gained < 0).sum())
    before, after = float(first.mean()), float(second.mean())
    means, interval = (before, after, after - before), bootstrap_interval(gained)
    return Paired(len(first), *means, *interval, won, lost, mcnemar(won, lost))


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p value: how odd ``won`` against ``lost`` is if both were equally likely."""
    n, term, tail = won + lost, 1, 0
    for k in range(min(won, lost) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << n))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` [samples] under resampling of samples."""
    # Drawing samples with replacement is drawing counts of the distinct values: far fewer draws.
    distinct, counts = np.unique(np.round(np.asarray(values, float), 12), return_counts=True)
    n = counts.sum()
    rng, most = np.random.default_rng(0), max(1, DRAWN_AT_ONCE // len(distinct))
    sizes = [min(most, resamples - done) for done in range(0, resamples, most)]
    means = [rng.multinomial(n, counts / n, size=size) @ distinct / n for size in sizes]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """All that was found, ready to be written."""

    variants: Sequence[Variant]
    table: ScoreTable
    matches: list[Match]  # that have pairs
    paired: list[tuple[str, Row, str | None, Paired]]  # the third: a category, or None for all
    ocrbench: Mapping[str, Mapping[str, ocrbench.Count]]  # variant → sub-task → count
    data: Mapping[str, TaskData]  # task → its documents, of the tasks that have pairs
    notes: list[str]


def choose_rows(
    variants: Sequence[Variant], name: str | None = None, tasks: Iterable[str] | None = None
) -> tuple[Row, ...]:
    """Rows of the table: all of the suite of that name, or only those of some tasks.

    By default every row of each group that somebody has results for, and a row per task that is
    in no suite. Raises ValueError: unknown suite or task, or nothing left.
    """
    found: dict[str, TaskResult] = {}
    for variant in variants:
        found |= {**variant.tasks, **found}
    if name is not None:
        chosen = suite(name).rows
    else:
        groups = {row.group for row in rows_of_tasks(found)}
        chosen = (*(row for row in ROWS if row.group in groups), *other_rows(found))
    wanted = {row.task for row in chosen} if tasks is None else set(tasks)
    unknown = wanted - {row.task for row in chosen}
    chosen = tuple(row for row in chosen if row.task in wanted)
    if unknown or not any(row.task in found for row in chosen):
        what = f"any task of suite {name}" if name else "any of these tasks"
        what = f"task {', '.join(sorted(unknown))}" if unknown else what
        raise ValueError(f"no results for {what}; there are results for: {', '.join(found)}.")
    return chosen


def choose_roles(
    names: Sequence[str], baseline: str | None, original: str | None
) -> tuple[str | None, str | None]:
    """Baseline and original: as asked, else by their usual names; ValueError: absent, or one."""
    there = ", ".join(names)
    cases = {
        f"{role} {name!r} is none of the variants; there are: {there}.": name not in (None, *names)
        for role, name in (("baseline", baseline), ("original", original))
    }
    refuse(cases)
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
        notes += sentences(matches)
        if original is None:
            usual = f"give --original, or call one {' or '.join(ORIGINALS)}"
            notes.append(f"No original: {usual}, for shares recovered.")
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
        names = dict.fromkeys(n for of in options.values() for n in of if n != "pretrained")
        if differ := [n for n in names if len({of.get(n) for of in options.values()}) > 1]:
            each = (
                f"{v} {', '.join(f'{n}={of[n]}' for n in differ if n in of) or 'without'}"
                for v, of in options.items()
            )
            where["; ".join(each)].append(task)
    told = "Evaluated with different model options"
    return [f"{told}: {each} ({', '.join(tasks)})." for each, tasks in where.items()]


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
                known[key] = sample_categories(sample, m.row) or (
                    document_categories(documents.document(sample) or {}, task)
                )
            for name in known[key]:
                categories[name].append(pair)
        parts: list[tuple[str | None, Sequence[Pair]]] = [(None, m.pairs)]
        parts += sorted(categories.items()) if len(categories) > 1 else []
        for name, pairs in parts:
            test = paired([p.before for p in pairs], [p.after for p in pairs])
            found.append((m.variant, m.row, name, test))
        expected = task in CATEGORY_COLUMNS or m.row.group == OTHER
        if expected and not categories and documents.reason:
            without[f"{m.row.name}: categories are missing: {documents.reason}."] = None
    return found, list(without)
