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
    assert len(rows) == 2 * 6 + 1
    assert all(float(row["ms"]) > 0 for row in rows)
    assert {"device", "torch", "triton", "commit"} <= set(rows[0])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "two segments" in capsys.readouterr().out
