"""Real DeepSpeed runs that are killed, starved and moved to other ranks (slow)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldistill.checkpoint import folder as checkpoint_folder
from ldistill.cli import app
from ldistill.tools.torture.bench import Bench, History, last_step
from ldistill.tools.torture.faults import FAULTS, TEXT_ONLY, choose, kills

pytestmark = pytest.mark.slow
# fp32 sums in another order over 9 steps of AdamW; measured differences are below 1e-6.
ELASTIC_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("torture"), ranks=2, steps=9)


@pytest.fixture(scope="module")
def undisturbed(bench) -> History:
    history = bench.undisturbed()
    assert list(history.losses) == list(history.samples) == list(range(1, 10))
    assert all(len(packs) == 4 for packs in history.samples.values())
    assert len(set(history.losses.values())) == 9
    return history


def test_two_random_kills_change_nothing(bench, undisturbed):
    row = kills(2, seed=3)(bench)
    assert row["passed"], row["outcome"]
    assert len(row["details"]["kills"]) == 2


@pytest.mark.parametrize("name", FAULTS)
def test_fault(bench, undisturbed, name):
    row = FAULTS[name](bench)
    assert row["passed"], f"{row['fault']}: {row['outcome']}"


def go_on(bench: Bench, run: Path, until: int | None, **options) -> dict:
    """Run until a checkpoint of ``until`` is complete and kill it there, or to the end.

    Returns the layout that the newest checkpoint was written with.
    """
    if until is None:
        bench.complete(run, **options)
    else:
        with bench.start(run, **options) as ranks:
            there = run / f"checkpoint-{until}"
            assert ranks.wait_for(there.exists, bench.timeout), ranks.output()[-3000:]
    newest = checkpoint_folder.survey(run)[0]
    return checkpoint_folder.read_manifest(newest.path).about["layout"]


def largest_difference(one: History, other: History) -> float:
    return max(abs(loss - other.losses[step]) for step, loss in one.losses.items())


def test_two_ranks_then_one_then_two(bench, undisturbed):
    """The same samples in the same order; losses within the tolerance."""
    run = bench.fresh("elastic")
    used = [go_on(bench, run, 3), go_on(bench, run, 6, ranks=1), go_on(bench, run, None)]
    assert [layout["ranks"] for layout in used] == [2, 1, 2]
    history = History.of(run)
    undisturbed.require(history, ELASTIC_TOLERANCE)
    assert 0 <= largest_difference(undisturbed, history) < ELASTIC_TOLERANCE
    assert not (run / ".adapted").exists()


def test_other_zero_stages(bench, undisturbed):
    """ZeRO-2, then 3, then 1 on one rank: optimizer states and weight decay come along."""
    run = bench.fresh("stages")
    flags = {"weight_decay": 0.1}
    alone = bench.undisturbed("decayed", **flags)
    assert largest_difference(alone, undisturbed) > ELASTIC_TOLERANCE  # the decay matters
    stages = [(2, 2, 3), (3, 2, 6), (1, 1, None)]
    used = [go_on(bench, run, at, stage=s, ranks=r, **flags) for s, r, at in stages]
    assert [layout["engine"] for layout in used] == ["zero2", "zero3", "zero1"]
    alone.require(History.of(run), ELASTIC_TOLERANCE)


def test_the_command_writes_its_table(tmp_path):
    table = tmp_path / "table.json"
    work = tmp_path / "work"
    arguments = ["torture", "--steps", "6", "--kills", "0", "--ranks", "1", "--json", str(table)]
    arguments += ["--fault", "missing-shard", "--workdir", str(work)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "held" in result.output
    record = json.loads(table.read_text())
    assert record["passed"] is True
    assert [row["fault"] for row in record["rows"]] == ["shard missing at the start"]
    assert last_step(work / "missing-shard") == 0
    wrong = CliRunner().invoke(app, ["torture", "--fault", "earthquake"])
    assert isinstance(wrong.exception, ValueError)
    assert "no fault earthquake" in str(wrong.exception)


def test_one_rank_is_not_asked_to_differ_from_others():
    assert choose([], 2) == list(FAULTS.values())
    assert choose([], 1) == [fault for name, fault in FAULTS.items() if name != TEXT_ONLY]
    assert choose(["none"], 1) == []
    with pytest.raises(ValueError, match=r"no fault text-only-rank; .*takes --ranks 2"):
        choose([TEXT_ONLY], 1)


def test_histories_that_differ_are_told_apart():
    history = History({1: 0.5, 2: 0.25}, {1: [["a"], ["b"]], 2: [["c"]]})
    assert history.require(history) == "same losses and samples"
    for other, said in (
        (History({1: 0.5}, {1: [["a"], ["b"]]}), "loss of step 2: nan, not 0.25"),
        (History({1: 0.5, 2: 0.26}, history.samples), "loss of step 2: 0.26, not 0.25"),
        (History(history.losses, {1: [["b"], ["a"]], 2: [["c"]]}), "samples of step 1 differ"),
    ):
        with pytest.raises(RuntimeError, match=said):
            history.require(other)
        with pytest.raises(RuntimeError):
            other.require(history)


def test_a_machine_on_which_nothing_runs_is_no_failed_fault(tmp_path, monkeypatch):
    """It could not be tried: exit status 2, which `ldistill` gives to such an error."""

    def fails(bench, run, *flags, **options):
        raise RuntimeError(f"{run.name} ended with 1:\nno compiler")

    monkeypatch.setattr(Bench, "complete", fails)
    arguments = ["torture", "--kills", "0", "--fault", "slow-reads", "--workdir", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ChildProcessError)
    assert "no compiler" in str(result.exception)
