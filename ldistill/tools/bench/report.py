"""How `ldistill bench step` tells what it measured: a table for the eye, rows of a CSV file."""

from __future__ import annotations

import csv
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ldistill.tools.bench.options import StepOptions
from ldistill.tools.bench.profile import PARTS
from ldistill.training.run_folder import environment


@dataclass(frozen=True)
class StepResult:
    """One mode's cost; memory in MiB, None where it was not measured or nothing to compare with.

    ``compile_gain``: time of the same mode with eager blocks over this one's. ``parts``:
    milliseconds of one instrumented step by what they went into.
    """

    mode: str
    ms: float
    ms_min: float
    ms_max: float
    tokens_per_s: float
    mfu: float
    time_vs_ce: float | None
    peak_memory_mib: float | None
    memory_vs_ce: float | None
    memory_less_teacher_vs_ce: float | None
    teacher_mib: float
    supervised_rows: int
    teacher_rows: int
    compile_gain: float | None
    parts: dict[str, float]
    options: StepOptions


def describe(options: StepOptions) -> str:
    """One line: what is measured on what."""
    return (
        f"{options.pair}: {options.rows} rows of {options.length} tokens, {options.dtype} on "
        f"{device_name(options.device)}, attention {options.attention}, mix {options.mix}, "
        f"{options.steps} steps after {options.warmup}"
    )


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with the threads torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def step_table(results: list[StepResult]) -> Table:
    """Modes side by side."""
    table = Table(title="one training step", title_justify="left")
    for column in ("mode", "ms", "min – max", "tokens/s", "MFU", "time / ce", "teacher rows"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for column in ("peak MiB", "memory / ce", "less teacher"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r.mode,
            f"{r.ms:,.1f}",
            f"{r.ms_min:,.1f} – {r.ms_max:,.1f}",
            f"{r.tokens_per_s:,.0f}",
            f"{r.mfu:.1%}",
            _ratio(r.time_vs_ce),
            f"{r.teacher_rows:,}",
            "–" if r.peak_memory_mib is None else f"{r.peak_memory_mib:,.0f}",
            _ratio(r.memory_vs_ce),
            _ratio(r.memory_less_teacher_vs_ce),
        )
    return table


def parts_table(results: list[StepResult]) -> Table:
    """Where each mode's step spends its time."""
    table = Table(title="where the time goes, ms (share)", title_justify="left")
    table.add_column("mode")
    for part in PARTS:
        table.add_column(part, justify="right")
    for r in results:
        total = sum(r.parts.values())
        table.add_row(r.mode, *(f"{r.parts[p]:,.1f} ({r.parts[p] / total:.0%})" for p in PARTS))
    return table


def compile_lines(results: list[StepResult]) -> list[str]:
    """What compiling the decoder blocks brought, a line per mode."""
    return [
        f"{r.mode}: {r.compile_gain:.2f} × as fast as with eager blocks"
        for r in results
        if r.compile_gain is not None
    ]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def csv_row(result: StepResult, versions: dict[str, Any]) -> dict[str, Any]:
    """A result with what it was measured on.

    Args:
        result: of one mode.
        versions: of ``run_folder.environment``.
    """
    options = result.options
    measured = {
        name: getattr(result, name)
        for name in StepResult.__dataclass_fields__
        if name not in ("options", "parts")
    }
    measured |= {f"{part}_ms": result.parts[part] for part in PARTS}
    row = {
        "pair": options.pair,
        "mode": measured.pop("mode"),
        "device": device_name(options.device),
        "dtype": options.dtype,
        "rows": options.rows,
        "length": options.length,
        "mix": options.mix,
        "kernels": options.kernels,
        "attention": options.attention,
        "checkpointing": options.checkpointing,
        "steps": options.steps,
    }
    row |= {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in measured.items()}
    packages = ("ldistill", "torch", "transformers", "triton")
    row |= {"python": versions["python"]} | {k: versions["packages"][k] for k in packages}
    return row | {"commit": (versions["git"] or {}).get("commit")}


def append_csv(path: Path, results: list[StepResult]) -> None:
    """Add a row per mode; a new file gets a header. Raises as ``append_rows`` does."""
    versions = environment()
    append_rows(path, [csv_row(result, versions) for result in results])


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows, all of the same columns; a new file gets a header.

    Raises:
        ValueError: the file has other columns.
    """
    columns = list(rows[0])
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(f"{path} has other columns than this measurement: choose a new file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
