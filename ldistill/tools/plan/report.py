"""A plan as tables, as JSON, and as the command that runs it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldistill.recipe import load_recipe
from ldistill.tools.pairs import MAIN_RECIPE, recipe_of
from ldistill.tools.plan.hardware import GIB
from ldistill.tools.plan.layout import Layout, Span
from ldistill.tools.plan.plan import Plan
from ldistill.tools.table import Table

LORA_RATE = "2e-4"
"""LLaVA-1.5's own for adapters; a recipe's rate is that of full training, too low for them."""
_PARTS = {
    "weights": "weights, bf16",
    "gradients": "gradients, bf16, and fp32 for the step",
    "optimizer": "AdamW: fp32 weights and two moments",
    "teacher": "teacher",
    "activations": "activations",
    "kv_memory": "keys and values held for the teacher",
    "logits": "logits and the head's gradient",
    "buffers": "ZeRO's buckets and gathered weights",
    "reserved": "CUDA, NCCL, fragments (assumed)",
}


def headline(chosen: Layout) -> str:
    """One line: what is laid over what, how."""
    cluster, total = chosen.cluster, chosen.total / GIB
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    text = (
        f"{chosen.shape.name} on {cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''} of "
        f"{cluster.memory:g} GiB ({nodes}): it fits, {total:.1f} GiB a GPU, with "
        f"ds_configs/{chosen.zero.name}.json, teacher {chosen.teacher_name}, "
        f"{chosen.micro_batch} rows a GPU"
    )
    text += ", activations recomputed" if chosen.checkpointing else ""
    return text + (f", LoRA rank {chosen.lora}." if chosen.lora else ".")


def tables(plan: Plan) -> list[Table]:
    """Memory of a GPU, transfers of a step, the run, and the layouts that fit."""
    chosen = plan.chosen
    memory = [(_PARTS[name], _gib(size)) for name, size in chosen.memory.items()]
    memory += [("total", _gib(chosen.total)), ("card", f"{chosen.cluster.memory:.1f}")]
    if chosen.host_memory:
        memory.append(("CPU memory of a node", _gib(chosen.host_memory)))
    moved = [
        (t.what, t.where, f"{t.bytes / 1e9:.2f}", f"{t.seconds:.3f}") for t in chosen.transfers
    ]
    total = sum(transfer.bytes for transfer in chosen.transfers) / 1e9
    moved.append(("together", "", f"{total:.2f}", f"{chosen.network:.3f}"))
    moved.append(("compute, for comparison", "", "", f"{chosen.compute:.3f}"))
    return [
        Table("memory of a GPU", ("part", "GiB"), memory),
        Table("transfers of one step, per GPU", ("what", "over", "GB", "seconds"), moved),
        _run(plan),
        _layouts(plan),
    ]


def _run(plan: Plan) -> Table:
    request, chosen, counts = plan.request, plan.chosen, plan.chosen.rows
    labelled = counts.targets / counts.tokens
    taught = "none" if chosen.teacher == "none" else f"{counts.queries / counts.tokens:.0%}"
    of_gpu = Span(*(rate / chosen.cluster.gpus for rate in chosen.tokens_per_s))
    rows = [
        ("rows of a step", f"{request.global_batch} × {request.length} tokens"),
        ("rows of a GPU", f"{chosen.micro_batch}, accumulated {chosen.accumulation} times"),
        ("tokens with a label / with a teacher", f"{labelled:.0%} / {taught}"),
        ("MFU of the compute (stated)", f"{request.mfu:.0%}"),
        ("seconds a step", _span(chosen.seconds, ".2f")),
        ("tokens/s", _span(chosen.tokens_per_s, ",.0f")),
        ("tokens/s of a GPU", _span(of_gpu, ",.0f")),
        (f"GPU-hours of {request.steps} steps", _span(chosen.gpu_hours(request.steps), ",.1f")),
    ]
    title = "the run: transfers hidden behind compute, or not at all"
    return Table(title, ("what", "expected"), rows)


def _layouts(plan: Plan) -> Table:
    rows = []
    for layout in [plan.chosen, *plan.others][:8]:
        zero = layout.zero.name + (" ←" if layout is plan.chosen else "")
        how = (str(layout.micro_batch), "yes" if layout.checkpointing else "no")
        seconds = (f"{layout.compute:.2f}", f"{layout.network:.2f}")
        rows.append((zero, layout.teacher_name, *how, _gib(layout.total), *seconds))
    columns = ("ds_config", "teacher", "rows", "recompute", "GiB", "compute s", "transfers s")
    return Table("layouts that fit", columns, rows)


def command(plan: Plan) -> str:
    """The training command of a plan, whole: to be pasted where the shards are."""
    chosen, request, name = plan.chosen, plan.request, plan.chosen.shape.name
    own = recipe_of(name)  # a student's folder has none
    recipe = own or MAIN_RECIPE
    values, gpus = load_recipe(recipe), f"--num_gpus {chosen.cluster.gpus}"
    if chosen.cluster.nodes > 1:
        gpus = f"--hostfile hosts --num_nodes {chosen.cluster.nodes}"
    flags = {
        "recipe": shlex.quote(recipe),
        "student": None if own else shlex.quote(name),
        "teacher": None if own else "ITS_LM",
        "per_device_train_batch_size": chosen.micro_batch,
        "global_batch_size": request.global_batch,
        "max_length": request.length,
        "max_steps": request.steps if request.steps != chosen.shape.steps else None,
        "teacher_engine": None if chosen.teacher == "none" else chosen.teacher,
        "distil": {"none": "none"}.get(chosen.teacher, "all" if request.mix == "uniform" else None),
        "teacher_offload": "true" if chosen.teacher_offload else None,
        "gradient_checkpointing": str(chosen.checkpointing).lower(),
        "lora_rank": chosen.lora or None,
        "decoder_lr": LORA_RATE if chosen.lora and "decoder_lr" not in values else None,
        "attention": chosen.attention,
        "shards": None if values.get("prepare") else "shards/",  # a recipe may make its own
        "output_dir": shlex.quote(f"runs/{Path(own or name).stem}"),
    }
    given = " ".join(f"--{flag} {value}" for flag, value in flags.items() if value is not None)
    config = f"--deepspeed ds_configs/{chosen.zero.name}.json"
    return f"deepspeed {gpus} ldistill/train.py {config} {given}"


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan for programs."""
    rates, hours = plan.chosen.tokens_per_s, plan.chosen.gpu_hours(plan.request.steps)
    return {
        "pair": plan.chosen.shape.name,
        "cluster": asdict(plan.chosen.cluster),
        "request": asdict(plan.request),
        "chosen": _layout_dict(plan.chosen),
        "others": [_layout_dict(layout) for layout in plan.others],
        "tokens_per_s": rates.hidden,
        "tokens_per_s_exposed": rates.exposed,
        "gpu_hours": hours.hidden,
        "gpu_hours_exposed": hours.exposed,
        "command": command(plan),
    }


def _layout_dict(layout: Layout) -> dict[str, Any]:
    names = ("teacher", "micro_batch", "teacher_offload", "checkpointing", "attention", "lora")
    sums = {"total": layout.total, "host_of_node": layout.host_memory}
    return {
        "zero": layout.zero.name,
        **{name: getattr(layout, name) for name in (*names, "accumulation")},
        "memory_bytes": layout.memory | sums,
        "transfers": [transfer._asdict() for transfer in layout.transfers],
        "compute_seconds": layout.compute,
        "transfer_seconds": layout.network,
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.05 * GIB or not size else f"{size / GIB:.3f}"


def _span(span: Span, form: str) -> str:
    return " – ".join(dict.fromkeys(format(value, form) for value in span))
