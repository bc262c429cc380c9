"""What the commands on shards do, with everything that takes its time to import."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ldistill.common.documents import Processor
from ldistill.data.build import builder
from ldistill.data.build.build_types import (
    BuildOptions,
    InputOptions,
    SourceInput,
    SourceReport,
    SourcesFailed,
)
from ldistill.data.build.inputs import open_inputs
from ldistill.data.build.readers import LOW_RATING
from ldistill.data.build.slices import Slice, build_slice, join_slices
from ldistill.data.index import ShardIndex
from ldistill.data.order import Order
from ldistill.data.store import Reading
from ldistill.tools.shards.preview import preview
from ldistill.tools.shards.stats import plot_lengths, source_stats
from ldistill.tools.shards.verify import VerifyReport, verify_shards

MAX_LENGTH = 1024
"""Tokens of a row, in a run that does not say otherwise."""
__all__ = [
    "BuildOptions",
    "InputOptions",
    "Reading",
    "ShardIndex",
    "Slice",
    "SourcesFailed",
    "join_slices",
    "open_inputs",
    "plot_lengths",
    "preview",
]


def build(
    inputs: Sequence[SourceInput],
    out: Path,
    processor: Processor,
    options: BuildOptions,
    part: Slice | None,
) -> list[SourceReport]:
    """Build every source, or a slice of every one, under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        tasks = {e.source: bar.add_task(e.source, total=e.length, start=False) for e in inputs}

        def advance(entry: SourceInput, rows: int) -> None:
            bar.start_task(tasks[entry.source])
            bar.advance(tasks[entry.source], rows)

        if part is not None:
            return build_slice(inputs, out, processor, options, part, advance)
        return builder.build(inputs, out, processor, options, advance)


def verify(
    folder: str, sources: Sequence[str] | None, workers: int, reading: Reading
) -> VerifyReport:
    """Check every shard under a progress bar."""
    size = sum(shard.bytes for shard in ShardIndex.load(folder, sources, reading).shards)
    with Progress() as bar:
        task = bar.add_task("verify", total=size)
        return verify_shards(
            folder, sources, workers, lambda shard: bar.advance(task, shard.bytes), reading
        )


def print_epoch(index: ShardIndex, limit: int, mix: str | None) -> None:
    """Documents and tokens of an epoch, a line a source, and how well they pack."""
    summary = Order(index, limit=limit, mix=mix).summary()
    table = Table(title="an epoch")
    table.add_column("Source")
    for name in ("Repeats", "Documents", "Tokens", "% of tokens"):
        table.add_column(name, justify="right")
    for source, line in summary.sources.items():
        counts = [f"{line[name]:,.0f}" for name in ("documents", "tokens")]
        table.add_row(source, f"{line['repeats']:.4g}", *counts, f"{line['share']:.1%}")
    _print(table)
    print(f"at {limit} tokens: {summary}")


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


def print_reports(reports: Sequence[SourceReport], out: Path) -> None:
    """What was built and dropped, a line a source."""
    table = Table(title=f"shards in {out}")
    for name in ("source", "cat.", "samples", "shards", "MB", "dropped"):
        table.add_column(name, justify="left" if name in ("source", "cat.", "dropped") else "right")
    for report in reports:
        lost = [f"{count} {reason}" for reason, count in report.drops.items()]
        lost += [f"{count} turns: {reason}" for reason, count in report.turn_drops.items()]
        kept = f" ({report.kept_shards} kept)" if report.kept_shards else ""
        shards, size = f"{report.shards}{kept}", f"{report.bytes / 1e6:.1f}"
        row = (report.source, report.category, f"{report.samples:,}", shards, size)
        table.add_row(*row, "; ".join(lost) or "none")
    _print(table)
    for report in reports:
        for reason, first in report.first_drops.items():
            print(f"{report.source}: {reason}: first in record {first}")


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


def print_stats(index: ShardIndex, limit: int, text_only: bool) -> None:
    """Token lengths, a line a source."""
    table = Table(title="tokens per document")
    table.add_column("Source")
    table.add_column("Cat.")
    for name in ("Samples", "Mean", "Med.", "P95", "Max", f"%>{limit}"):
        table.add_column(name, justify="right")
    for line in source_stats(index, limit, text_only):
        shown = [f"{value:.0f}" for value in (line.mean, line.median, line.p95, line.max)]
        table.add_row(line.source, line.category, f"{line.samples:,}", *shown, f"{line.over:.1%}")
    _print(table)


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 120).print(table)
