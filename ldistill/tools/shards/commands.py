"""The `ldistill shards` command: build, merge, verify, stats.

Exit codes: 0 done, 1 `verify` looked and something is wrong, 2 it could not run: wrong options or
input, with a sentence; 130 interrupted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich import progress
from typer import Argument, Option

from ldistill import sources as known_sources
from ldistill.data.build import build_types, builder
from ldistill.data.build.readers import LOW_RATING
from ldistill.data.build.slices import Slice, build_slice, join_slices
from ldistill.data.index import ShardIndex
from ldistill.data.store import Reading
from ldistill.tools.table import Table

app = typer.Typer(help="Build, check and describe shards of training data.", no_args_is_help=True)

STUDENT = "lusxvr/nanoVLM-460M-8k"
MAX_LENGTH = 1024  # tokens of a row, in a run that does not say otherwise
EXTRA, DRY_RUN = ("--extra-sources", "--extra_sources"), ("--dry-run", "--dry_run")
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}
Text, Names, File = str | None, list[str] | None, Path | None
Shards = Annotated[str, Argument(help="Folder or URL of shards.")]
Sources = Annotated[Text, Option(help="a,b,c. Default: all.")]
Workers = Annotated[int, Option(help="Processes; 0: one per core.", min=0)]
Cache = Annotated[Text, Option(help="Shard cache of a URL. Default: in the user's cache folder.")]
CacheSize = Annotated[float, Option(help="The most it may take, in GB.")]


@app.command()
def build(
    dataset: Annotated[str, Option(help="Hub id, parquet, saved data set, JSON, 'dir/*.tar'.")],
    out: Annotated[Path, Option(help="Folder for the shards; one folder per source.")],
    sources: Annotated[Text, Option(help="full, lang, or a,b,c. Default: all there are.")] = None,
    format: Annotated[str, Option(help="auto, cauldron, finevision, llava or chat.")] = "auto",
    split: Annotated[str, Option(help="Split of the data set.")] = "train",
    student: Annotated[str, Option(help="Its tokenizer and image settings count.")] = STUDENT,
    tokenizer: Annotated[Text, Option(help="Default: the one the student names.")] = None,
    workers: Workers = 0,
    shard_size: Annotated[str, Option(help="Bytes per shard, such as 256MB.")] = "256MB",
    max_samples: Annotated[int | None, Option(help="Most of a source.", min=1)] = None,
    extra_sources: Annotated[Names, Option(*EXTRA, help="name=language or name=document.")] = None,
    min_rating: Annotated[Names, Option(help="Such as relevance=3 (FineVision).")] = None,
    max_images: Annotated[int, Option(help="Most pictures per sample.", min=1)] = 1,
    tiling: Annotated[bool, Option(help="Cut pictures into tiles.")] = False,
    image_root: Annotated[File, Option(help="Of a JSON's images. Default: its folder.")] = None,
    overwrite: Annotated[bool, Option(help="Replace sources built before.")] = False,
    dry_run: Annotated[int, Option(*DRY_RUN, help="Only show so many of a source.", min=0)] = 0,
    part: Annotated[Text, Option("--slice", help="Only part i of n of every source: i/n.")] = None,
) -> None:
    """Build shards. Run the same command again to go on after an interruption."""
    from ldistill.data.build.inputs import open_inputs
    from ldistill.models.formats import load_processor
    from ldistill.tools.shards.preview import preview

    extra, ratings = known_sources.parse_extra(extra_sources), parse_ratings(min_rating or [])
    chosen = tuple(known_sources.resolve_sources(sources, extra)) if sources else None
    root = str(image_root) if image_root else None
    size, asked = parse_size(shard_size), Slice.parse(part) if part else None
    workers = workers or len(os.sched_getaffinity(0))
    options = build_types.BuildOptions(split, size, max_samples, workers, overwrite)
    wanted = build_types.InputOptions(chosen, format, split, extra, ratings, root)
    inputs = open_inputs(dataset, wanted)
    processor = load_processor(student, tokenizer, tiling=tiling, max_images=max_images)
    if dry_run:
        page = out / "dry_run.html"
        preview(inputs, processor, dry_run, page)
        typer.echo(f"open {page}: the first {dry_run} samples of each source")
        return
    name, counts = progress.TextColumn("{task.description}"), progress.MofNCompleteColumn()
    columns = (name, progress.BarColumn(), counts, progress.TimeRemainingColumn())
    try:
        with _resumable(), progress.Progress(*columns) as bar:
            tasks = {e.source: bar.add_task(e.source, total=e.length, start=False) for e in inputs}

            def advance(entry: build_types.SourceInput, rows: int) -> None:
                bar.start_task(tasks[entry.source])
                bar.advance(tasks[entry.source], rows)

            if asked:
                reports = build_slice(inputs, out, processor, options, asked, advance)
            else:
                reports = builder.build(inputs, out, processor, options, advance)
    except build_types.SourcesFailed as failed:
        print_reports(failed.reports, out)
        raise
    print_reports(reports, out)
    if ratings:
        _print_rated_out(reports, " ".join(f"{name}={least}" for name, least in ratings.items()))
    if asked is None:
        _print_over_long(ShardIndex.load(out, [report.source for report in reports]))
        if extra:
            start = "deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json --recipe mine"
            typer.echo(f"train on all of them: {start} --shards {out}")


@app.command()
def merge(
    folder: Annotated[Path, Argument(help="Folder of shards, built with --slice.")],
    sources: Sources = None,
    overwrite: Annotated[bool, Option(help="Replace sources merged before.")] = False,
) -> None:
    """Join slices, built on any number of machines, to the shards that one would have built."""
    with _resumable():
        reports = join_slices(folder, _names(sources), overwrite=overwrite)
    if reports:
        print_reports(reports, folder)
    else:
        typer.echo(f"nothing to merge in {folder}: it is done")


@app.command()
def verify(
    folder: Shards,
    sources: Sources = None,
    workers: Workers = 0,
    cache: Cache = None,
    cache_gb: CacheSize = 64.0,
) -> None:
    """Re-hash every shard, decode every sample; exit code 1: something is wrong, 2: no shards."""
    from ldistill.tools.shards.verify import verify_shards

    index = ShardIndex.load(folder, _names(sources), Reading(cache, cache_gb))
    checked = verify_shards(index, workers or len(os.sched_getaffinity(0)))
    parts = progress.track(checked, "verify", total=1 + len(index.shards))
    problems = [problem for part in parts for problem in part]
    for problem in problems:
        typer.echo(problem, err=True)
    counts = f"{len(index.sources)} sources, {len(index.shards)} shards, {len(index)} samples"
    typer.echo(f"{counts}: {len(problems)} problems")
    raise typer.Exit(1 if problems else 0)


@app.command()
def stats(
    folder: Shards,
    sources: Sources = None,
    max_length: Annotated[int, Option(help="Length limit in tokens.", min=2)] = MAX_LENGTH,
    mix: Annotated[Text, Option(help="As a run's --mix: a=2,b=0.5,c=25%.")] = None,
    text_only: Annotated[bool, Option(help="Without image tokens, as in Table 5.")] = False,
    plot: Annotated[File, Option(help="Save a histogram (PNG) here.")] = None,
    cache: Cache = None,
    cache_gb: CacheSize = 64.0,
) -> None:
    """Token lengths by source, the share above the limit, and an epoch as a run would read it."""
    from ldistill.tools.shards import stats

    index = ShardIndex.load(folder, _names(sources), Reading(cache, cache_gb))
    stats.print_stats(index, max_length, text_only)
    if plot:
        stats.plot_lengths(index, plot, max_length, text_only)
        typer.echo(f"histogram: {plot}")
    stats.print_epoch(index, max_length, mix)


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to go on", err=True)
        raise


def print_reports(reports: Sequence[build_types.SourceReport], out: Path) -> None:
    """What was built and dropped, a line a source."""
    lines = []
    for report in reports:
        lost = [f"{count} {reason}" for reason, count in report.drops.items()]
        lost += [f"{count} turns: {reason}" for reason, count in report.turn_drops.items()]
        kept = f" ({report.kept_shards} kept)" if report.kept_shards else ""
        counts = (f"{report.samples:,}", f"{report.shards}{kept}", f"{report.bytes / 1e6:.1f}")
        lines.append((report.source, report.category, *counts, "; ".join(lost) or "none"))
    columns = ("source", "cat.", "samples", "shards", "MB", "dropped")
    Table(f"shards in {out}", columns, lines, left=(0, 1, 5)).print()
    for report in reports:
        for reason, first in report.first_drops.items():
            typer.echo(f"{report.source}: {reason}: first in record {first}")


def _print_rated_out(reports: Sequence[build_types.SourceReport], asked: str) -> None:
    turns = sum(report.turn_drops.get(LOW_RATING, 0) for report in reports)
    samples = {r.source: r.drops[LOW_RATING] for r in reports if r.drops.get(LOW_RATING)}
    where = f" ({', '.join(f'{name} {count:,}' for name, count in samples.items())})"
    told = f"left out turns rated lower: {turns:,}. Samples without another turn, dropped with "
    told += f"them: {sum(samples.values()):,}{where if samples else ''}."
    typer.echo(f"--min-rating {asked} {told if turns or samples else 'left nothing out.'}")


def _print_over_long(index: ShardIndex) -> None:
    count, longest = int((index.lengths > MAX_LENGTH).sum()), int(index.lengths.argmax())
    if count:
        typer.echo(
            f"{count:,} documents are longer than {MAX_LENGTH:,} tokens, the longest "
            f"{index.locate(longest)[2]} with {index.lengths[longest]:,}. Training drops them, "
            "counted; --max_length of a run raises the limit, --on_long truncate cuts them there."
        )


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


def _names(sources: str | None) -> list[str] | None:
    return known_sources.split_names(sources) if sources else None
