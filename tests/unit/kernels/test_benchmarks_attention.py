"""The attention benchmark on a CPU: it runs, its gate holds, its files can be read."""

import csv
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[3] / "kernels" / "benchmarks"))

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


def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, causal):
    """What flash-attn computes: packed documents, causal from the last row and position back."""
    assert causal
    assert (longest_q, longest_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outs = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("shape", SMALL)
def test_what_surrounds_the_peers_that_need_a_gpu_is_right(shape, monkeypatch):
    """flash-attn by a stand-in, FlexAttention without its compiler, which has no CPU backward."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = SMALL[shape].problem("cpu", torch.float32)
    truth = attention.exact(problem)
    assert attention.gate(providers.flash_attn(problem), problem, truth) < 1e-5
    problem.case = problem.case.cast(torch.float32)
    with torch.no_grad():
        out = providers.flex(problem)(*problem.case.positional[:3])
    torch.testing.assert_close(out.double(), truth[0], rtol=0, atol=1e-5)


class Calls(TorchDispatchMode):
    """What PyTorch is asked to do, as (operation, dtypes of the indices)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        indexed = name in ("index", "index_put", "index_put_")
        dtypes = tuple(x.dtype for x in args[1] if x is not None) if indexed else ()
        self.seen.add((name, dtypes))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["plain", "sdpa", "gather+sdpa", "gather+sdpa repeat"])
def test_baselines_neither_wait_for_the_gpu_nor_add_where_they_can_copy(name):
    problem = SMALL["packed"].problem("cpu", torch.float32)
    attend = providers.PROVIDERS[name](problem)
    attend(*problem.case.positional[:3])  # what is made once, is
    with Calls() as calls:
        attention.results(attend, problem, backward=True)
    names = {name for name, _ in calls.seen}
    assert not names & {"nonzero", "_local_scalar_dense", "item", "index_add", "index_put"}
    assert {dtypes for name, dtypes in calls.seen if name.startswith("index")} <= {
        (torch.int64,), (torch.int64, torch.int64)
    }  # fmt: skip
    assert ("index_put_", (torch.int64,)) in calls.seen


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


def test_the_spread_of_few_repeats_lies_between_them(monkeypatch):
    monkeypatch.setattr(common, "_cpu_times", lambda function, repeats: [1.0, 9.0][:repeats])
    timing = common.measure(lambda: None, "cpu", repeats=1)
    assert (timing.low, timing.median, timing.high) == pytest.approx((2.6, 5.0, 7.4))


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


def test_a_shape_without_time_adds_nothing_to_the_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "CPU_SHAPES", SMALL)
    found = {"packed": [{"shape": "packed", "ms": 1.0}], "dense": []}
    monkeypatch.setattr(attention, "sweep", lambda name, *_: iter(found[name]))
    table = tmp_path / "out.csv"
    attention.main(["--device", "cpu", "--sweep", "--csv", str(table)])
    with table.open() as lines:
        assert [row["shape"] for row in csv.DictReader(lines)] == ["packed"]


def test_ldistill_bench_kernels_starts_it():
    from typer.testing import CliRunner

    from ldistill.tools.bench.commands import app

    small = ["--device", "cpu", "--shapes", "dense-128", "--providers", "ours", "--repeats", "2"]
    assert CliRunner().invoke(app, ["kernels", "attention", *small]).exit_code == 0
    assert CliRunner().invoke(app, ["kernels", "attention", "--shapes", "none"]).exit_code == 2
    assert "'fourier' is not one of" in CliRunner().invoke(app, ["kernels", "fourier"]).output
