"""How `ldistill bench` tells what it measured: tables, rows of a CSV file, pictures.

A row is a dict from column to value, as it stands in the CSV file; None is a value that was not
measured, or that there is nothing to compare with.
"""

from __future__ import annotations

import csv
import platform
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ldistill.tools.table import Table
from ldistill.training.run_folder import environment

Row = dict[str, Any]
Columns = dict[str, tuple[str, str]]  # title → column of a row, how it is written
PARTS = ("data", "vision", "student", "teacher", "loss", "backward", "optimizer")
"""What a training step's time goes into; a row has each as `PART_ms`."""
_COLOURS = ("#9aa5b1", "#6c5b7b", "#355c7d", "#c06c84", "#f8b195", "#4f8a8b", "#d9b44a")

_STEP: Columns = {
    "mode": ("mode", ""),
    "ms": ("ms", ",.1f"),
    "min – max": ("spread", ""),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "MFU": ("mfu", ".1%"),
    "time / ce": ("time_vs_ce", ".3f"),
    "teacher rows": ("teacher_rows", ","),
    "peak MiB": ("peak_memory_mib", ",.0f"),
    "memory / ce": ("memory_vs_ce", ".3f"),
    "less teacher": ("memory_less_teacher_vs_ce", ".3f"),
}
SPEED: Columns = {
    "workers": ("workers", ""),
    "loader": ("loader", ""),
    "samples/s": ("samples_per_s", ",.1f"),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "MB/s": ("mb_per_s", ".2f"),
    "CPU ms/sample": ("cpu_ms", ".2f"),
    "speed / wds": ("speed_ratio", ",.2f"),
    "CPU / wds": ("cpu_ratio", ",.2f"),
    "own MiB": ("own_mib", ",.0f"),
    "RSS MiB": ("rss_mib", ",.0f"),
}
GROWTH: Columns = {
    "loader": ("loader", ""),
    "shards": ("shards", ","),
    "samples": ("samples", ","),
    "own MiB": ("own_mib", ",.1f"),
    "RSS MiB": ("rss_mib", ",.1f"),
}


def median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with the threads torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info, threads = Path("/proc/cpuinfo"), torch.get_num_threads()
    named = info.is_file() and re.search(r"^model name\s*: (.+)", info.read_text(), re.MULTILINE)
    model = named[1].strip() if named else platform.machine()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def step_tables(rows: list[Row]) -> list[Table]:
    """Modes side by side, and where each mode's step spends its time."""
    shown = [row | {"spread": f"{row['ms_min']:,.1f} – {row['ms_max']:,.1f}"} for row in rows]
    shares = []
    for row in rows:
        parts = [row[f"{part}_ms"] for part in PARTS]
        shares.append((row["mode"], *(f"{ms:,.1f} ({ms / sum(parts):.0%})" for ms in parts)))
    parts = Table("where the time goes, ms (share)", ("mode", *PARTS), shares)
    return [table("one training step", shown, _STEP), parts]


def table(title: str, rows: list[Row], columns: Columns, left: int = 0) -> Table:
    """Some columns of rows; the one numbered ``left`` holds names."""
    lines = []
    for row in rows:
        values = [(row[name], form) for name, form in columns.values()]
        line = ["–" if value is None else format(value, form) for value, form in values]
        if row.get("failure"):  # stands where the first number would
            line[line.index("–")] = row["failure"]
        lines.append(line)
    return Table(title, [*columns], lines, (left,))


def append_csv(path: Path, rows: list[Row], packages: tuple[str, ...]) -> None:
    """Add rows, all of the same columns, with the versions that they were measured with.

    Raises ValueError: the file has other columns.
    """
    versions = environment()
    made_with = {"python": versions["python"]} | {p: versions["packages"][p] for p in packages}
    made_with["commit"] = (versions["git"] or {}).get("commit")
    columns = [*rows[0], *made_with]
    header = path.read_text(encoding="utf-8").partition("\n")[0] if path.exists() else ""
    if header and header.split(",") != columns:
        raise ValueError(f"{path} has other columns than this measurement: choose a new file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if not header:
            writer.writeheader()
        for row in rows:
            short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(short | made_with)


def draw_profile(rows: list[Row], title: str, path: Path) -> None:
    """A bar per mode, cut into its parts, as a picture; the path's ending says the format."""
    figure = Figure(figsize=(9, 1.4 + 0.55 * len(rows)), layout="constrained")
    axes, names = figure.add_subplot(), [row["mode"] for row in rows]
    parts = np.array([[row[f"{part}_ms"] for row in rows] for part in PARTS])  # [parts, modes]
    totals, left = parts.sum(0), parts.cumsum(0) - parts
    for part, colour, widths, start in zip(PARTS, _COLOURS, parts, left):
        bars = axes.barh(names, widths, left=start, color=colour, label=part, height=0.62)
        wide = 0.05 * max(totals)  # enough for its share to be read
        shares = [f"{w / t:.0%}" if w > wide else "" for w, t in zip(widths, totals)]
        axes.bar_label(bars, shares, label_type="center", color="white", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one step")
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_growth(rows: list[Row], path: Path) -> None:
    """Own memory of a worker over samples, by loader, as PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["loader"] for row in rows):
        mine = [row for row in rows if row["loader"] == name and not row["failure"]]
        sizes, memory = ([row[column] for row in mine] for column in ("samples", "own_mib"))
        axes.plot(sizes, memory, marker="o", label=name)
    axes.set(xscale="log", xlabel="samples in the shards", ylabel="own memory of a worker, MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
