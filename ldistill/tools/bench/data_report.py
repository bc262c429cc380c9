"""How `ldistill bench data` tells what it measured: tables, rows of a CSV file, a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ldistill.tools.bench.data import DataResult
from ldistill.tools.bench.report import device_name
from ldistill.training.run_folder import environment


def speed_table(results: list[DataResult]) -> Table:
    """Loaders and numbers of workers; ratios are to webdataset with as many workers."""
    table = Table(title="loaders", title_justify="left")
    for column in ("workers", "loader", "samples/s", "tokens/s", "MB/s", "CPU ms/sample"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for column in ("speed / wds", "CPU / wds", "own MiB", "RSS MiB"):
        table.add_column(column, justify="right")
    for r in results:
        if r.failure:
            table.add_row(str(r.workers), r.loader, r.failure)
            continue
        rates = (f"{r.samples_per_s:,.1f}", f"{r.tokens_per_s:,.0f}", f"{r.mb_per_s:.2f}")
        numbers = (_number(r.speed_ratio, 2), _number(r.cpu_ratio, 2))
        memory = (_number(r.own_mib), _number(r.rss_mib))
        table.add_row(str(r.workers), r.loader, *rates, f"{r.cpu_ms:.2f}", *numbers, *memory)
    return table


def growth_table(results: list[DataResult]) -> Table:
    """Memory of a worker as the data set grows."""
    table = Table(title="memory of one worker as shards grow", title_justify="left")
    for column in ("loader", "shards", "samples", "own MiB", "RSS MiB"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for r in results:
        memory = (r.failure, "") if r.failure else (_number(r.own_mib, 1), _number(r.rss_mib, 1))
        table.add_row(r.loader, f"{r.shards:,}", f"{r.samples:,}", *memory)
    return table


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def csv_rows(results: list[DataResult], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Results with what they were measured on."""
    versions = environment()
    packages = ("ldistill", "torch", "webdataset", "datasets")
    fixed = {"device": device_name("cpu"), **settings, "python": versions["python"]}
    fixed |= {name: versions["packages"].get(name) for name in packages}
    fixed["commit"] = (versions["git"] or {}).get("commit")
    rows = []
    for result in results:
        measured = asdict(result).items()
        rows.append({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in measured} | fixed)
    return rows


def plot_growth(results: list[DataResult], path: Path) -> None:
    """Own memory of a worker over samples, by loader, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(r.loader for r in results):
        mine = [r for r in results if r.loader == name and r.own_mib is not None]
        axes.plot([r.samples for r in mine], [r.own_mib for r in mine], marker="o", label=name)
    axes.set(xscale="log", xlabel="samples in the shards", ylabel="own memory of a worker, MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
