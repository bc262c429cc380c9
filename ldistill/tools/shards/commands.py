"""The `ldistill shards` command: build, merge, verify, stats.

Exit codes: 0 done, 1 `verify` looked and something is wrong, 2 it could not run: wrong options or
input, with a sentence; 130 interrupted.

ldistill shards build --dataset HuggingFaceM4/the_cauldron --sources full --out shards/
ldistill shards verify shards/
ldistill shards stats s3://bucket/shards --plot lengths.png
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ldistill import sources as known_sources

app = typer.Typer(help="Build, check and describe shards of training data.", no_args_is_help=True)

DEFAULT_STUDENT = "lusxvr/nanoVLM-460M-8k"
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


@app.command()
def build(
    dataset: Annotated[
        str,
        typer.Option(
            help="Hub id, parquet file or folder, saved data set, JSON, or tars ('dir/*.tar')."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards; one folder per source.")],
    sources: Annotated[
        str | None, typer.Option(help="full, lang, or a,b,c. Default: all the data set has.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="auto, cauldron, finevision, llava or chat.")
    ] = "auto",
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
        Path | None, typer.Option(help="Folder of a JSON file's images. Default: the file's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace sources built before.")] = False,
    dry_run: Annotated[
        int,
        typer.Option(
            "--dry-run",
            "--dry_run",
            help="Build nothing: show so many samples of each source as the model will see them.",
            min=0,
        ),
    ] = 0,
    part: Annotated[
        str | None,
        typer.Option(
            "--slice", help="Build only part i of n of every source, as i/n; see `shards merge`."
        ),
    ] = None,
) -> None:
    """Build shards. Run the same command again to go on after an interruption."""
    with readable_errors():
        from ldistill.models.formats import load_processor
        from ldistill.tools.shards import work

        extra = known_sources.parse_extra(extra_sources)
        options = work.InputOptions(
            sources=tuple(known_sources.resolve_sources(sources, extra)) if sources else None,
            format=format,
            split=split,
            extra=extra,
            min_ratings=parse_ratings(min_rating or []),
            image_root=str(image_root) if image_root else None,
        )
        cutting = work.BuildOptions(
            split=split,
            shard_bytes=parse_size(shard_size),
            max_samples=max_samples,
            workers=workers or cpu_count(),
            overwrite=overwrite,
        )
        chosen = work.Slice.parse(part) if part else None
        inputs = work.open_inputs(dataset, options)
        processor = load_processor(student, tokenizer, tiling=tiling, max_images=max_images)
        if dry_run:
            page = out / "dry_run.html"
            work.preview(inputs, processor, dry_run, page)
            typer.echo(f"open {page}: the first {dry_run} samples of each source")
            return
        try:
            reports = work.build(inputs, out, processor, cutting, chosen)
        except work.SourcesFailed as failed:
            work.print_reports(failed.reports, out)
            raise
        work.print_reports(reports, out)
        if options.min_ratings:
            typer.echo(work.rated_out(reports, options.min_ratings))
        if chosen is None and (warning := work.over_long(out, reports)):
            typer.echo(warning)
        if extra and chosen is None:
            start = "deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json --recipe mine"
            typer.echo(f"train on all of them: {start} --shards {out}")


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="Folder of shards, built with --slice.")],
    sources: Annotated[str | None, typer.Option(help="a,b,c. Default: all.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace sources merged before.")] = False,
) -> None:
    """Join slices, built on any number of machines, to the shards that one would have built."""
    with readable_errors():
        from ldistill.tools.shards import work

        reports = work.join_slices(folder, _names(sources), overwrite=overwrite)
        if reports:
            work.print_reports(reports, folder)
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
        from ldistill.tools.shards import work

        reading = work.Reading(cache, cache_gb)
        report = work.verify(folder, _names(sources), workers or cpu_count(), reading)
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
    mix: Annotated[str | None, typer.Option(help="As a run's --mix: a=2,b=0.5,c=25%.")] = None,
    text_only: Annotated[
        bool, typer.Option(help="Leave image tokens out, as the paper's Table 5 does.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Save a histogram (PNG) here.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Shard cache of a URL. Default: in the user's cache folder.")
    ] = None,
    cache_gb: Annotated[float, typer.Option(help="The most it may take, in GB.")] = 64.0,
) -> None:
    """Token lengths by source, the share above the limit, and an epoch as a run would read it."""
    with readable_errors():
        from ldistill.tools.shards import work

        index = work.ShardIndex.load(folder, _names(sources), work.Reading(cache, cache_gb))
        work.print_stats(index, max_length, text_only)
        if plot:
            work.plot_lengths(index, plot, max_length, text_only)
            typer.echo(f"histogram: {plot}")
        work.print_epoch(index, max_length, mix)


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


def cpu_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # knows what a batch system granted; Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _names(sources: str | None) -> list[str] | None:
    return known_sources.split_names(sources) if sources else None
