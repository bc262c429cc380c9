"""The attention benchmark on a CPU: it runs, its gate holds, its files can be read."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "benchmarks"))

import attention
import attention_providers as providers
import common


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    """The ceilings of a busy test machine mean nothing."""
    monkeypatch.setattr(attention, "ceilings", lambda *_: common.Ceilings(1.0, 0.01))


SMALL = {
    "packed": attention.Shape(2, 64, (6, 2), 16, lengths=(10, 25), rows=(0, 1, 6)),
    "dense": attention.Shape(2, 40, (4, 2), 16),
}


@pytest.mark.parametrize("shape", SMALL)
def test_every_provider_passes_the_gate(shape):
    problem = SMALL[shape].problem("cpu", torch.float32)
    truth = attention.exact(problem)
    for name in attention.parse(["--device", "cpu"]).providers:
        count = 2 if name == "ours two segments" else 4
        error = attention.gate(providers.PROVIDERS[name](problem), problem, truth[:count])
        assert error < 1e-5, name


def test_a_wrong_provider_is_not_timed(monkeypatch):
    def halved(problem):
        attend = providers.ours(problem)
        return lambda q, k, v: attend(q, k, v) * 0.5

    monkeypatch.setitem(providers.PROVIDERS, "ours", halved)
    options = attention.parse(["--device", "cpu", "--providers", "ours", "--repeats", "2"])
    for record in attention.records("packed", SMALL["packed"], options):
        assert "not timed" in record["note"]
        assert "ms" not in record


def test_the_backward_of_a_compiled_provider_can_be_repeated(monkeypatch):
    def compiled(problem):
        return torch.compile(providers.plain(problem), backend="aot_eager_decomp_partition")

    monkeypatch.setitem(providers.PROVIDERS, "flex", compiled)
    options = attention.parse(["--device", "cpu", "--providers", "flex", "--repeats", "2"])
    found = list(attention.records("packed", SMALL["packed"], options))
    assert [record["pass"] for record in found] == ["forward", "backward"]


def test_work_counts_visible_pairs():
    problem = attention.Shape(1, 4, (2, 1), 8).problem("cpu", torch.float32)
    assert problem.pairs == 1 + 2 + 3 + 4
    assert attention.work(problem, False) == (4 * 10 * 2 * 8, 2 * 4 * 2 * 8 * 4 + 2 * 4 * 8 * 4)


def test_command_writes_table_csv_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "CPU_SHAPES", {"dense-small": SMALL["dense"]})
    table, picture = tmp_path / "a" / "out.csv", tmp_path / "out.png"
    arguments = ["--device", "cpu", "--repeats", "2", "--csv", str(table), "--plot", str(picture)]
    attention.main(arguments)
    attention.main([*arguments, "--providers", "ours", "--passes", "forward"])
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    names = ["ours", "ours two segments", "plain", "sdpa", "sdpa repeat", "gather+sdpa",
             "gather+sdpa repeat"]  # fmt: skip
    kinds = ["forward"] * len(names) + ["backward"] * len(names) + ["forward"]
    assert [row["pass"] for row in rows] == kinds
    assert [row["provider"] for row in rows] == [*names, *names, "ours"]
    assert all(float(row["x ours"]) == 1 for row in rows if row["provider"] == "ours")
    assert all(float(row["ms"]) > 0 for row in rows)
    assert {"device", "torch", "triton", "commit"} <= set(rows[0])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "two segments" in capsys.readouterr().out


def test_what_is_not_installed_is_said_and_left_out(capsys):
    registry = common.Registry()
    here, there = registry.add("here", package="torch"), registry.add("there", package="no_such")
    assert here(len) is there(len) is len
    assert dict(registry) == {"here": len}
    registry.print_missing()
    assert capsys.readouterr().out == "there: left out, no_such is not installed\n"


def test_dense_baselines_gather_nothing():
    problem = SMALL["dense"].problem("cpu", torch.float32)
    q = problem.case.q
    assert problem.unpack(q).data_ptr() == q.data_ptr()
    torch.testing.assert_close(problem.pack(problem.unpack(q)), q, rtol=0, atol=0)


def test_sweep_stops_in_time_and_orders_what_it_has(monkeypatch):
    monkeypatch.setattr(attention, "ours", providers.plain)
    options = attention.parse(["--device", "cpu", "--repeats", "2", "--passes", "forward"])
    now = attention.time.monotonic()
    assert not list(attention.sweep("dense", SMALL["dense"], options, ends=now - 1))
    found = list(attention.sweep("dense", SMALL["dense"], options, ends=now + 600))
    assert len(found) == 2 * 3 * 2 * 3
    assert found[0]["config"] == "64x64x4x3"
    assert all(record["ms"] > 0 for record in found)


def test_ldistill_bench_kernels_starts_it():
    from typer.testing import CliRunner

    from ldistill.bench_commands import app

    small = ["--device", "cpu", "--shapes", "dense-128", "--providers", "ours", "--repeats", "2"]
    assert CliRunner().invoke(app, ["kernels", "attention", *small]).exit_code == 0
    assert CliRunner().invoke(app, ["kernels", "attention", "--shapes", "none"]).exit_code == 2
    assert "attention or loss" in CliRunner().invoke(app, ["kernels", "fourier"]).output
