"""The benchmark of distill_loss: providers compute the same loss, and wrong ones are caught."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "kernels" / "benchmarks"
SMALL = ["--device", "cpu", "--hidden", "16", "--vocab", "300", "--targets", "24", "--repeats", "2"]


@pytest.fixture
def loss(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, started from its own folder as on the command line."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "loss", raising=False)
    import loss

    yield loss
    sys.modules.pop("loss", None)
    sys.modules.pop("common", None)


def test_writes_table_csv_and_picture(loss, tmp_path, capsys):
    table, picture = tmp_path / "loss.csv", tmp_path / "loss.png"
    assert loss.main([*SMALL, "--csv", str(table), "--plot", str(picture)]) == 0
    with table.open() as file:
        lines = list(csv.DictReader(file))
    names = [line["provider"] for line in lines]
    assert names[:4] == ["floor", "ours", "plain", "chunked-autograd"]
    assert float(lines[0]["x floor"]) == 1.0
    for line in lines:
        assert float(line["ms"]) > 0
        assert line["torch"] == torch.__version__
    assert all(float(line["error"]) < 1e-5 for line in lines[1:])
    assert "chunked-autograd" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


def test_a_wrong_provider_is_not_timed(loss):
    chosen = {"wrong": lambda heads: 1.1 * loss.plain(heads)}
    lines = list(loss.measurements(loss.Shape(16, 300, 24), "cpu", torch.float32, chosen, 2))
    assert [line["provider"] for line in lines] == ["floor", "wrong"]
    assert "ms" not in lines[1]
    assert lines[1]["note"] == "gradients off by 10.0%, not timed"


def test_unknown_provider_is_named(loss):
    with pytest.raises(SystemExit, match="no provider thin-air here, only ours, plain"):
        loss.main([*SMALL, "--providers", "ours", "thin-air"])


def test_flops_are_those_of_four_products(loss):
    shape = loss.Shape(hidden=960, vocab=49152, targets=8192)
    assert shape.flops == 4 * 2 * 960 * 49152 * 8192
