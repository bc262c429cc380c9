"""The `ldistill shards` command: build, merge, verify, stats.

Exit codes: 0 done, 1 `verify` looked and something is wrong, 2 it could not run: wrong options or
input, with a sentence; 130 interrupted.

ldistill shards build --dataset HuggingFaceM4/the_cauldron --sources full --out shards/
ldistill shards verify shards/
ldistill shards stats s3://bucket/shards --plot lengths.png
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ldistill.data.build.build_types import BuildOptions, SourceInput, SourceReport
    from ldistill.data.build.slices import Slice
    from ldistill.data.build.stats import SourceStats
    from ldistill.models.processor import Processor

app = typer.Typer(help="Build, check and describe shards of training data.", no_args_is_help=True)

DEFAULT_STUDENT = "lusxvr/nanoVLM-460M-8k"
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


@app.command()
def build(
    dataset: Annotated[
        str, typer.Option(help="Hub id, parquet file or folder, saved data set, or LLaVA JSON.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards; one folder per source.")],
    sources: Annotated[
        str | None, typer.Option(help="full, lang, or a,b,c. Default: all the data set has.")
    ] = None,
    format: Annotated[str, typer.Option(help="auto, cauldron, finevision or llava.")] = "auto",
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    student: Annotated[
        str, typer.Option(help="Checkpoint whose tokenizer and image settings count.")
    ] = DEFAULT_STUDENT,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer, if not the one the student names.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core.", min=0)] = 0,
    shard_size: Annotated[str, typer.Option(help="Bytes per shard, such as 256MB.")] = "256MB",
    max_samples: Annotated[
        int | None, typer.Option(help="Stop a source after this many samples.", min=1)
    ] = None,
    extra_sources: Annotated[
        list[str] | None,
        typer.Option(
            "--extra-sources",
            "--extra_sources",
            help="Declare a source beyond the 17: name=language or name=document.",
        ),
    ] = None,
    min_rating: Annotated[
        list[str] | None,
        typer.Option(help="Lowest rating to keep, such as relevance=3 (FineVision)."),
    ] = None,
    max_images: Annotated[int, typer.Option(help="Most pictures per sample.", min=1)] = 1,
    tiling: Annotated[bool, typer.Option(help="Cut pictures into tiles.")] = False,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of a LLaVA file's images. Default: the file's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace sources built before.")] = False,
    part: Annotated[
        str | None,
        typer.Option(
            "--slice", help="Build only part i of n of every source, as i/n; see `shards merge`."
        ),
    ] = None,
) -> None:
    """Build shards. Run the same command again to go on after an interruption."""
    with readable_errors():
        from ldistill import sources as known_sources
        from ldistill.data.build.build_types import BuildOptions
        from ldistill.data.build.inputs import open_inputs
        from ldistill.data.build.options import InputOptions
        from ldistill.data.build.slices import Slice
        from ldistill.models.formats import load_processor

        extra = known_sources.parse_extra(extra_sources or [])
        wanted = tuple(known_sources.resolve_sources(sources, extra)) if sources else None
        options = InputOptions(
            sources=wanted,
            format=format,
            split=split,
            extra=extra,
            min_ratings=parse_ratings(min_rating or []),
            image_root=str(image_root) if image_root else None,
        )
        cutting = BuildOptions(
            split=split,
            shard_bytes=parse_size(shard_size),
            max_samples=max_samples,
            workers=workers or cpu_count(),
            overwrite=overwrite,
        )
        chosen = Slice.parse(part) if part else None
        inputs = open_inputs(dataset, options)
        processor = load_processor(student, tokenizer, tiling=tiling, max_images=max_images)
        reports = _build_with_bar(inputs, out, processor, cutting, chosen)
        _print_reports(reports, out)
        if options.min_ratings:
            typer.echo(rated_out(reports, options.min_ratings))


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="Folder of shards, built with --slice.")],
    sources: Annotated[str | None, typer.Option(help="a,b,c. Default: all.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace sources merged before.")] = False,
) -> None:
    """Join slices, built on any number of machines, to the shards that one would have built."""
    with readable_errors():
        from ldistill.data.build.slices import join_slices

        reports = join_slices(folder, _chosen(sources), overwrite=overwrite)
        if reports:
            _print_reports(reports, folder)
        else:
            typer.echo(f"nothing to merge in {folder}: it is done")


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="Folder or URL of shards.")],
    sources: Annotated[str | None, typer.Option(help="a,b,c. Default: all.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core.", min=0)] = 0,
    cache: Annotated[
        str | None, typer.Option(help="Shard cache of a URL. Default: in the user's cache folder.")
    ] = None,
    cache_gb: Annotated[float, typer.Option(help="The most it may take, in GB.")] = 64.0,
) -> None:
    """Re-hash every shard, decode every sample; exit code 1: something is wrong, 2: no shards."""
    with readable_errors():
        from rich.progress import Progress

        from ldistill.data.build.verify import verify_shards
        from ldistill.data.index import ShardIndex
        from ldistill.data.store import Reading

        chosen, reading = _chosen(sources), Reading(cache, cache_gb)
        size = sum(shard.bytes for shard in ShardIndex.load(folder, chosen, reading).shards)
        with Progress() as bar:
            task = bar.add_task("verify", total=size)
            report = verify_shards(
                folder,
                chosen,
                workers or cpu_count(),
                lambda shard: bar.advance(task, shard.bytes),
                reading,
            )
    for problem in report.problems:
        typer.echo(problem, err=True)
    counts = f"{report.sources} sources, {report.shards} shards, {report.samples} samples"
    typer.echo(f"{counts}: {len(report.problems)} problems")
    if report.problems:
        raise typer.Exit(1)


@app.command()
def stats(
    folder: Annotated[str, typer.Argument(help="Folder or URL of shards.")],
    sources: Annotated[str | None, typer.Option(help="a,b,c. Default: all.")] = None,
    max_length: Annotated[int, typer.Option(help="Length limit in tokens.", min=2)] = 1024,
    text_only: Annotated[
        bool, typer.Option(help="Leave image tokens out, as the paper's Table 5 does.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Save a histogram (PNG) here.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Shard cache of a URL. Default: in the user's cache folder.")
    ] = None,
    cache_gb: Annotated[float, typer.Option(help="The most it may take, in GB.")] = 64.0,
) -> None:
    """Token lengths by source, the share above the limit, and how well documents pack."""
    with readable_errors():
        from ldistill.data.build.stats import plot_lengths, source_stats
        from ldistill.data.index import ShardIndex
        from ldistill.data.order import plan_summary
        from ldistill.data.store import Reading

        index = ShardIndex.load(folder, _chosen(sources), Reading(cache, cache_gb))
        _print_stats(source_stats(index, max_length, text_only), max_length)
        if plot:
            plot_lengths(index, plot, max_length, text_only)
            typer.echo(f"histogram: {plot}")
        try:
            packed = str(plan_summary(index, limit=max_length))
        except ValueError as error:  # a source without any document below the limit
            packed = str(error)
        typer.echo(f"at {max_length} tokens: {packed}")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn the errors meant for users into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to go on", err=True)
        raise typer.Exit(130) from None


def parse_size(text: str) -> int:
    """Bytes of a size such as 256MB, 1G or 4096. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"bad size {text!r}: write it like 256MB or 1GB")
    return int(float(match[1]) * UNITS[match[2]])


