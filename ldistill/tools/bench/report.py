"""How `ldistill bench` tells what it measured: tables, rows of a CSV file, pictures."""

from __future__ import annotations

import csv
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ldistill.tools.bench.data import DataResult
from ldistill.tools.bench.profile import PARTS
from ldistill.tools.bench.step import StepOptions, StepResult
from ldistill.tools.table import Table
from ldistill.training.run_folder import environment

_COLOURS = ("#9aa5b1", "#6c5b7b", "#355c7d", "#c06c84", "#f8b195", "#4f8a8b", "#d9b44a")


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with the threads torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info, threads = Path("/proc/cpuinfo"), torch.get_num_threads()
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = next(iter(models), platform.machine())
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def describe(options: StepOptions) -> str:
    """One line: what is measured on what."""
    return (
        f"{options.pair}: {options.rows} rows of {options.length} tokens, {options.dtype} on "
        f"{device_name(options.device)}, attention {options.attention}, mix {options.mix}, "
        f"{options.steps} steps after {options.warmup}"
    )


# ---- tables: column, field of a result, how it is written ----

_STEP = {
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
_SPEED = {
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
_GROWTH = {
    "loader": ("loader", ""),
    "shards": ("shards", ","),
    "samples": ("samples", ","),
    "own MiB": ("own_mib", ",.1f"),
    "RSS MiB": ("rss_mib", ",.1f"),
}


def _row(result: Any, columns: dict[str, tuple[str, str]]) -> list[str]:
    values = [(getattr(result, name), form) for name, form in columns.values()]
    return ["–" if value is None else format(value, form) for value, form in values]


def step_table(results: list[StepResult]) -> Table:
    """Modes side by side."""
    return Table("one training step", [*_STEP], [_row(result, _STEP) for result in results])


def parts_table(results: list[StepResult]) -> Table:
    """Where each mode's step spends its time."""
    rows = []
    for r in results:
        total = sum(r.parts.values())
        rows.append((r.mode, *(f"{r.parts[p]:,.1f} ({r.parts[p] / total:.0%})" for p in PARTS)))
    return Table("where the time goes, ms (share)", ("mode", *PARTS), rows)


def speed_table(results: list[DataResult]) -> Table:
    """Loaders and numbers of workers; ratios are to webdataset with as many workers."""
    rows = [[*_row(r, _SPEED)[:2], r.failure] if r.failure else _row(r, _SPEED) for r in results]
    return Table("loaders", [*_SPEED], rows, left=(1,))


def growth_table(results: list[DataResult]) -> Table:
    """Memory of a worker as the data set grows."""
    rows = [[*_row(r, _GROWTH)[:3], r.failure] if r.failure else _row(r, _GROWTH) for r in results]
    return Table("memory of one worker as shards grow", [*_GROWTH], rows)


# ---- CSV ----


def step_rows(results: list[StepResult]) -> list[dict[str, Any]]:
    """A row per mode."""
    settings = ("dtype", "rows", "length", "mix", "kernels", "attention", "checkpointing", "steps")
    rows = []
    for result in results:
        options, measured = result.options, dict(vars(result))
        parts = {f"{part}_ms": result.parts[part] for part in PARTS}
        del measured["options"], measured["parts"]
        device = device_name(options.device)
        row = {"pair": options.pair, "mode": measured.pop("mode"), "device": device}
        rows.append(row | {name: getattr(options, name) for name in settings} | measured | parts)
    return rows


def data_rows(results: list[DataResult], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per loader, number of workers and size of the shards."""
    fixed = {"device": device_name("cpu"), **settings}
    return [asdict(result) | fixed for result in results]


def append_csv(path: Path, rows: list[dict[str, Any]], packages: tuple[str, ...]) -> None:
    """Add rows, all of the same columns, with the versions that they were measured with.

    Raises:
        ValueError: the file has other columns.
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


# ---- pictures ----


def draw_profile(results: list[StepResult], title: str, path: Path) -> None:
    """A bar per mode, cut into its parts, as a picture; the path's ending says the format."""
    figure = Figure(figsize=(9, 1.4 + 0.55 * len(results)), layout="constrained")
    axes, names = figure.add_subplot(), [result.mode for result in results]
    totals = [sum(result.parts.values()) for result in results]
    left = [0.0] * len(results)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        widths = [result.parts[part] for result in results]
        bars = axes.barh(names, widths, left=left, color=colour, label=part, height=0.62)
        wide = 0.05 * max(totals)  # enough for its share to be read
        shares = [f"{w / t:.0%}" if w > wide else "" for w, t in zip(widths, totals)]
        axes.bar_label(bars, shares, label_type="center", color="white", fontsize=8)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one step")
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_growth(results: list[DataResult], path: Path) -> None:
    """Own memory of a worker over samples, by loader, as PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(r.loader for r in results):
        mine = [r for r in results if r.loader == name and r.own_mib is not None]
        axes.plot([r.samples for r in mine], [r.own_mib for r in mine], marker="o", label=name)
    axes.set(xscale="log", xlabel="samples in the shards", ylabel="own memory of a worker, MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
