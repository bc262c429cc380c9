"""Planned model states and transfers against two real ranks of DeepSpeed, to the byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers_zero import SHAPE
from pairs import small_config
from runs import REPO, run_ranks

from ldistill.models.shapes import shape_of
from ldistill.tools.plan.hardware import ZEROS, Cluster
from ldistill.tools.plan.layout import Layout

RANKS, ACCUMULATION = 2, 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reuse"),
    [("zero1", 10**9), ("zero2", 10**9), ("zero3", 0), ("zero3_multinode", 10**9)],
)
def test_two_ranks_hold_and_send_what_is_planned(name, reuse, tmp_path):
    zero = ZEROS[name]
    values = json.loads((REPO / f"ds_configs/{name}.json").read_text(encoding="utf-8"))
    if zero.stage == 3:
        # every weight of this small model would stay whole
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        values["zero_optimization"]["stage3_max_reuse_distance"] = reuse
        if not reuse:
            values["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
            zero = replace(zero, max_reuse=0, prefetch=0)
    if zero.node_partition > 1:
        values["zero_optimization"]["zero_hpz_partition_size"] = RANKS
        zero = replace(zero, node_partition=RANKS)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values), encoding="utf-8")
    out = tmp_path / "found.json"
    run_ranks(REPO / "tests/support/helpers_zero.py", config, ACCUMULATION, out, ranks=RANKS)
    found = json.loads(out.read_text(encoding="utf-8"))
    shape = shape_of("small", small_config(**SHAPE), {})
    sharded = zero.stage == 3
    teacher = "zero3" if sharded else "replicated"
    layout = Layout(shape, Cluster.of(RANKS), zero, teacher, 1, 64, ACCUMULATION)
    planned = layout.memory
    tolerance = {"rel": 0.01}  # padding to whole partitions
    assert found["optimizer"] == pytest.approx(planned["optimizer"], **tolerance)
    fp32 = 4 * shape.trained_weights / RANKS  # held while the optimizer steps, not here
    assert found["gradients"] == pytest.approx(planned["gradients"] - fp32, **tolerance)
    assert found["ahead"] == sharded, "the teacher's weights can be gathered ahead of their layers"
    assert found["left_whole"] == 0, "between the teacher's forward and the student's backward"
    if not sharded:
        assert found["weights"] == planned["weights"]
        assert found["teacher"] == planned["teacher"]
    else:  # small weights stay whole, and gathered ones are counted apart
        second = 2 * shape.student_weights / RANKS if zero.node_partition > 1 else 0
        assert found["weights"] + second == pytest.approx(planned["weights"], rel=0.03)
        assert found["teacher"] == pytest.approx(2 * shape.teacher_weights / RANKS, rel=0.03)
    sent = sum(transfer.bytes for transfer in layout.transfers)
    assert sent == pytest.approx(_measured_bytes(found["sent"]), rel=0.06)


def _measured_bytes(sent: dict[str, int]) -> float:
    """Bytes into one rank over a ring: an all-reduce passes twice."""
    share = (RANKS - 1) / RANKS
    return sum(size * share * (2 if name == "all_reduce" else 1) for name, size in sent.items())
