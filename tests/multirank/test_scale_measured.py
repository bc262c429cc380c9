"""Planned model states and transfers against two real ranks of DeepSpeed, to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_zero import SHAPE
from pairs import small_config
from runs import REPO, environment, free_port

from ldistill.models.shapes import shape_of
from ldistill.tools.plan.hardware import ZEROS, Cluster, Strategy
from ldistill.tools.plan.memory import memory
from ldistill.tools.plan.network import transfers

RANKS, ACCUMULATION = 2, 2


def run_ranks(config: Path, out: Path) -> dict:
    """``helpers_zero.py`` on two gloo ranks."""
    port, processes = str(free_port()), []
    script = str(REPO / "tests/support/helpers_zero.py")
    for rank in range(RANKS):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        env = environment() | {k: str(v) for k, v in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, script, str(config), str(ACCUMULATION), str(out)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=env, cwd=REPO, **pipes))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


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
    found = run_ranks(config, tmp_path / "found.json")
    shape = shape_of("small", small_config(**SHAPE), {})
    sharded = zero.stage == 3
    strategy = Strategy(zero, "zero3" if sharded else "replicated", 1)
    cluster = Cluster.of(RANKS)
    planned = memory(shape, cluster, strategy, 64)
    tolerance = {"rel": 0.01}  # padding to whole partitions
    assert found["optimizer"] == pytest.approx(planned.optimizer, **tolerance)
    fp32 = 4 * shape.trained_weights / RANKS  # held while the optimizer steps, not here
    assert found["gradients"] == pytest.approx(planned.gradients - fp32, **tolerance)
    assert found["ahead"] == sharded, "the teacher's weights can be gathered ahead of their layers"
    assert found["left_whole"] == 0, "between the teacher's forward and the student's backward"
    if not sharded:
        assert found["weights"] == planned.weights
        assert found["teacher"] == planned.teacher
    else:  # small weights stay whole, and gathered ones are counted apart
        second = 2 * shape.student_weights / RANKS if zero.node_partition > 1 else 0
        assert found["weights"] + second == pytest.approx(planned.weights, rel=0.03)
        assert found["teacher"] == pytest.approx(2 * shape.teacher_weights / RANKS, rel=0.03)
    assert _planned_bytes(shape, cluster, strategy) == pytest.approx(
        _measured_bytes(found["sent"]), rel=0.06
    )


def _measured_bytes(sent: dict[str, int]) -> float:
    """Bytes into one rank over a ring: an all-reduce passes twice."""
    share = (RANKS - 1) / RANKS
    return sum(size * share * (2 if name == "all_reduce" else 1) for name, size in sent.items())


def _planned_bytes(shape, cluster, strategy) -> float:
    return sum(t.bytes for t in transfers(shape, cluster, strategy, ACCUMULATION))
