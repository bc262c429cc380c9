"""The benchmark of distill_loss: providers compute the same loss, and wrong ones are caught."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "kernels" / "benchmarks"
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
    for kind in ("distill", "ce"):
        here = [line for line in lines if line["kind"] == kind]
        names = [line["provider"] for line in here]
        assert names[:4] == ["floor", "ours", "plain", "chunked-autograd"]
        assert float(here[0]["x floor"]) == 1.0
        assert all(float(line["error"]) < 1e-5 for line in here[1:])
    for line in lines:
        assert float(line["ms"]) > 0
        assert line["torch"] == torch.__version__
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


def test_flops_are_those_of_four_products_or_of_three_without_a_teacher(loss):
    shape = loss.Shape(hidden=960, vocab=49152, targets=8192)
    assert shape.flops == 4 * 2 * 960 * 49152 * 8192
    alone = loss.Shape(hidden=960, vocab=49152, targets=8192, kind="ce")
    assert alone.flops == 3 * 2 * 960 * 49152 * 8192


@pytest.mark.parametrize("kind", ["distill", "ce"])
def test_the_gate_reaches_a_second_chunk(loss, monkeypatch, kind):
    """What is wrong from the second chunk on must not be timed."""
    chunked = sys.modules["ldistill_kernels.distill_loss.chunked"]
    monkeypatch.setitem(chunked.LOGITS_BYTES, "cpu", 4 * 300 * 128)
    first = chunked.chunk_targets("cpu", 600 if kind == "distill" else 300)
    monkeypatch.setattr(chunked, "add_weight_gradient", lambda total, *_: total.zero_())
    heads = loss.Heads.draw(loss.Shape(16, 300, 1000, kind), "cpu", torch.float32)
    assert loss.gate_targets(heads) == first + 64
    right, add = loss.PROVIDERS["ours"], chunked.add_weight_gradient
    assert loss.gate(right, heads) > 0.03
    monkeypatch.undo()
    assert loss.gate(right, heads) < 1e-5
    assert add is not chunked.add_weight_gradient


def test_providers_that_know_no_teacher_are_asked_for_cross_entropy_alone(loss, monkeypatch):
    for name in ("liger", "cce ce"):
        monkeypatch.setitem(loss.PROVIDERS, name, loss.plain)
    names = ["ours", "liger", "cce ce"]
    assert list(loss.suited(names, "distill")) == ["ours", "liger"]
    assert list(loss.suited(names, "ce")) == ["ours", "cce ce"]


def test_cross_entropies_of_others_are_called_as_they_want(loss, monkeypatch):
    """By stand-ins that have their signatures: both run on a GPU alone."""

    def cross_entropy(h_s, w_s, labels):
        return torch.nn.functional.cross_entropy(h_s @ w_s.t(), labels)

    class Liger:
        def __init__(self, accum_dtype):
            assert accum_dtype == torch.float32

        def __call__(self, lin_weight, _input, target):
            return cross_entropy(_input, lin_weight, target)

    here = {"cut_cross_entropy": {"linear_cross_entropy": cross_entropy},
            "liger_kernel": {},
            "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": Liger}}  # fmt: skip
    for name, members in here.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    heads = loss.Heads.draw(loss.Shape(16, 300, 24, "ce"), "cpu", torch.float32)
    providers = sys.modules["loss_providers"]
    for other in (providers.liger_ce, providers.cut_cross_entropy):
        assert loss.gate(other, heads) < 1e-5


def test_sweep_and_warming_up(loss, tmp_path, capsys):
    table = tmp_path / "sweep.csv"
    assert loss.main([*SMALL, "--kinds", "ce", "--sweep", "--csv", str(table)]) == 0
    with table.open() as file:
        names = [line["provider"] for line in csv.DictReader(file)]
    assert {"floor", "shipped", "block 2048x8x64", "chunks of 256"} <= set(names)
    capsys.readouterr()
    assert loss.main([*SMALL, "--kinds", "ce", "--warm", "--workers", "1"]) == 0
    assert "ours: compiled" in capsys.readouterr().out
