"""A whole training step through the Triton kernels and through the references: the same student.

Without a GPU the kernels run in Triton's interpreter, in fp32.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from pairs import random_batch, weights

from ldistill.data.collate import to_device
from ldistill.distill.distiller import Distiller
from ldistill.distill.objective import Objective
from ldistill.distill.teacher import Teacher
from ldistill.models.pair import load_pair
from ldistill.models.parts import train_only

pytest.importorskip("triton")
# Now, at collection: whether kernels are interpreted is settled when they are first imported.
importlib.import_module("ldistill_kernels.shared_kv_attention.triton_fwd")
importlib.import_module("ldistill_kernels.shared_kv_attention.triton_bwd")
importlib.import_module("ldistill_kernels.distill_loss.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [("full", "detached"), ("full", "through"), ("prompt", "detached"), ("visual", "through")]


def step(root, kernels: str, scope: str, kv_grad: str):
    pair = load_pair(str(root / "student"), str(root / "teacher"))
    train_only(pair.student)
    objective, teacher = Objective(kernels=kernels), Teacher(pair.lm, kernels)
    distiller = Distiller(
        pair.student, teacher, weights(), objective, kv_scope=scope, kv_grad=kv_grad
    ).to(DEVICE)
    teacher.lm.to(DEVICE, torch.float32)
    batch = random_batch(pair.student, [[16, 14], [20]], seq=40)
    supervision = distiller.supervise(batch)
    moved = to_device(batch, torch.device(DEVICE))
    total = float(len(supervision.targets))
    output = distiller(moved, supervision.to(torch.device(DEVICE)), total, True)
    output["loss"].backward()
    grads = {n: p.grad for n, p in distiller.student.named_parameters() if p.requires_grad}
    return output, grads


@pytest.mark.parametrize(("scope", "kv_grad"), CASES)
def test_kernels_train_the_same_student(pair_root, scope, kv_grad):
    expected, expected_grads = step(pair_root, "reference", scope, kv_grad)
    output, grads = step(pair_root, "triton", scope, kv_grad)
    torch.testing.assert_close(output["loss"], expected["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output["metrics"], expected["metrics"], atol=1e-4, rtol=1e-4)
    assert len(grads) > 20
    for name, grad in expected_grads.items():
        bound = 1e-4 * grad.abs().max().item() + 1e-8
        assert (grads[name] - grad).abs().max().item() <= bound, name
