"""Planned memory against DeepSpeed's estimators and against what autograd really saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from pairs import random_batch, small_config, teacher_config, weights
from transformers import LlamaForCausalLM

from ldistill.distill.attention import attach, recording
from ldistill.distill.distiller import Distiller, student_inputs
from ldistill.distill.teacher import Teacher
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.shapes import count, shape_of
from ldistill.tools.pairs import pair_shape
from ldistill.tools.plan.hardware import GIB, ZEROS, Cluster
from ldistill.tools.plan.layout import Layout

CONFIG = small_config()
SHAPE = shape_of("small", CONFIG, {})
# The estimators know no frozen weights.
TRAINED = dataclasses.replace(pair_shape("llava-7b"), vision_weights=0)
PAIRS = ("tiny", "nanovlm-460m", "smolvlm-256m", "smolvlm-500m", "llava-7b", "llava-13b")


def planned(zero: str, cluster: Cluster) -> Layout:
    return Layout(TRAINED, cluster, ZEROS[zero], "none", 1, 1024)


def small(teacher: str = "replicated", rows: int = 2, length: int = 64, **changes) -> Layout:
    return Layout(SHAPE, Cluster.of(1), ZEROS["zero2"], teacher, rows, length, **changes)


def states(layout: Layout) -> float:
    return sum(layout.memory[part] for part in ("weights", "gradients", "optimizer"))


@pytest.mark.parametrize(("gpus", "per_node"), [(1, 1), (8, 8), (32, 8), (96, 4)])
def test_stage_2_holds_what_deepspeed_estimates(gpus, per_node):
    cluster, weights_ = Cluster.of(gpus, per_node=per_node), TRAINED.trained_weights
    nodes = (per_node, gpus // per_node)
    for zero, offload in (("zero2", False), ("zero2_offload", True)):
        found = planned(zero, cluster)
        host, gpu = estimate_zero2_model_states_mem_needs(weights_, *nodes, offload, 1.0)
        assert states(found) == pytest.approx(gpu, rel=1e-6)
        if offload and gpus <= 4:
            assert found.host_memory == pytest.approx(host, rel=1e-6)


@pytest.mark.parametrize(("gpus", "per_node"), [(8, 8), (32, 8), (96, 4)])
def test_stage_3_holds_what_deepspeed_estimates_and_the_gradient_it_leaves_out(gpus, per_node):
    """18 bytes a weight are, at stage 3, all but the 16-bit gradient, which we count too."""
    cluster, weights_ = Cluster.of(gpus, per_node=per_node), TRAINED.trained_weights
    nodes = (per_node, gpus // per_node)
    _, gpu, largest = estimate_zero3_model_states_mem_needs(
        weights_, TRAINED.largest_module, *nodes, False, False, True, 1.0
    )
    found = planned("zero3", cluster)
    assert states(found) - (gpu - largest) == pytest.approx(2 * weights_ / gpus, rel=1e-6)
    assert found.memory["buffers"] >= largest
    host, _, _ = estimate_zero3_model_states_mem_needs(
        weights_, TRAINED.largest_module, *nodes, True, True, True, 1.0
    )
    found = planned("zero3_offload", cluster)
    assert states(found) == 0
    assert found.host_memory == pytest.approx(host, rel=1e-6)


class Saved:
    """Bytes that autograd keeps, each storage once, parameters left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
def test_activations_are_what_autograd_saves(dtype, attention, rows):
    student = NanoVLM(CONFIG).to(dtype).train()
    attach(student.decoder, attention)
    batch = random_batch(student, [[40, 24]] * rows)
    inputs = student.embed(batch["input_ids"], batch["pictures"]).detach().requires_grad_()
    saved = Saved(student)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        student.decoder.model(
            inputs_embeds=inputs, position_ids=batch["position_ids"], use_cache=False
        )
    expected = small(rows=rows, attention=attention).activations(inputs.element_size())
    assert saved.bytes == pytest.approx(expected, rel=0.03)


