"""The `ldistill plan` command: memory, layout, throughput of a pair on so many GPUs, computed.

ldistill plan --pair llava-13b --gpus 32 --gpu-memory 80
ldistill plan --pair nanovlm-460m --gpus 1 --gpu "RTX A6000" --mfu 0.35
"""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer


def plan(
    pair: Annotated[
        str,
        typer.Option(
            help="nanovlm-460m, smolvlm-256m, smolvlm-500m, llava-7b, llava-13b, tiny; a recipe; "
            "or a student's folder."
        ),
    ],
    gpus: Annotated[int, typer.Option(help="GPUs of all nodes together.")] = 1,
    gpu: Annotated[
        str, typer.Option(help="Card: gives memory, peak rate and link where not said.")
    ] = "H100",
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of a card.")] = None,
    device_tflops: Annotated[
        float | None, typer.Option(help="Dense bf16 peak of a card, TFLOP/s.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Default: 8, or all there are.")] = None,
    gpu_link: Annotated[
        float | None, typer.Option(help="GB/s between the cards of a node, one direction.")
    ] = None,
    node_link: Annotated[
        float, typer.Option(help="GB/s into a node over its network, one direction (400 Gb/s: 50).")
    ] = 50.0,
    mfu: Annotated[float, typer.Option(help="Model FLOPs utilisation to reckon with.")] = 0.4,
    seq: Annotated[int | None, typer.Option(help="Tokens of a packed row.")] = None,
    global_batch: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows a GPU runs at once.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run.")] = None,
    teacher_engine: Annotated[
        str, typer.Option(help="auto, replicated, zero3, deepspeed-inference, none.")
    ] = "auto",
    zero: Annotated[
        str | None, typer.Option(help="A file of ds_configs by name. Default: the best.")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations. Default: where it must be.")
    ] = None,
    attention: Annotated[
        str, typer.Option(help="sdpa, flash_attention_2, flex_attention or eager.")
    ] = "sdpa",
    mix: Annotated[
        str, typer.Option(help="paper: language sources distil; uniform: all do.")
    ] = "paper",
    lora: Annotated[int, typer.Option(help="Rank of adapters on the decoder; 0: none.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the plan to this file.")] = None,
) -> None:
    """Does a pair fit so many GPUs, laid out how, and what will a run take? Computed, not run."""
    from rich.console import Console

    from ldistill.models.shapes import pair_shape
    from ldistill.tools.plan.hardware import Cluster
    from ldistill.tools.plan.layouts import Request
    from ldistill.tools.plan.plan import make_plan
    from ldistill.tools.plan.report import as_dict, blocks, command, headline

    cluster = Cluster.of(
        gpus,
        gpu=gpu,
        per_node=gpus_per_node,
        memory=gpu_memory,
        tflops=device_tflops,
        gpu_link=gpu_link,
        node_link=node_link,
    )
    request = Request(
        length=seq,
        global_batch=global_batch,
        steps=steps,
        micro_batch=micro_batch,
        mfu=mfu,
        teacher=teacher_engine,
        zero=zero,
        checkpointing=checkpointing,
        attention=attention,
        mix=mix,
        lora=lora,
    )
    made = make_plan(pair_shape(pair), cluster, request)
    if json is not None:
        json.write_text(json_module.dumps(as_dict(made), indent=2), encoding="utf-8")
    if markdown:
        tables = "\n\n".join(block.markdown() for block in blocks(made))
        typer.echo(f"{headline(made)}\n\n{tables}\n\n```\n{command(made)}\n```")
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(headline(made), highlight=False)
    for block in blocks(made):
        console.print(block.rich())
    console.print(command(made), highlight=False, soft_wrap=True)
