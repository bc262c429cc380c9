"""The attention benchmark on a CPU: it runs, its gate holds, its files can be read."""

import csv
import os
import sys
import time
from contextlib import nullcontext
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
    "packed": attention.Shape(2, 64, (6, 2), 16, lengths=(10, 25), queries=(0, 1, 6)),
    "dense": attention.Shape(2, 40, (4, 2), 16),
}


@pytest.fixture
def small_shapes(monkeypatch):
    monkeypatch.setattr(attention, "CPU_SHAPES", SMALL)
    attention.drawn.cache_clear()


def test_answers_have_as_many_queries_as_their_shape_says():
    lengths, five = attention.LENGTHS, attention.GPU_SHAPES["packed-b8-5tokens"]
    assert {d[4] - d[3] for d in five.problem("cpu", torch.float32).documents} <= set(range(1, 6))
    fifth = attention.Shape(2, 1024, lengths=lengths, queries=0.2).problem("cpu", torch.float32)
    for _, start, end, first, last in fifth.documents:
        assert last - first == max(1, round(0.2 * (end - start)))


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


def torch_varlen(*arguments, window_size, enable_gqa):
    assert (window_size, enable_gqa) == ((-1, 0), True)
    return varlen(*arguments, causal=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("shape", SMALL)
def test_what_surrounds_the_peers_that_need_a_gpu_is_right(shape, monkeypatch):
    """Kernels by stand-ins, FlexAttention without its compiler, which has no CPU backward."""
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    stand_in = SimpleNamespace(varlen_attn=torch_varlen)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    forced = []
    monkeypatch.setattr(providers, "sdpa_kernel", lambda kind: forced.append(kind) or nullcontext())
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = SMALL[shape].problem("cpu", torch.float32)
    truth = attention.exact(problem)
    for make in (providers.flash_attn, providers.varlen, providers.sdpa_cudnn):
        assert attention.gate(make(problem), problem, truth) < 1e-5
    assert forced == [providers.SDPBackend.CUDNN_ATTENTION]
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


def test_a_wrong_provider_is_not_timed(small_shapes, monkeypatch):
    def halved(problem):
        attend = providers.ours(problem)
        return lambda q, k, v: attend(q, k, v) * 0.5

    monkeypatch.setitem(providers.PROVIDERS, "ours", halved)
    options = attention.parse(["--device", "cpu", "--providers", "ours", "--repeats", "2"])
    for record in attention.records("packed", options):
        assert "not timed" in record["note"]
        assert "ms" not in record


def test_the_backward_of_a_compiled_provider_can_be_repeated(small_shapes, monkeypatch):
    def compiled(problem):
        return torch.compile(providers.plain(problem), backend="aot_eager_decomp_partition")

    monkeypatch.setitem(providers.PROVIDERS, "flex", compiled)
    options = attention.parse(["--device", "cpu", "--providers", "flex", "--repeats", "2"])
    found = list(attention.records("packed", options))
    assert [record["pass"] for record in found] == ["forward", "backward"]


def test_work_counts_visible_pairs():
    problem = attention.Shape(1, 4, (2, 1), 8).problem("cpu", torch.float32)
    assert problem.pairs == 1 + 2 + 3 + 4
    assert attention.work(problem, False) == (4 * 10 * 2 * 8, 2 * 4 * 2 * 8 * 4 + 2 * 4 * 8 * 4)


def test_command_writes_table_csv_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "CPU_SHAPES", {"dense-small": SMALL["dense"]})
    attention.drawn.cache_clear()
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


def test_sweep_stops_in_time_and_orders_what_it_has(small_shapes, monkeypatch, capsys):
    monkeypatch.setattr(attention, "ours", providers.plain)
    options = attention.parse(["--device", "cpu", "--repeats", "2", "--passes", "forward"])
    now = attention.time.monotonic()
    assert list(attention.sweep(options, ends=now - 1)) == [("packed", []), ("dense", [])]
    assert "packed: time is up" in capsys.readouterr().out
    for name, found in attention.sweep(options, ends=now + 600):
        times = {record["config"]: record["ms"] for record in found}
        assert len(times) == len(attention.SWEEP["forward"]) + 1
        assert {"shipped", "64x64x4x3", "64x64x4x3x168"} <= set(times)
        assert list(times.values()) == sorted(times.values())
        (line,) = attention.winners(name, found)
        best = next(iter(times))
        assert line.startswith(f"{name} forward: {best} takes {times[best] / times['shipped']:.2f}")


def test_a_tile_that_does_not_compile_is_noted_not_timed(small_shapes, monkeypatch):
    """On a GPU tiles are compiled ahead; here the verdicts are made up."""

    def verdicts(function, jobs, seconds, workers):
        assert function is attention.try_tile
        return {job: "" if job[2] is None else "OutOfResources: too large" for job in jobs[:-1]}

    monkeypatch.setattr(attention, "ahead", verdicts)
    options = attention.parse(["--device", "pretended"])
    options.shapes = ["dense"]
    monkeypatch.setattr(attention, "drawn", lambda *_: SMALL["dense"].problem("cpu", torch.float32))
    monkeypatch.setattr(attention, "time_tile", lambda *_: {"ms": 1.0})
    ((_, found),) = attention.sweep(options, ends=attention.time.monotonic() + 60)
    assert [r["config"] for r in found if "ms" in r] == ["shipped", "shipped"]
    notes = [r["note"] for r in found if "note" in r]
    assert set(notes) == {"OutOfResources: too large", "not compiled in time"}
    assert notes.count("not compiled in time") == 1


def test_compiling_ahead_survives_what_crashes_and_what_takes_too_long():
    assert common.ahead(len, [("",), ("ab",)], None, 1) == {("",): 0, ("ab",): 2}
    assert common.ahead(time.sleep, [(2,)], 0.01, 1) == {}
    (said,) = common.ahead(os._exit, [(1,)], None, 1).values()
    assert said.startswith("BrokenProcessPool")


def test_warming_up_runs_what_compiles_and_times_nothing(capsys):
    small = ["--device", "cpu", "--shapes", "dense-128", "--workers", "1"]
    attention.main([*small, "--warm", "--passes", "forward"])
    assert capsys.readouterr().out.splitlines() == [
        "dense-128 ours: compiled", "dense-128 ours two segments: compiled"
    ]  # fmt: skip
    wrong = attention.warm("no such shape", "ours", ("forward",), "cpu", torch.float32)
    assert wrong == "KeyError: 'no such shape'"


def test_a_shape_without_time_adds_nothing_to_the_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "CPU_SHAPES", SMALL)
    record = {"shape": "packed", "pass": "forward", "config": "shipped", "ms": 1.0}
    found = {"packed": [record], "dense": []}
    monkeypatch.setattr(attention, "sweep", lambda *_: iter(found.items()))
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
