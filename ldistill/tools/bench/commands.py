"""The `ldistill bench` command: what a training step costs, and what its data cost.

ldistill bench step --plot step.png
ldistill bench data shards/ --workers 0,2,4,8 --csv data.csv
ldistill bench step --pair nanovlm-460m --rows 8 --csv step.csv
ldistill bench kernels attention --device cpu
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from ldistill.sources import split_names

app = typer.Typer(help="Measure time, throughput and memory.", no_args_is_help=True)

MODES, STUDENT = "ce,naive,ours", "lusxvr/nanoVLM-460M-8k"
WIDTH = 140  # of tables where there is no terminal
LOADERS = "ours,ours-packed,webdataset,datasets"
Attention = Literal["auto", "sdpa", "flash_attention_2", "varlen", "flex_attention", "eager"]
DType, Mix = Literal["bf16", "fp16", "fp32"], Literal["paper", "uniform"]
Kernels = Literal["auto", "triton", "reference"]
CSV = Annotated[Path | None, Option(help="Append the rows to this file.")]
Count = int | None


def _split(text: str, what: str, known: str = "") -> list[str]:
    """What stands between commas: some of the known names, or numbers."""
    found = split_names(text)
    good = set(found) <= set(known.split(",")) if known else all(map(str.isdecimal, found))
    if not (found and good):
        rule = f"among {known}" if known else "numbers from 0, by commas"
        raise typer.BadParameter(f"{what} must be {rule}, got {text!r}.")
    return found


@app.command("step")
def step_command(
    pair: Annotated[str | None, Option(help="Or a recipe. Default: the embedded one.")] = None,
    csv: CSV = None,
    rows: Annotated[Count, Option(min=1, help="Default: the recipe's; 1 on a CPU.")] = None,
    length: Annotated[Count, Option(min=1, help="Tokens a row. Default: the recipe's.")] = None,
    steps: Annotated[int, Option(min=1, help="Measured steps of each mode.")] = 10,
    warmup: Annotated[int, Option(min=0, help="Steps before that.")] = 2,
    device: Annotated[Literal["cpu", "cuda"] | None, Option(help="Default: cuda if any.")] = None,
    dtype: Annotated[DType | None, Option(help="Default: bf16 on a GPU, else fp32.")] = None,
    kernels: Annotated[Kernels, Option(help="Of attention and loss.")] = "auto",
    attention: Annotated[Attention, Option(help="Student. auto: the fastest here.")] = "auto",
    mix: Annotated[Mix, Option(help="paper: language sources distil; uniform: all do.")] = "paper",
    modes: Annotated[str, Option(help=f"{MODES}, by commas.")] = MODES,
    memory: Annotated[bool, Option(help="Also measure peak memory.")] = True,
    compile: Annotated[bool, Option("--compile", help="Also time compiled blocks.")] = False,
    checkpointing: Annotated[bool, Option("--checkpointing", help="Recompute.")] = False,
    plot: Annotated[Path | None, Option(help="Draw where the time goes into this PNG.")] = None,
) -> None:
    """One training step with random weights: labels alone, naive distillation, ours."""
    from ldistill.tools.bench import report, step

    chosen = tuple(_split(modes, "modes", MODES))
    sizes = (pair, rows, length, steps, warmup)
    how = (device, dtype, kernels, attention, mix, chosen, memory, compile, checkpointing)
    options = step.StepOptions(*sizes, *how)
    typer.echo(str(options))
    results = step.measure_step(options, typer.echo)
    for table in report.step_tables(results):
        table.print(WIDTH)
    for row in results:
        if gain := row["compile_gain"]:
            typer.echo(f"{row['mode']}: {gain:.2f} × as fast as with eager blocks")
    if plot:
        measured = replace(options, attention=results[0]["attention"])
        report.draw_profile(results, str(measured), plot)
        typer.echo(f"where the time goes: {plot}")
    if csv:
        report.append_csv(csv, results, ("ldistill", "torch", "transformers", "triton"))
        typer.echo(f"rows appended to {csv}")


@app.command("data")
def data_command(
    shards: Annotated[str, typer.Argument(help="Folder of shards; a URL for our own loader.")],
    student: Annotated[str, Option(help="Built for: a checkpoint, or a recipe.")] = STUDENT,
    tokenizer: Annotated[str | None, Option(help="Default: the student's.")] = None,
    sources: Annotated[str | None, Option(help="a,b,c. Default: all.")] = None,
    workers: Annotated[str, Option(help="Numbers of workers, by commas.")] = "0,2,4,8",
    loaders: Annotated[str, Option(help=f"{LOADERS}, by commas.")] = LOADERS,
    batch: Annotated[int, Option(help="Documents a batch.", min=1)] = 16,
    max_length: Annotated[int, Option(help="Length limit in tokens.", min=2)] = 1024,
    buffer: Annotated[int, Option(help="Samples that the others shuffle among.", min=1)] = 1000,
    seconds: Annotated[float, Option(help="Of each measurement.", min=0.1)] = 10.0,
    rounds: Annotated[int, Option(help="Interleaved measurements of each.", min=1)] = 3,
    grow: Annotated[str | None, Option(help="Also memory with shards 1,10,100 times.")] = None,
    csv: CSV = None,
    plot: Annotated[Path | None, Option(help="Save memory over samples (PNG).")] = None,
) -> None:
    """Samples/s and memory of our loader, webdataset and datasets on the same shards."""
    from ldistill.tools.bench import data, report

    how = {"loaders": _split(loaders, "loaders", LOADERS), "seconds": seconds, "say": typer.echo}
    counts = [int(count) for count in _split(workers, "workers")]
    factors = [int(factor) for factor in _split(grow, "grow")] if grow else []
    chosen = split_names(sources) if sources else None
    setup = data.open_setup(shards, student, tokenizer, chosen, batch, max_length, buffer)
    index, size = setup.index, sum(shard.bytes for shard in setup.index.shards) / 1e6
    typer.echo(
        f"{len(index):,} samples in {len(index.shards)} shards ({size:,.1f} MB), batches of "
        f"{batch}, {rounds} rounds of {seconds:g} s on {report.device_name('cpu')}"
    )
    results = data.bench_data(setup, workers=counts, rounds=rounds, **how)
    report.table("loaders", results, report.SPEED, left=1).print(WIDTH)
    if factors:
        growth = data.bench_growth(setup, factors=factors, **how)
        title = "memory of one worker as shards grow"
        report.table(title, growth, report.GROWTH).print(WIDTH)
        if plot:
            report.draw_growth(growth, plot)
            typer.echo(f"memory over samples: {plot}")
        results += growth
    if csv:
        rows = [row | {"seconds": seconds} for row in results]
        report.append_csv(csv, rows, ("ldistill", "torch", "webdataset", "datasets"))
        typer.echo(f"rows appended to {csv}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def kernels(
    context: typer.Context,
    which: Annotated[Literal["attention", "loss"], typer.Argument(help="Their flags follow.")],
) -> None:
    """The kernels against what one would use instead; `-- --help` lists a benchmark's own flags."""
    script = Path(find_spec("ldistill_kernels").origin).parent / "benchmarks" / f"{which}.py"
    sys.exit(subprocess.call([sys.executable, str(script), *context.args]))
