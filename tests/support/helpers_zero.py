"""One rank of a small pair under DeepSpeed: what it holds and what it sends, as JSON on rank 0.

Started by ``test_scale_measured.py`` as a program, once per configuration.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import deepspeed
import torch
from pairs import random_batch, small_config, teacher_config, weights
from transformers import LlamaForCausalLM

from ldistill.common import ranks
from ldistill.distill.distiller import Distiller
from ldistill.distill.teacher import Teacher
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.parts import train_only
from ldistill.training.optimizer import Rates, parameter_groups

SHAPE = {"lm_hidden_dim": 192, "lm_inter_dim": 384, "lm_n_blocks": 4}


def main(config_file: str, accumulation: int, out: str) -> None:
    """Two optimizer steps; the second is counted."""
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    deepspeed.init_distributed("gloo")
    world = torch.distributed.get_world_size()
    config |= {
        "train_batch_size": accumulation * world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    torch.manual_seed(0)
    shape = small_config(**SHAPE)
    student = NanoVLM(shape)
    train_only(student)
    teacher = Teacher(LlamaForCausalLM(teacher_config(shape)))
    sharded = config["zero_optimization"]["stage"] == 3
    if sharded:
        teacher.shard("zero3", torch.bfloat16)
    else:
        teacher.lm.to(torch.bfloat16)
    distiller = Distiller(student, teacher, weights())
    optimizer = torch.optim.AdamW(parameter_groups(student, Rates(1e-4, 1e-4, 1e-4), 0.0))
    engine, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, config=config)
    sent: Counter[str] = Counter()
    count_collectives(sent)
    batch = random_batch(student, [[30, 34]], seed=engine.global_rank)
    plan = distiller.supervise(batch)
    gradients = whole = 0
    for step in range(2):
        sent.clear()
        for _ in range(accumulation):
            loss = engine(batch, plan, len(plan.targets), True)["loss"]
            whole = max(whole, left_whole(teacher.lm) if sharded else 0)
            engine.backward(loss)
            gradients = max(gradients, gradient_bytes(engine.optimizer))
            engine.step()
        assert step == 0 or sent
    if engine.global_rank == 0:
        found = {
            "weights": parameter_bytes(student),
            "teacher": parameter_bytes(teacher.lm),
            "optimizer": optimizer_bytes(engine.optimizer),
            "gradients": gradients,
            "sent": dict(sent),
            "left_whole": whole,
            "ahead": sharded
            and teacher.engine.optimizer.get_param_coordinator().is_complete_trace(),
        }
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def left_whole(module: torch.nn.Module) -> int:
    """Elements of partitioned matrices that this rank holds whole though none is at work."""
    matrices = (p for p in module.parameters() if p.ds_numel > 10_000)
    return sum(p.ds_numel for p in matrices if p.ds_status.name == "AVAILABLE")


def parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters this rank holds, partitioned ones as the part it keeps."""
    found = {}
    for parameter in module.parameters():
        tensor = getattr(parameter, "ds_tensor", parameter.data)
        found[id(parameter)] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def optimizer_bytes(optimizer: object) -> int:
    """fp32 weights and moments of this rank."""
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if masters is None:
        masters = optimizer.single_partition_of_fp32_groups
    total = sum(t.numel() * t.element_size() for t in masters)
    for state in optimizer.optimizer.state.values():
        tensors = (t for t in state.values() if torch.is_tensor(t) and t.numel() > 1)
        total += sum(t.numel() * t.element_size() for t in tensors)
    return total


def gradient_bytes(optimizer: object) -> int:
    """16-bit gradients kept between backward and step."""
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:
        return flat.numel() * flat.element_size()
    kept = [t for part in optimizer.averaged_gradients.values() if part for t in part]
    if optimizer.partition_gradients:
        return sum(t.numel() * t.element_size() for t in kept if t is not None)
    own = [p.grad for group in optimizer.bit16_groups for p in group]
    return sum(g.numel() * g.element_size() for g in own if g is not None)


def count_collectives(sent: Counter[str]) -> None:
    """Add up, by collective, the bytes of the whole tensor that it reduces or gathers."""
    from deepspeed.comm.torch import TorchBackend

    whole = {
        "all_reduce": lambda tensor, *_: tensor,
        "all_gather_into_tensor": lambda output, *_: output,
        "reduce_scatter_tensor": lambda output, inputs, *_: inputs,
    }
    for name, pick in whole.items():
        setattr(TorchBackend, name, _counted(getattr(TorchBackend, name), name, pick, sent))


def _counted(real, name, pick, sent):
    def collective(self, *args, **kwargs):
        given = list(args) + [v for k, v in kwargs.items() if torch.is_tensor(v)]
        tensor = pick(*[a for a in given if torch.is_tensor(a)])
        if tensor.numel() > 64:  # norms and flags are not weights
            sent[name] += tensor.numel() * tensor.element_size()
        return real(self, *args, **kwargs)

    return collective


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    ranks.wait()
    ranks.end_process(0)
