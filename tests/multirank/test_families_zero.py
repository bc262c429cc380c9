"""Families of transformers under ZeRO: a rank without pictures trains as the others do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_families import RATE, STEPS, WEIGHTS, batch_of, open_pair
from runs import REPO, run_ranks

from ldistill.distill.distiller import Distiller
from ldistill.distill.teacher import Teacher
from ldistill.models.zoo import write_pair

NAMES = (
    *("nanovlm", "nanovlm-222m", "llava", "llava-next", "llava-onevision", "smolvlm", "smolvlm2"),
    *("idefics3", "internvl", "internvl-qwen3", "internvl-llama", "qwen2-vl", "qwen2.5-vl"),
    *("qwen3-vl", "gemma3", "paligemma", "paligemma2", "mistral3", "glm4v", "glm46v", "ovis2"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in NAMES:
        write_pair(name, folder / name)
    return folder


@pytest.fixture(scope="module")
def expected(world) -> dict[str, dict[str, torch.Tensor]]:
    """The same steps in one process, without DeepSpeed: the mean of both ranks' losses."""
    found = {}
    for name in NAMES:
        pair = open_pair(world / name)
        distiller = Distiller(pair.student, Teacher(pair.lm), WEIGHTS).train()
        batches = [batch_of(pair, rank) for rank in (0, 1)]
        trained = {n: p for n, p in pair.student.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=RATE)
        for _ in range(STEPS):
            for batch in batches:
                plan = distiller.supervise(batch)
                (distiller(batch, plan, 10.0, True)["loss"] / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[name] = {n: p.detach() for n, p in trained.items()}
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_without_pictures_trains_as_the_others_do(world, expected, stage):
    run_ranks(REPO / "tests/support/helpers_families.py", stage, world)
    for name in NAMES:
        weights = torch.load(world / name / f"zero{stage}.pt")
        assert expected[name].keys() <= weights.keys()
        for parameter, value in expected[name].items():
            torch.testing.assert_close(
                weights[parameter], value, rtol=1e-3, atol=1e-5, msg=f"{name} {parameter}"
            )
