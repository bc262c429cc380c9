"""The `ldistill bench` command: what a training step costs, and what its data cost.

ldistill bench step --pair tiny --plot step.png
ldistill bench data shards/ --workers 0,2,4,8 --csv data.csv
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

    from ldistill.tools.bench.options import StepOptions
    from ldistill.tools.bench.profile import draw_profile
    from ldistill.tools.bench.report import (
        append_csv,
        compile_lines,
        describe,
        parts_table,
        step_table,
    )
    from ldistill.tools.bench.step import measure_step

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


@app.command()
def data(
    shards: Annotated[str, typer.Argument(help="Folder of shards; a URL for our own loader.")],
    student: Annotated[
        str, typer.Option(help="Checkpoint the shards were built for; tiny: the embedded one.")
    ] = "lusxvr/nanoVLM-460M-8k",
    tokenizer: Annotated[str | None, typer.Option(help="Default: the student's.")] = None,
    sources: Annotated[str | None, typer.Option(help="a,b,c. Default: all.")] = None,
    workers: Annotated[str, typer.Option(help="Numbers of workers, by commas.")] = "0,2,4,8",
    loaders: Annotated[
        str, typer.Option(help="ours, ours-packed, webdataset, datasets, by commas.")
    ] = "ours,ours-packed,webdataset,datasets",
    batch: Annotated[int, typer.Option(help="Documents a batch.", min=1)] = 16,
    max_length: Annotated[int, typer.Option(help="Length limit in tokens.", min=2)] = 1024,
    buffer: Annotated[
        int, typer.Option(help="Shuffle buffer of webdataset and datasets, samples.", min=1)
    ] = 1000,
    seconds: Annotated[float, typer.Option(help="Of each measurement.", min=0.1)] = 10.0,
    rounds: Annotated[int, typer.Option(help="Interleaved measurements of each.", min=1)] = 3,
    grow: Annotated[
        str | None,
        typer.Option(help="Also memory with the shards listed so many times: 1,10,100."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Save memory over samples (PNG).")] = None,
) -> None:
    """Samples/s and memory of our loader, webdataset and datasets on the same shards."""
    from rich.console import Console

    from ldistill.tools.bench.data import bench_data, bench_growth, open_setup
    from ldistill.tools.bench.data_report import csv_rows, growth_table, plot_growth, speed_table
    from ldistill.tools.bench.report import append_rows, device_name

    console = Console(width=None if sys.stdout.isatty() else 140)
    setup = open_setup(
        shards,
        student,
        tokenizer,
        _split(sources),
        batch=batch,
        limit=max_length,
        buffer=buffer,
    )
    settings = {"batch": batch, "max_length": max_length, "buffer": buffer, "seconds": seconds}
    counts, names = tuple(map(int, _split(workers) or [])), tuple(_split(loaders) or [])
    index = setup.index
    size = sum(shard.bytes for shard in index.shards) / 1e6
    console.print(
        f"{len(index):,} samples in {len(index.shards)} shards ({size:,.1f} MB), batches of "
        f"{batch}, {rounds} rounds of {seconds:g} s on {device_name('cpu')}",
        highlight=False,
    )

    def tell(text: str) -> None:
        console.print(text, highlight=False)

    results = bench_data(
        setup, loaders=names, workers=counts, seconds=seconds, rounds=rounds, tell=tell
    )
    console.print(speed_table(results))
    if grow:
        factors = tuple(map(int, _split(grow) or []))
        growth = bench_growth(setup, loaders=names, factors=factors, seconds=seconds, tell=tell)
        console.print(growth_table(growth))
        if plot:
            plot_growth(growth, plot)
            tell(f"memory over samples: {plot}")
        results += growth
    if csv:
        append_rows(csv, csv_rows(results, settings))
        tell(f"rows appended to {csv}")


def _split(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


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
