"""A plan as tables, for the terminal or in Markdown."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldistill.models.named_pairs import KNOWN_STUDENTS, RECIPES
from ldistill.recipe import load_recipe
from ldistill.tools.plan.hardware import GIB, Strategy
from ldistill.tools.plan.layouts import Layout
from ldistill.tools.plan.memory import Memory
from ldistill.tools.plan.plan import Plan

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


@dataclass(frozen=True)
class Block:
    """A table: title, columns, rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As a Markdown table; first column left, the others right."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines)

    def rich(self) -> Any:
        """As a table of rich."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def blocks(plan: Plan) -> list[Block]:
    """All tables of a plan."""
    return [memory_block(plan), transfer_block(plan), run_block(plan), layout_block(plan)]


def headline(plan: Plan) -> str:
    """One line: what is laid over what, how."""
    cluster, chosen = plan.cluster, plan.chosen
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    return (
        f"{plan.shape.name} on {cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''} of "
        f"{cluster.memory:g} GiB ({nodes}): it fits, {chosen.memory.total / GIB:.1f} GiB a GPU, "
        f"with {describe(chosen.strategy)}."
    )


def describe(strategy: Strategy) -> str:
    """A layout in a phrase."""
    text = f"ds_configs/{strategy.zero.name}.json, teacher {strategy.teacher_name}, "
    text += f"{strategy.micro_batch} rows a GPU"
    text += ", activations recomputed" if strategy.checkpointing else ""
    return text + (f", LoRA rank {strategy.lora}" if strategy.lora else "")


def memory_block(plan: Plan) -> Block:
    """Memory of one GPU by part."""
    found, limit = plan.chosen.memory, plan.cluster.memory
    rows = [(_PARTS[name], _gib(size)) for name, size in found.parts.items()]
    rows += [("total", _gib(found.total)), ("card", f"{limit:.1f}")]
    if found.host:
        rows.append(("CPU memory of a node", _gib(found.host)))
    return Block("memory of a GPU", ("part", "GiB"), rows)


def transfer_block(plan: Plan) -> Block:
    """What crosses the links in a step."""
    rows = [
        (t.what, t.where, f"{t.bytes / 1e9:.2f}", f"{t.seconds:.3f}") for t in plan.chosen.transfers
    ]
    chosen = plan.chosen
    total = sum(t.bytes for t in chosen.transfers) / 1e9
    rows.append(("together", "", f"{total:.2f}", f"{chosen.network:.3f}"))
    rows.append(("compute, for comparison", "", "", f"{chosen.compute:.3f}"))
    return Block("transfers of one step, per GPU", ("what", "over", "GB", "seconds"), rows)


def run_block(plan: Plan) -> Block:
    """What the run takes."""
    request, rows, chosen = plan.request, plan.rows, plan.chosen
    taught = (
        "none" if chosen.strategy.teacher == "none" else f"{rows.teacher_rows / rows.tokens:.0%}"
    )
    found = [
        ("rows of a step", f"{request.global_batch} × {request.length} tokens"),
        (
            "rows of a GPU",
            f"{chosen.strategy.micro_batch}, accumulated {chosen.accumulation} times",
        ),
        ("tokens with a label / with a teacher", f"{rows.supervised / rows.tokens:.0%} / {taught}"),
        ("MFU of the compute (stated)", f"{request.mfu:.0%}"),
        ("seconds a step", _span(chosen.seconds, chosen.seconds_exposed, ".2f")),
        ("tokens/s", _span(plan.tokens_per_s, plan.tokens_per_s_exposed, ",.0f")),
        (
            "tokens/s of a GPU",
            _span(
                plan.tokens_per_s / plan.cluster.gpus,
                plan.tokens_per_s_exposed / plan.cluster.gpus,
                ",.0f",
            ),
        ),
        (
            f"GPU-hours of {request.steps} steps",
            _span(plan.gpu_hours, plan.gpu_hours_exposed, ",.1f"),
        ),
    ]
    return Block(
        "the run: transfers hidden behind compute, or not at all", ("what", "expected"), found
    )


def layout_block(plan: Plan, most: int = 8) -> Block:
    """The chosen layout beside the others that fit."""
    rows = []
    for layout in [plan.chosen, *plan.others][:most]:
        s = layout.strategy
        rows.append(
            (
                s.zero.name + (" ←" if layout is plan.chosen else ""),
                s.teacher_name,
                str(s.micro_batch),
                "yes" if s.checkpointing else "no",
                _gib(layout.memory.total),
                f"{layout.compute:.2f}",
                f"{layout.network:.2f}",
            )
        )
    columns = ("ds_config", "teacher", "rows", "recompute", "GiB", "compute s", "transfers s")
    return Block("layouts that fit", columns, rows)


def command(plan: Plan) -> str:
    """The training command of a plan, whole: to be pasted where the shards are."""
    strategy, request, cluster = plan.chosen.strategy, plan.request, plan.cluster
    launcher = f"deepspeed --num_gpus {cluster.gpus}"
    if cluster.nodes > 1:
        launcher = f"deepspeed --hostfile hosts --num_nodes {cluster.nodes}"
    parts = [
        f"{launcher} ldistill/train.py --deepspeed ds_configs/{strategy.zero.name}.json",
        _pair_flags(plan.shape.name),
        f"--per_device_train_batch_size {strategy.micro_batch}",
        f"--global_batch_size {request.global_batch} --max_length {request.length}",
    ]
    if request.steps != plan.shape.steps:
        parts.append(f"--max_steps {request.steps}")
    if strategy.teacher == "none":
        parts.append("--distil none")
    else:
        parts.append(f"--teacher_engine {strategy.teacher}")
        parts += ["--distil all"] if request.mix == "uniform" else []
    if strategy.teacher_offload:
        parts.append("--teacher_offload true")
    parts.append(f"--gradient_checkpointing {str(strategy.checkpointing).lower()}")
    if strategy.lora:
        parts.append(f"--lora_rank {strategy.lora}")
        if "decoder_lr" not in load_recipe(_recipe(plan.shape.name)):
            parts.append(f"--decoder_lr {LORA_RATE}")
    parts.append(f"--attention {strategy.attention}")
    return " ".join([*parts, _folder_flags(plan.shape.name)])


def _pair_flags(name: str) -> str:
    """What names the pair on the command line."""
    recipe = f"--recipe {shlex.quote(_recipe(name))}"
    if Path(name).is_dir():
        return f"{recipe} --student {shlex.quote(name)} --teacher ITS_LM"
    return recipe


def _recipe(name: str) -> str:
    if Path(name).is_dir():
        return "lingudistill"
    known = KNOWN_STUDENTS.get(name, name)
    return RECIPES.get(known, known)


def _folder_flags(name: str) -> str:
    """Shards and run folder; a recipe that makes its own shards names none."""
    where = Path(name if Path(name).is_dir() else _recipe(name))
    own = load_recipe(_recipe(name)).get("prepare")
    output = shlex.quote(f"runs/{where.stem}")
    return f"--output_dir {output}" if own else f"--shards shards/ --output_dir {output}"


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan for programs."""
    return {
        "pair": plan.shape.name,
        "cluster": asdict(plan.cluster),
        "request": asdict(plan.request),
        "chosen": _layout_dict(plan.chosen),
        "others": [_layout_dict(layout) for layout in plan.others],
        "tokens_per_s": plan.tokens_per_s,
        "tokens_per_s_exposed": plan.tokens_per_s_exposed,
        "gpu_hours": plan.gpu_hours,
        "gpu_hours_exposed": plan.gpu_hours_exposed,
        "command": command(plan),
    }


def _layout_dict(layout: Layout) -> dict[str, Any]:
    strategy = asdict(layout.strategy) | {"zero": layout.strategy.zero.name}
    return {
        **strategy,
        "accumulation": layout.accumulation,
        "memory_bytes": _memory_dict(layout.memory),
        "transfers": [asdict(transfer) for transfer in layout.transfers],
        "compute_seconds": layout.compute,
        "transfer_seconds": layout.network,
    }


def _memory_dict(memory: Memory) -> dict[str, float]:
    return {**memory.parts, "total": memory.total, "host_of_node": memory.host}


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.05 * GIB or not size else f"{size / GIB:.3f}"


def _span(best: float, worst: float, form: str) -> str:
    first, last = format(best, form), format(worst, form)
    return first if first == last else f"{first} – {last}"