def parse_ratings(items: list[str]) -> dict[str, int]:
    """`["relevance=3"]` as a dict. Raises ValueError."""
    ratings = {}
    for item in items:
        name, _, value = item.partition("=")
        if not value.strip().isdigit():
            raise ValueError(f"bad rating {item!r}: write it like relevance=3")
        ratings[name.strip()] = int(value)
    return ratings


def rated_out(reports: list[SourceReport], minimum: dict[str, int]) -> str:
    """A sentence on what --min-rating left out."""
    from ldistill.data.build.readers import LOW_RATING

    asked = " ".join(f"{name}={least}" for name, least in minimum.items())
    turns = sum(report.turn_drops.get(LOW_RATING, 0) for report in reports)
    samples = {r.source: r.drops[LOW_RATING] for r in reports if r.drops.get(LOW_RATING)}
    if not turns and not samples:
        return f"--min-rating {asked} left nothing out."
    where = f" ({', '.join(f'{name} {count:,}' for name, count in samples.items())})"
    return (
        f"--min-rating {asked} left out turns rated lower: {turns:,}. Samples without another "
        f"turn, dropped with them: {sum(samples.values()):,}{where if samples else ''}."
    )


def cpu_count() -> int:
    """Cores this process may use."""
    import os

    if hasattr(os, "sched_getaffinity"):  # knows what a batch system granted; Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chosen(sources: str | None) -> list[str] | None:
    from ldistill.sources import split_names

    return split_names(sources) if sources else None


def _build_with_bar(
    inputs: list[SourceInput],
    out: Path,
    processor: Processor,
    options: BuildOptions,
    part: Slice | None,
) -> list[SourceReport]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ldistill.data.build.builder import build as build_sources
    from ldistill.data.build.slices import build_slice

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        tasks = {e.source: bar.add_task(e.source, total=e.length, start=False) for e in inputs}

        def advance(entry: SourceInput, rows: int) -> None:
            bar.start_task(tasks[entry.source])
            bar.advance(tasks[entry.source], rows)

        if part is not None:
            return build_slice(inputs, out, processor, options, part, advance)
        return build_sources(inputs, out, processor, options, advance)


def _print_reports(reports: list[SourceReport], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"shards in {out}")
    for name in ("source", "cat.", "samples", "shards", "MB", "dropped"):
        table.add_column(name, justify="left" if name in ("source", "cat.", "dropped") else "right")
    for report in reports:
        lost = [f"{count} {reason}" for reason, count in report.drops.items()]
        lost += [f"{count} turns: {reason}" for reason, count in report.turn_drops.items()]
        shards = f"{report.shards}" + (
            f" ({report.kept_shards} kept)" if report.kept_shards else ""
        )
        size = f"{report.bytes / 1e6:.1f}"
        row = (report.source, report.category, f"{report.samples:,}", shards, size)
        table.add_row(*row, "; ".join(lost) or "none")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _print_stats(lines: list[SourceStats], limit: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tokens per document")
    table.add_column("Source")
    table.add_column("Cat.")
    for name in ("Samples", "Mean", "Med.", "P95", "Max", f"%>{limit}"):
        table.add_column(name, justify="right")
    for line in lines:
        numbers = (line.mean, line.median, line.p95, line.max)
        shown = [f"{value:.0f}" for value in numbers]
        table.add_row(line.source, line.category, f"{line.samples:,}", *shown, f"{line.over:.1%}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
