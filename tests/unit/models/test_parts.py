"""What `--train` frees, what is exported of it, and adapters on a part of a decoder."""

from __future__ import annotations

import pytest
import torch
from hf_pairs import WRITERS
from pairs import random_batch, weights

from ldistill.distill.distiller import Distiller
from ldistill.distill.teacher import Teacher
from ldistill.models.formats import load_student
from ldistill.models.lora import add_lora
from ldistill.models.pair import load_pair
from ldistill.models.parts import TRAINABLE, train_only
from ldistill.models.weights import gather_trained


def of_layers(student, *names):
    layers = student.backbone.layers
    return {id(p) for layer in layers for n in names for p in layer.get_submodule(n).parameters()}


def everything(module):
    return {id(p) for p in module.parameters()}


EXPECTED = {
    "vision": lambda s: everything(s.vision),
    "projector": lambda s: everything(s.projector),
    "decoder": lambda s: everything(s.backbone) | everything(s.lm_head),
    "attention": lambda s: of_layers(s, "self_attn"),
    "mlp": lambda s: of_layers(s, "mlp"),
    "gate_up": lambda s: of_layers(s, "mlp.gate_proj", "mlp.up_proj"),
}


@pytest.fixture(scope="module", params=WRITERS)
def root(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder)
    return folder


def test_each_part_is_what_its_name_says(root):
    assert set(EXPECTED) == set(TRAINABLE)
    student = load_student(root / "student")
    for part, expected in EXPECTED.items():
        train_only(student, f"{part}, projector")
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        assert trained == expected(student) | everything(student.projector), part


def test_a_step_moves_the_chosen_parts_and_nothing_else(root, tmp_path):
    base = root / "student"
    pair = load_pair(str(base), str(root / "teacher"))
    train_only(pair.student, "vision,attention")
    distiller = Distiller(pair.student, Teacher(pair.lm), weights()).train()
    batch = random_batch(pair.student, [[30], [24]])
    distiller(batch, distiller.supervise(batch), 10.0, True)["loss"].backward()
    chosen = {n: p for n, p in pair.student.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in pair.student.backbone.layers[0].self_attn.parameters())
    torch.optim.SGD(chosen.values(), lr=1.0).step()
    pair.export(gather_trained(pair.student), tmp_path / "out")
    now, before = (dict(s.named_parameters()) for s in (pair.student, load_student(base)))
    moved = set()
    for name, parameter in load_student(tmp_path / "out").named_parameters():
        assert torch.equal(parameter, now[name]), name
        moved |= set() if torch.equal(parameter, before[name]) else {name}
    assert moved <= chosen.keys()
    assert any("vision" in name for name in moved)
    assert any("vision" not in name for name in moved)


def test_adapters_lie_on_the_chosen_parts_and_learn_from_labels_alone(root):
    pytest.importorskip("peft")
    student = load_student(root / "student")
    train_only(student, "projector,gate_up")
    add_lora(student, rank=2)
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    adapters = {n for n in trained if "lora_" in n}
    assert len(adapters) == 2 * 2 * len(student.backbone.layers)
    assert all(".gate_proj." in n or ".up_proj." in n for n in adapters)
    assert {id(student.get_parameter(n)) for n in trained - adapters} == everything(
        student.projector
    )
    distiller = Distiller(student, None, weights(alpha=(0.0, 0.0))).train()
    batch = random_batch(student, [[30], [24]])
    distiller(batch, distiller.supervise(batch), 10.0, False)["loss"].backward()
    second = [student.get_parameter(n) for n in adapters if "lora_B" in n]  # the first begins at 0
    assert all(p.grad.abs().max() > 0 for p in second)