def test_recomputing_keeps_the_inputs_of_layers():
    student = NanoVLM(CONFIG).train()
    attach(student.decoder, "sdpa")
    student.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    batch = random_batch(student, [[40, 24]] * 2)
    inputs = student.embed(batch["input_ids"], batch["pictures"]).detach().requires_grad_()
    saved = Saved(student)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        student.decoder.model(
            inputs_embeds=inputs, position_ids=batch["position_ids"], use_cache=False
        )
    # The recomputed layer comes later, in backward; the mask waits among its arguments.
    mask = 2 * 64 * 64 * 4
    planned = small(checkpointing=True).activations(4) - _layer_bytes(small())
    assert CONFIG.lm_n_blocks * inputs.nbytes < saved.bytes + mask <= planned
    assert planned - saved.bytes - mask < 2 * inputs.nbytes


def _layer_bytes(layout: Layout) -> float:
    """A layer's share: what one more layer adds."""
    deeper = shape_of("deeper", small_config(lm_n_blocks=CONFIG.lm_n_blocks + 1), {})
    return dataclasses.replace(layout, shape=deeper).activations(4) - layout.activations(4)


def test_memory_and_teacher_are_counted_to_the_byte():
    student, lm = NanoVLM(CONFIG), LlamaForCausalLM(teacher_config(CONFIG))
    distiller = Distiller(student, Teacher(lm), weights())
    batch = random_batch(student, [[40, 24]] * 2)
    with recording(distiller.slots) as recorded:
        student(**student_inputs(batch))
        kept = recorded()
    held = sum(t.numel() * t.element_size() for t in (*kept.keys, *kept.values))
    assert small().kv_memory(element=4) == held
    assert small().memory["teacher"] == 2 * count(lm)
    assert small().memory["weights"] == 2 * count(student)
    assert small("none").memory["teacher"] == 0
    assert small("none").kv_memory() == 0


def test_views_cost_nothing_where_attention_saves_them():
    llava = pair_shape("llava-7b")  # every head has keys of its own
    layout = Layout(llava, Cluster.of(1), ZEROS["zero2"], "replicated", 1, 2048)
    assert layout.kv_memory() == 0
    held = dataclasses.replace(layout, checkpointing=True).kv_memory()
    assert held == 2 * 2 * 4096 * 32 * 2048


@pytest.mark.parametrize(
    ("pair", "student", "teacher"),
    [
        ("nanovlm-460m", 460.1e6, 361.8e6),
        ("smolvlm-256m", 256.5e6, 134.5e6),
        ("smolvlm-500m", 507.5e6, 361.8e6),
        ("llava-7b", 7.063e9, 6.738e9),
        ("llava-13b", 13.351e9, 13.016e9),
    ],
)
def test_shapes_have_the_sizes_of_the_public_checkpoints(pair, student, teacher):
    shape = pair_shape(pair)
    assert shape.student_weights == pytest.approx(student, rel=5e-4)
    assert shape.teacher_weights == pytest.approx(teacher, rel=5e-4)


def test_more_gpus_never_need_more_memory():
    for shape in map(pair_shape, PAIRS):
        for zero in ZEROS.values():
            sizes = [
                Layout(shape, Cluster.of(n), zero, "zero3", 1, 1024).total for n in (8, 16, 64)
            ]
            assert sizes == sorted(sizes, reverse=True)
            assert all(size > GIB for size in sizes)


def test_lora_weights_are_those_of_its_two_matrices():
    shape, rank = pair_shape("nanovlm-460m"), 16
    student = NanoVLM(small_config())
    layer = student.decoder.model.layers[0]
    linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    expected = sum(rank * (m.in_features + m.out_features) for m in linears)
    assert small(lora=rank).lora_weights == expected * len(student.decoder.model.layers)
    assert (
        dataclasses.replace(small(lora=rank), shape=shape).lora_weights
        < 0.03 * shape.decoder_weights
    )
