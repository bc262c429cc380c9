"""What `ldistill shards build` and `merge` do, and how they tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldistill.common.samples import Processor
from ldistill.data.build import builder
from ldistill.data.build.build_types import BuildOptions, SourceInput, SourceReport, SourcesFailed
from ldistill.data.build.readers import LOW_RATING
from ldistill.data.build.slices import Slice, build_slice
from ldistill.data.index import ShardIndex
from ldistill.tools.table import Table

MAX_LENGTH = 1024
"""Tokens of a row, in a run that does not say otherwise."""


def build(
    inputs: Sequence[SourceInput],
    out: Path,
    processor: Processor,
    options: BuildOptions,
    part: Slice | None,
) -> list[SourceReport]:
    """Build every source, or a slice of every one, under a progress bar; print what came of it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeRemainingColumn()) as bar:
            tasks = {e.source: bar.add_task(e.source, total=e.length, start=False) for e in inputs}

            def advance(entry: SourceInput, rows: int) -> None:
                bar.start_task(tasks[entry.source])
                bar.advance(tasks[entry.source], rows)

            if part is not None:
                reports = build_slice(inputs, out, processor, options, part, advance)
            else:
                reports = builder.build(inputs, out, processor, options, advance)
    except SourcesFailed as failed:
        print_reports(failed.reports, out)
        raise
    print_reports(reports, out)
    return reports


def print_reports(reports: Sequence[SourceReport], out: Path) -> None:
    """What was built and dropped, a line a source."""
    lines = []
    for report in reports:
        lost = [f"{count} {reason}" for reason, count in report.drops.items()]
        lost += [f"{count} turns: {reason}" for reason, count in report.turn_drops.items()]
        kept = f" ({report.kept_shards} kept)" if report.kept_shards else ""
        counts = (f"{report.samples:,}", f"{report.shards}{kept}", f"{report.bytes / 1e6:.1f}")
        lines.append((report.source, report.category, *counts, "; ".join(lost) or "none"))
    columns = ("source", "cat.", "samples", "shards", "MB", "dropped")
    Table(f"shards in {out}", columns, lines, left=(0, 1, 5)).print()
    for report in reports:
        for reason, first in report.first_drops.items():
            print(f"{report.source}: {reason}: first in record {first}")


def rated_out(reports: Sequence[SourceReport], minimum: Mapping[str, int]) -> str:
    """A sentence on what --min-rating left out."""
    asked = " ".join(f"{name}={least}" for name, least in minimum.items())
    turns = sum(report.turn_drops.get(LOW_RATING, 0) for report in reports)
    samples = {r.source: r.drops[LOW_RATING] for r in reports if r.drops.get(LOW_RATING)}
    if not turns and not samples:
        return f"--min-rating {asked} left nothing out."
    where = f" ({', '.join(f'{name} {count:,}' for name, count in samples.items())})"
    return (
        f"--min-rating {asked} left out turns rated lower: {turns:,}. Samples without another "
        f"turn, dropped with them: {sum(samples.values()):,}{where if samples else ''}."
    )


def over_long(out: Path, reports: Sequence[SourceReport]) -> str:
    """A sentence on documents that training will not take as they are; empty without any."""
    index = ShardIndex.load(out, [report.source for report in reports])
    count, longest = int((index.lengths > MAX_LENGTH).sum()), int(index.lengths.argmax())
    if not count:
        return ""
    return (
        f"{count:,} documents are longer than {MAX_LENGTH:,} tokens, the longest "
        f"{index.locate(longest)[2]} with {index.lengths[longest]:,}. Training drops them, "
        "counted; --max_length of a run raises the limit, --on_long truncate cuts them there."
    )
