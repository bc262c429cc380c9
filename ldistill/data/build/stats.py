"""Token lengths by source: the columns of the paper's Table 5, and a histogram.

    rows = source_stats(ShardIndex.load("shards/"), limit=1024); plot_lengths(index, path, 1024)

Lengths are those of whole documents, template and image tokens included, because that is what
counts against the limit; `text_only` leaves the image tokens out, as the paper's table does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldistill.data.index import ShardIndex


@dataclass(frozen=True)
class SourceStats:
    """One line of the table; `over` is the share of documents above the limit."""

    source: str
    category: str
    samples: int
    mean: float
    median: float
    p95: float
    max: int
    over: float


def token_lengths(index: ShardIndex, number: int, text_only: bool = False) -> np.ndarray:
    """Tokens of every document of a source, int64."""
    samples = index.source_samples(number)
    lengths = samples["tokens"].astype(np.int64)
    if text_only:
        settings = index.meta[index.sources[number]]["image_settings"]
        lengths -= samples["tiles"].astype(np.int64) * settings["tokens_per_tile"]
    return lengths


def source_stats(index: ShardIndex, limit: int, text_only: bool = False) -> list[SourceStats]:
    """One line per source and, with several sources, one for all of them."""
    lengths = [token_lengths(index, n, text_only) for n in range(len(index.sources))]
    lines = [
        _line(source, category, values, limit)
        for source, category, values in zip(index.sources, index.categories, lengths, strict=True)
    ]
    if len(lines) > 1:
        lines.append(_line("all", "", np.concatenate(lengths), limit))
    return lines


def _line(source: str, category: str, lengths: np.ndarray, limit: int) -> SourceStats:
    return SourceStats(
        source=source,
        category=category,
        samples=len(lengths),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        p95=float(np.percentile(lengths, 95)),
        max=int(lengths.max()),
        over=float((lengths > limit).mean()),
    )


def plot_lengths(index: ShardIndex, path: Path, limit: int, text_only: bool = False) -> None:
    """Save a histogram of document lengths by category, with the limit marked, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    lengths = [token_lengths(index, n, text_only) for n in range(len(index.sources))]
    longest = max(int(values.max()) for values in lengths)
    bins = np.geomspace(max(1, min(int(v.min()) for v in lengths)), longest + 1, 60)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
