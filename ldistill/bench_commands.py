"""The `ldistill bench` command: what a training step costs.

ldistill bench step --pair tiny --plot step.png
ldistill bench step --pair nanovlm-460m --rows 8 --csv step.csv
ldistill bench kernels attention --device cpu
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure time, throughput and memory.", no_args_is_help=True)


@app.command()
def step(
    pair: Annotated[
        str,
        typer.Option(
            help="Shapes: tiny, nanovlm-460m, smolvlm-256m, smolvlm-500m, llava-7b, llava-13b."
        ),
    ] = "tiny",
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this file.")] = None,
    rows: Annotated[
        int | None, typer.Option(help="Packed rows a step. Default: the recipe's; 1 on a CPU.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a row. Default: the recipe's.")] = None,
    steps: Annotated[int, typer.Option(help="Measured steps of each mode.", min=1)] = 10,
    warmup: Annotated[int, typer.Option(help="Steps before that.", min=0)] = 2,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if any.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32. Default: bf16 on a GPU, else fp32.")
    ] = None,
    kernels: Annotated[str, typer.Option(help="auto, triton or reference.")] = "auto",
    attention: Annotated[
        str,
        typer.Option(
            help="Student: sdpa, flash_attention_2, flex_attention, eager; auto: the fastest here."
        ),
    ] = "auto",
    mix: Annotated[
        str, typer.Option(help="paper: language sources distil; uniform: all do.")
    ] = "paper",
    modes: Annotated[str, typer.Option(help="ce, naive, ours, by commas.")] = "ce,naive,ours",
    memory: Annotated[bool, typer.Option(help="Also measure peak memory.")] = True,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also time compiled decoder blocks.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute the decoder's activations.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw where the time goes into this PNG.")
    ] = None,
) -> None:
    """One training step with random weights: labels alone, naive distillation, ours."""
    from rich.console import Console

    from ldistill.bench_options import StepOptions
    from ldistill.bench_profile import draw_profile
    from ldistill.bench_report import (
        append_csv,
        compile_lines,
        describe,
        parts_table,
        step_table,
    )
    from ldistill.bench_step import measure_step

    console = Console(width=None if sys.stdout.isatty() else 140)
    options = StepOptions.resolve(
        pair=pair,
        rows=rows,
        length=length,
        steps=steps,
        warmup=warmup,
        device=device,
        dtype=dtype,
        kernels=kernels,
        attention=attention,
        mix=mix,
        modes=tuple(part.strip() for part in modes.split(",") if part.strip()),
        memory=memory,
        compile=compile,
        checkpointing=checkpointing,
    )
    console.print(describe(options), highlight=False)
    results = measure_step(options, lambda text: console.print(text, highlight=False))
    console.print(step_table(results))
    console.print(parts_table(results))
    for line in compile_lines(results):
        console.print(line, highlight=False)
    if plot:
        draw_profile(results, describe(results[0].options), plot)
        console.print(f"where the time goes: {plot}", highlight=False)
    if csv:
        append_csv(csv, results)
        console.print(f"rows appended to {csv}", highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def kernels(
    context: typer.Context,
    which: Annotated[str, typer.Argument(help="attention or loss; their flags follow.")],
) -> None:
    """The kernels against what one would use instead (kernels/benchmarks; needs the repository)."""
    import subprocess

    import ldistill_kernels

    if which not in ("attention", "loss"):
        raise typer.BadParameter(f"attention or loss, not {which!r}")
    script = Path(ldistill_kernels.__file__).parents[1] / "benchmarks" / f"{which}.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"{script} is not there: the benchmarks come with the repository, not with the "
            "package. Clone it and `pip install -e .` there."
        )
    command = [sys.executable, str(script), *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
