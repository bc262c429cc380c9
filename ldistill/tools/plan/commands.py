"""The `ldistill plan` command: memory, layout, throughput of a pair on so many GPUs, computed.

ldistill plan --pair llava-13b --gpus 32 --gpu-memory 80
ldistill plan --pair nanovlm-460m --gpus 1 --gpu "RTX A6000" --mfu 0.35
"""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from typer import Option

from ldistill.common.cards import CARDS
from ldistill.tools.plan.hardware import ZEROS, Cluster

LEAST = 0.01  # of what must be above 0
Card, Config = Literal[tuple(CARDS)], Literal[tuple(ZEROS)]
Engine = Literal["auto", "none", "replicated", "zero3", "deepspeed-inference"]
Attention = Literal["sdpa", "flash_attention_2", "varlen", "flex_attention", "eager"]
Mix = Literal["paper", "uniform"]
Count, Rate = int | None, float | None


def plan(
    pair: Annotated[str, Option(help="nanovlm-460m, a recipe's name, or a student's folder.")],
    gpus: Annotated[int, Option(min=1, help="GPUs of all nodes together.")] = 1,
    gpu: Annotated[Card, Option(help="Gives memory, peak and link where not said.")] = "H100",
    gpu_memory: Annotated[Rate, Option(min=LEAST, help="GiB of a card.")] = None,
    device_tflops: Annotated[Rate, Option(min=LEAST, help="Dense bf16 peak of a card.")] = None,
    gpus_per_node: Annotated[Count, Option(min=1, help="Default: 8, or all there are.")] = None,
    gpu_link: Annotated[Rate, Option(min=LEAST, help="GB/s between a node's cards.")] = None,
    node_link: Annotated[float, Option(min=LEAST, help="GB/s into a node (400 Gb/s: 50).")] = 50.0,
    mfu: Annotated[float, Option(min=LEAST, max=1, help="Model FLOPs utilisation.")] = 0.4,
    seq: Annotated[Count, Option(min=1, help="Tokens of a packed row.")] = None,
    global_batch: Annotated[Count, Option(min=1, help="Rows of a step.")] = None,
    micro_batch: Annotated[Count, Option(min=1, help="Rows a GPU runs at once.")] = None,
    steps: Annotated[Count, Option(min=1, help="Steps of the run.")] = None,
    teacher_engine: Annotated[Engine, Option(help="none: labels alone.")] = "auto",
    zero: Annotated[Config | None, Option(help="Of ds_configs. Default: the best.")] = None,
    checkpointing: Annotated[
        bool | None, Option(help="Recompute activations. Default: where it must be.")
    ] = None,
    attention: Annotated[Attention, Option(help="Of the student.")] = "sdpa",
    mix: Annotated[Mix, Option(help="paper: language sources distil; uniform: all do.")] = "paper",
    lora: Annotated[int, Option(min=0, help="Rank of adapters on the decoder; 0: none.")] = 0,
    markdown: Annotated[bool, Option("--markdown", help="Print Markdown tables.")] = False,
    json: Annotated[Path | None, Option(help="Also write the plan to this file.")] = None,
) -> None:
    """Does a pair fit so many GPUs, laid out how, and what will a run take? Computed, not run."""
    from ldistill.tools.pairs import pair_shape
    from ldistill.tools.plan.plan import Request, make_plan
    from ldistill.tools.plan.report import as_dict, command, headline, tables

    flops = device_tflops and device_tflops * 1e12
    card = {"memory": gpu_memory, "flops": flops, "gpu_link": gpu_link}
    cluster = Cluster.of(gpus, gpu, per_node=gpus_per_node, node_link=node_link, **card)
    sizes = (seq, global_batch, steps, micro_batch)
    request = Request(*sizes, mfu, teacher_engine, zero, checkpointing, attention, mix, lora)
    made = make_plan(pair_shape(pair), cluster, request)
    if json is not None:
        json.write_text(json_module.dumps(as_dict(made), indent=2), encoding="utf-8")
    if markdown:
        text = "\n\n".join(table.markdown() for table in tables(made))
        typer.echo(f"{headline(made.chosen)}\n\n{text}\n\n```\n{command(made)}\n```")
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(headline(made.chosen), highlight=False)
    for table in tables(made):
        console.print(table.rich())
    console.print(command(made), highlight=False, soft_wrap=True)
