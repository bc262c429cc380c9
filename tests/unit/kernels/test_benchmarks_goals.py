"""Which goals a benchmark reached: judged by the worst measurement, and said in one line."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "kernels" / "benchmarks"))

import goals


def attention(shape, provider, ms, kind="forward", **more):
    return {"shape": shape, "seq": 4096, "head dim": 64, "provider": provider, "pass": kind,
            "ms": ms} | more  # fmt: skip


def loss(provider, ms, hidden=960, targets=8192, **more):
    return {"hidden": hidden, "vocab": 49152, "targets": targets, "kind": "distill",
            "provider": provider, "ms": ms} | more  # fmt: skip


RECORDS = [
    attention("packed-b32", "ours", 1.0, **{"of copy": 0.5, "of matmul": 0.1}),
    attention("packed-b32", "gather+sdpa", 5.0),
    attention("packed-b32", "varlen", 3.0),
    attention("packed-b8", "ours", 1.0, **{"of copy": 0.2, "of matmul": 0.1}),
    attention("packed-b8", "flex", 1.5),
    attention("dense-4k", "ours", 2.0, **{"of copy": 0.1, "of matmul": 0.45}),
    attention("dense-4k", "ours two segments", 2.08),
    attention("dense-4k", "sdpa repeat", 3.0),
    {"shape": "dense-8k", "seq": 8192, "head dim": 64, "provider": "ours", "note": "failed"},
    loss("ours", 10.0, **{"x floor": 2.0, "peak MiB": 600.0}),
    loss("plain", 30.0, **{"peak MiB": 7000.0}),
    loss("ours", 11.0, hidden=2048, **{"x floor": 1.4, "peak MiB": 900.0}),
]


def test_the_worst_measurement_counts_and_the_line_names_what_is_missing(tmp_path, capsys):
    table = tmp_path / "all.csv"
    with table.open("w", newline="") as file:
        columns = dict.fromkeys(name for record in RECORDS for name in record)
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(RECORDS)
    lines, said = goals.judge(goals.read(str(table)))
    found = {line["goal"]: line for line in lines}
    sparse = found["packed, forward, against the fastest peer"]
    assert (sparse["measured"], sparse["reached"], sparse["at"]) == (1.5, "NO", "packed-b8")
    memory = found["bound by memory, share of the copy"]
    assert (memory["measured"], memory["at"]) == (0.2, "packed-b8 forward")
    reached = {goal for goal, line in found.items() if line.get("reached") == "yes"}
    assert reached == {
        "dense, head dim 64, forward, against SDPA with its copies",
        "dense, >= 4k, head dim 64, forward, share of the matrix product",
        "two segments against one, forward, dense",
        "loss, hidden 960, multiples of the four products",
        "loss, times plain PyTorch's speed",
        "loss, share of plain PyTorch's memory",
        "loss, MiB beyond gradients",
    }
    assert said.startswith(f"7 of {len(goals.GOALS)} goals reached; not reached: packed, forward")
    assert "loss, hidden >= 2048, multiples of the four products (1.4, goal <= 1.35)" in said
    assert "not measured: packed, backward, against the fastest peer" in said
    goals.main([str(table), str(tmp_path / "absent.csv")])
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_extra_memory_leaves_the_gradients_out():
    record = loss("ours", 1.0, **{"peak MiB": 600.0})
    gradients = (4 * 960 * 49152 + 2 * 960 * 8192) / 2**20
    assert goals.extra_mib({"ours": record}) == pytest.approx(600 - gradients)
