"""`ldistill shards stats`: token lengths by source, a histogram, what a run reads in an epoch.

Lengths are those of whole documents, template and image tokens included, because that is what
counts against the limit; `text_only` leaves the image tokens out, as the paper's Table 5 does.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ldistill.data.index import ShardIndex
from ldistill.data.order import Order
from ldistill.tools.table import Table

# A line of the table; `over` is the share of documents above the limit.
SourceStats = namedtuple("SourceStats", "source category samples mean median p95 max over")


def token_lengths(index: ShardIndex, number: int, text_only: bool = False) -> np.ndarray:
    """Tokens of every document of a source, int64."""
    samples = index.source_samples(number)
    settings = index.meta[index.sources[number]]["image_settings"]
    per_tile = settings["tokens_per_tile"] if text_only else 0
    return samples["tokens"].astype(np.int64) - samples["tiles"].astype(np.int64) * per_tile


def source_stats(index: ShardIndex, limit: int, text_only: bool = False) -> list[SourceStats]:
    """One line per source and, with several sources, one for all of them."""
    lengths = [token_lengths(index, n, text_only) for n in range(len(index.sources))]
    lines = [*zip(index.sources, index.categories, lengths, strict=True)]
    lines += [("all", "", np.concatenate(lengths))] if len(lines) > 1 else []
    measured = []
    for source, category, found in lines:
        sizes = (found.mean(), *np.percentile(found, (50, 95)), found.max())
        measured.append(SourceStats(source, category, len(found), *sizes, (found > limit).mean()))
    return measured


def print_stats(index: ShardIndex, limit: int, text_only: bool) -> None:
    """Token lengths, a line a source."""
    lines = []
    for source, category, samples, *sizes, over in source_stats(index, limit, text_only):
        shown = (f"{size:.0f}" for size in sizes)
        lines.append((source, category, f"{samples:,}", *shown, f"{over:.1%}"))
    columns = ("Source", "Cat.", "Samples", "Mean", "Med.", "P95", "Max", f"%>{limit}")
    Table("tokens per document", columns, lines, left=(0, 1)).print()


def print_epoch(index: ShardIndex, limit: int, mix: str | None) -> None:
    """Documents and tokens of an epoch, a line a source, and how well they pack."""
    summary, lines = Order(index, limit=limit, mix=mix).summary(), []
    for source, line in summary.sources.items():
        counts = (f"{line[name]:,.0f}" for name in ("documents", "tokens"))
        lines.append((source, f"{line['repeats']:.4g}", *counts, f"{line['share']:.1%}"))
    columns = ("Source", "Repeats", "Documents", "Tokens", "% of tokens")
    Table("an epoch", columns, lines).print()
    print(f"at {limit} tokens: {summary}")


def plot_lengths(index: ShardIndex, path: Path, limit: int, text_only: bool = False) -> None:
    """Save a histogram of document lengths by category, with the limit marked, as PNG."""
    lengths = [token_lengths(index, n, text_only) for n in range(len(index.sources))]
    every = np.concatenate(lengths)
    bins = np.geomspace(max(1, every.min()), every.max() + 1, 60)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for category in sorted(set(index.categories)):
        pairs = zip(index.categories, lengths, strict=True)
        values = np.concatenate([v for c, v in pairs if c == category])
        axes.hist(values, bins=bins, alpha=0.6, label=f"{category} ({len(values):,} documents)")
    axes.axvline(limit, color="black", linestyle="--", label=f"limit {limit}")
    axes.set(xscale="log", xlabel="tokens per document", ylabel="documents")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
