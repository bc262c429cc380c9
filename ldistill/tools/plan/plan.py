"""Does a pair fit so many GPUs, laid out how, and what will a run take?

    plan = make_plan(pair_shape("llava-13b"), Cluster.of(32), Request())

Every layout is tried: the shipped DeepSpeed configurations, the teacher engines, micro-batches,
with and without recomputed activations. Of those that fit the fastest is taken. Nothing is
measured here: memory and bytes are formulas, compute is FLOPs over a stated MFU.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ldistill.models.shapes import PairShape
from ldistill.recipe import load_recipe
from ldistill.tools.pairs import MAIN_RECIPE, recipe_of
from ldistill.tools.plan.hardware import GIB, ZEROS, Cluster
from ldistill.tools.plan.layout import Layout, Span
from ldistill.tools.table import Table

MOST_ROWS = 64  # of a micro-batch that is looked for
MOST_GPUS = 4096  # up to which a plan that does not fit looks for one that does


@dataclass(frozen=True)
class Request:
    """What is asked of a plan, as :class:`Layout` has it; None leaves the choice to the plan.

    Tokens of a row, rows and number of steps are then those of the pair's recipe.
    """

    length: int | None = None
    global_batch: int | None = None
    steps: int | None = None
    micro_batch: int | None = None
    mfu: float = 0.4
    teacher: str = "auto"
    zero: str | None = None  # by name
    checkpointing: bool | None = None
    attention: str = "sdpa"
    mix: str = "paper"
    lora: int = 0


class Plan(NamedTuple):
    """The layout chosen, and the best one of every other kind."""

    request: Request
    chosen: Layout
    others: list[Layout]


def make_plan(shape: PairShape, cluster: Cluster, request: Request) -> Plan:
    """The fastest layout that fits.

    Raises ValueError: nothing fits (what is too big and what to change is said), or as `layouts`.
    """
    usual = {name: getattr(shape, name) for name in ("length", "global_batch", "steps")}
    request = replace(request, **{n: v for n, v in usual.items() if getattr(request, n) is None})
    tried = list(layouts(shape, cluster, request))
    fitting = sorted((layout for layout in tried if layout.fits), key=_cost)
    if not fitting:
        raise ValueError(_too_big(request, min(tried, key=lambda layout: layout.total)))
    best: dict[tuple[str, str], Layout] = {}
    for layout in fitting:
        best.setdefault((layout.zero.name, layout.teacher_name), layout)
    # within a tenth of the fastest the simplest configuration wins
    limit, simple = 1.1 * min(layout.seconds.exposed for layout in best.values()), list(ZEROS)
    good = [layout for layout in best.values() if layout.seconds.exposed <= limit]
    chosen = min(good, key=lambda layout: (simple.index(layout.zero.name), *_cost(layout)))
    return Plan(request, chosen, [layout for layout in best.values() if layout is not chosen])


def _cost(layout: Layout) -> tuple[float, ...]:
    """Time; where it is the same, the micro-batch closest to the usual one; then memory."""
    distance = abs(math.log(layout.micro_batch / layout.shape.micro_batch))
    return round(layout.seconds.exposed, 6), distance, layout.total


def layouts(shape: PairShape, cluster: Cluster, request: Request) -> Iterator[Layout]:
    """Every layout that a request leaves open.

    Raises ValueError: the global batch or the partitions of ZeRO cannot be cut over the GPUs.
    """
    batch, step = request.global_batch, cluster.gpus * (request.micro_batch or 1)
    if batch % step:
        per_card = f" with --micro-batch {request.micro_batch}" if request.micro_batch else ""
        raise ValueError(
            f"a global batch of {batch} rows cannot be cut over {cluster.gpus} GPUs{per_card}, it "
            f"is no multiple of {step}: change --global-batch, --gpus or --micro-batch."
        )
    share = batch // cluster.gpus
    sizes = [request.micro_batch] if request.micro_batch else range(1, min(share, MOST_ROWS) + 1)
    recompute = (False, True) if request.checkpointing is None else (request.checkpointing,)
    fixed = (request.attention, request.lora, request.mix, request.mfu)
    for zero in [ZEROS[request.zero]] if request.zero else ZEROS.values():
        whole = cluster.on_node % zero.node_partition == 0
        if request.zero and not whole:
            raise ValueError(
                f"{zero.name} partitions weights within {zero.node_partition} GPUs of a node, and "
                f"{cluster.on_node} is no multiple of that: change zero_hpz_partition_size in the "
                "file, --gpus or --gpus-per-node."
            )
        # partitions within nodes are of use where there are several
        if not request.zero and zero.node_partition > 1 and not (whole and cluster.nodes > 1):
            continue
        engines = [request.teacher]
        if request.teacher == "auto":
            engines = ["replicated", "zero3"] if zero.stage == 3 else ["replicated"]
        for teacher, offload, size, again in product(engines, (False, True), sizes, recompute):
            if share % size == 0 and (teacher == "zero3" or not offload):
                cut = (size, request.length, share // size)
                yield Layout(shape, cluster, zero, teacher, *cut, offload, again, *fixed)


# ---- what does not fit ----


def _too_big(request: Request, least: Layout) -> str:
    cluster, need = least.cluster, least.total / GIB
    parts = sorted(least.memory.items(), key=lambda part: -part[1])[:2]
    largest = " and ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in parts)
    recomputed = ", activations recomputed" if least.checkpointing else ""
    found = [*_remedies(least.shape, cluster, request), f"--gpu-memory {int(need) + 1}"]
    return (
        f"{least.shape.name} does not fit {cluster}: the leanest layout ({least.zero.name}, "
        f"teacher {least.teacher_name}, micro-batch {least.micro_batch}{recomputed}) needs "
        f"{need:.1f} GiB a GPU, most of it {largest} GiB. It fits with {' or '.join(found)}."
    )


def _remedies(shape: PairShape, cluster: Cluster, request: Request) -> Iterator[str]:
    """Flags that would make it fit, each tried by itself, of a kind the first that does."""
    doubled = (cluster.gpus * 2**n for n in range(1, MOST_GPUS.bit_length()))
    counts = [gpus for gpus in doubled if gpus <= min(MOST_GPUS, request.global_batch)]
    larger = [replace(cluster, gpus=n, per_node=max(cluster.per_node, min(n, 8))) for n in counts]
    lengths = [request.length // n for n in (2, 4) if request.length // n > shape.image_tokens + 64]
    for kind in (
        [(f"--gpus {where.gpus}", where, {}) for where in larger],
        [(f"--seq {length}", cluster, {"length": length}) for length in lengths],
        [("--lora 16", cluster, {"lora": 16})],
        [(f"another configuration than --zero {request.zero}", cluster, {"zero": None})],
        [("--micro-batch 1", cluster, {"micro_batch": 1})],
    ):
        for flag, where, changes in kind:
            with suppress(ValueError):  # the batch cannot be cut like that
                tried = layouts(shape, where, replace(request, **changes))
                if any(layout.fits for layout in tried):
                    yield flag
                    break


# ---- a plan told ----

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
    cluster, recomputed = chosen.cluster, ", activations recomputed" if chosen.checkpointing else ""
    return (
        f"{chosen.shape.name} on {cluster} ({cluster.nodes} node{'s' if cluster.nodes > 1 else ''})"
        f": it fits, {chosen.total / GIB:.1f} GiB a GPU, with ds_configs/{chosen.zero.name}.json, "
        f"teacher {chosen.teacher_name}, {chosen.micro_batch} rows a GPU{recomputed}"
        f"{f', LoRA rank {chosen.lora}' if chosen.lora else ''}."
    )


def tables(plan: Plan) -> list[Table]:
    """Memory of a GPU, transfers of a step, the run, and the layouts that fit."""
    chosen, found = plan.chosen, plan.chosen.transfers
    memory = [(_PARTS[name], _gib(size)) for name, size in chosen.memory.items()]
    memory += [("total", _gib(chosen.total)), ("card", f"{chosen.cluster.memory:.1f}")]
    if chosen.host_memory:
        memory.append(("CPU memory of a node", _gib(chosen.host_memory)))
    moved = [(t.what, t.where, f"{t.bytes / 1e9:.2f}", f"{t.seconds:.3f}") for t in found]
    total = sum(transfer.bytes for transfer in found) / 1e9
    moved.append(("together", "", f"{total:.2f}", f"{chosen.network:.3f}"))
    moved.append(("compute, for comparison", "", "", f"{chosen.compute:.3f}"))
    fitting = []
    for layout in [chosen, *plan.others][:8]:
        zero = layout.zero.name + (" ←" if layout is chosen else "")
        how = (str(layout.micro_batch), "yes" if layout.checkpointing else "no")
        seconds = (f"{layout.compute:.2f}", f"{layout.network:.2f}")
        fitting.append((zero, layout.teacher_name, *how, _gib(layout.total), *seconds))
    columns = ("ds_config", "teacher", "rows", "recompute", "GiB", "compute s", "transfers s")
    return [
        Table("memory of a GPU", ("part", "GiB"), memory),
        Table("transfers of one step, per GPU", ("what", "over", "GB", "seconds"), moved),
        _run(plan),
        Table("layouts that fit", columns, fitting),
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
        # LLaVA-1.5's own for adapters; a recipe's rate is that of full training, too low for them
        "decoder_lr": "2e-4" if chosen.lora and "decoder_lr" not in values else None,
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
