"""Commands of `ldistill` without commands of their own; what they do is loaded when they run."""

from __future__ import annotations

import json as json_module
import shlex
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from ldistill.common.cards import CARDS
from ldistill.tools.plan.hardware import ZEROS, Cluster
from ldistill.tools.table import Table, print_tables

LEAST = 0.01  # of what must be above 0
Card, Config = Literal[tuple(CARDS)], Literal[tuple(ZEROS)]
Engine = Literal["auto", "none", "replicated", "zero3", "deepspeed-inference"]
Attention = Literal["sdpa", "flash_attention_2", "varlen", "flex_attention", "eager"]
Mix = Literal["paper", "uniform"]
Count, Rate, Text, File = int | None, float | None, str | None, Path | None
Names, Files = list[str] | None, list[Path] | None
Json = Annotated[File, Option("--json", help="Also write it to this file.")]
ZERO2 = "ds_configs/zero2.json"


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
    checkpointing: Annotated[bool | None, Option(help="Default: where it must be.")] = None,
    attention: Annotated[Attention, Option(help="Of the student.")] = "sdpa",
    mix: Annotated[Mix, Option(help="paper: language sources distil; uniform: all do.")] = "paper",
    lora: Annotated[int, Option(min=0, help="Rank of adapters on the decoder; 0: none.")] = 0,
    markdown: Annotated[bool, Option("--markdown", help="Print Markdown tables.")] = False,
    json: Json = None,
) -> None:
    """Does a pair fit so many GPUs, laid out how, and what will a run take? Computed, not run."""
    from ldistill.tools.pairs import pair_shape
    from ldistill.tools.plan import plan

    flops = device_tflops and device_tflops * 1e12
    card = {"memory": gpu_memory, "flops": flops, "gpu_link": gpu_link}
    cluster = Cluster.of(gpus, gpu, per_node=gpus_per_node, node_link=node_link, **card)
    sizes = (seq, global_batch, steps, micro_batch)
    how = (mfu, teacher_engine, zero, checkpointing, attention, mix, lora)
    made = plan.make_plan(pair_shape(pair), cluster, plan.Request(*sizes, *how))
    if json:
        json.write_text(json_module.dumps(plan.as_dict(made), indent=2), encoding="utf-8")
    command = plan.command(made)
    typer.echo(plan.headline(made.chosen) + ("\n" if markdown else ""))
    print_tables(plan.tables(made), markdown)
    typer.echo(f"\n```\n{command}\n```" if markdown else command)


def torture(
    steps: Annotated[int, Option(min=6, help="Optimizer steps of each run.")] = 12,
    kills: Annotated[int, Option(min=0, help="kill -9 at so many random moments.")] = 3,
    ranks: Annotated[int, Option(min=1, help="gloo ranks of each run, on the CPU.")] = 2,
    stage: Annotated[int, Option(min=1, max=3, help="ZeRO stage.")] = 2,
    fault: Annotated[Names, Option(help="Of the others only this one, or `none`; repeat.")] = None,
    seed: Annotated[int, Option(help="Of the random moments.")] = 0,
    workdir: Annotated[File, Option(help="Empty folder to keep runs and logs in.")] = None,
    json: Json = None,
) -> None:
    """Kill real tiny runs, fill their disk, break their shards: the losses must stay the same.

    Runs the embedded pair with DeepSpeed on CPU ranks. Exit status 1 when anything did not hold, 2
    when it could not be tried.
    """
    from ldistill.tools.torture import faults

    trials, began = faults.choose(fault or [], ranks), time.monotonic()
    tell, rows = partial(typer.secho, dim=True), []
    if ranks == 1 and not fault:
        tell(f"{faults.TEXT_ONLY} is left out: it takes several ranks to differ (--ranks 2).")
    if kills:
        trials.insert(0, faults.kills(kills, seed, tell))
    made = {"prefix": "ldistill-torture-", "ignore_cleanup_errors": True}
    with nullcontext(workdir) if workdir else tempfile.TemporaryDirectory(**made) as folder:
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise ValueError(f"{root} is not empty: choose an empty folder.")
        bench = faults.Bench(root, ranks=ranks, steps=steps, stage=stage)
        for trial in trials:
            rows.append(trial(bench))
            tell(f"{'held' if rows[-1]['passed'] else 'FAILED'}: {trial.title}")
    columns, marks = ("fault", "expected", "outcome"), ("[red]FAILED[/]", "[green]held[/]")
    lines = [[*(row[name] for name in columns), marks[row["passed"]]] for row in rows]
    title = f"{ranks} ranks, ZeRO-{stage}, {steps} steps"
    Table(title, (*columns, ""), lines, left=range(4)).print()
    passed, seconds = all(row["passed"] for row in rows), round(time.monotonic() - began, 1)
    record = {"steps": steps, "kills": kills, "ranks": ranks, "stage": stage, "seed": seed}
    record |= {"seconds": seconds, "passed": passed, "rows": rows}
    if json:
        json.write_text(json_module.dumps(record, indent=2), encoding="utf-8")
    raise typer.Exit(0 if passed else 1)


def study(
    context: typer.Context,
    name: Annotated[str, Argument(metavar="STUDY", help="tiny, table3, paper, or a YAML file.")],
    out: Annotated[Path, Option(help="Folder of the runs and the report.")] = Path("runs/study"),
    seeds: Annotated[Count, Option(min=1, help="Runs of every arm.")] = None,
    variant: Annotated[Names, Option(help="Only this arm; may be repeated.")] = None,
    items: Annotated[Count, Option(help="Held-out items per task.")] = None,
    report_to: Annotated[File, Option(help="Folder of the report; default --out.")] = None,
    shards: Annotated[Text, Option(help="Folder or URL of all arms' shards.")] = None,
    deepspeed: Annotated[str, Option(help="Configuration, of commands.")] = ZERO2,
    submit: Annotated[bool, Option(help="Submit to SLURM instead of printing.")] = False,
) -> None:
    """Train and evaluate every arm of a study from the same start; goes on where it stopped.

    tiny, table3: the paper in miniature, on whatever machine this is. paper: at its scale, prints
    every command or submits the jobs. A file: see docs/study.md. Further flags go to every training
    run: `--max_steps 100`.
    """
    from ldistill.tools.study import cluster, files, report, running

    asked = files.load_study(name, seeds=seeds, items_per_task=items)
    arms = asked.choose(variant or ())
    flags = [*(["--shards", shards] if shards else []), *context.args]
    if asked.launch == "commands":
        jobs = cluster.ClusterStudy(asked, out, arms, flags, deepspeed)
        for line in cluster.submit(jobs) if submit else cluster.commands(jobs):
            typer.echo(line)
        return
    place, command = running.Workplace(asked, out, flags), shlex.join(["ldistill", *sys.argv[1:]])
    problems = running.run_study(place, arms)
    written = report.write_report(place, problems, report_to or out, command)
    typer.echo(written[0].read_text(encoding="utf-8"))
    for file in written:
        typer.echo(f"written  {file}")
    raise typer.Exit(1 if problems else 0)


def models(
    families: Annotated[Names, Argument(help="Of the table; default: all.")] = None,
    check: Annotated[bool, Option("--check", help="Build each small and check it.")] = False,
    student: Annotated[Text, Option(help="Check this student, with --teacher, instead.")] = None,
    teacher: Annotated[Text, Option(help="The LM it was built on.")] = None,
    reduced: Annotated[bool, Option("--reduced", help="Of that pair small, random ones.")] = False,
    markdown: Annotated[bool, Option("--markdown", help="As it is in docs/models.md.")] = False,
) -> None:
    """The families that fit and why others do not; --check after every upgrade of transformers."""
    from ldistill.tools import models as zoo

    if (student is None) != (teacher is None) or (reduced and not student):
        raise ValueError("give --student and --teacher together, and --reduced only with them.")
    if student or check:
        names = ["the pair"] if student else zoo.asked_for(families)
        failed = [name for name in names if not zoo.passes(name, student, teacher, reduced)]
        but = f"; not {', '.join(failed)}" if failed else ""
        typer.echo(f"{len(names) - len(failed)} of {len(names)} hold{but}")
        raise typer.Exit(1 if failed else 0)
    tables = [zoo.families_table(zoo.asked_for(families))]
    tables += [] if families else [zoo.refused_table()]
    print_tables(tables, markdown)


def look(
    student: Annotated[str, Option(help="Student folder, hub id or run folder.")],
    prompt: Annotated[str, Option(help="The question.")],
    answer: Annotated[str, Option(help="The answer that both judge.")],
    teacher: Annotated[Text, Option(help="The LM. Default: that of the run.")] = None,
    image: Annotated[Files, Option(help="Picture; may be repeated.", exists=True)] = None,
    out: Annotated[Path, Option(help="The page.")] = Path("look.html"),
    temperature: Annotated[float, Option(min=LEAST, help="τ of the KL.")] = 1.0,
    top: Annotated[int, Option(min=1, help="Guesses of each.")] = 3,
    tokenizer: Annotated[Text, Option(help="Default: the configuration's.")] = None,
    tiling: Annotated[bool, Option(help="Cut large pictures into tiles.")] = False,
) -> None:
    """See what the teacher says beside the student, token by token: a heat map of KL, as a page."""
    from ldistill.tools.look import load_judges, look

    pictures = [path.read_bytes() for path in image or ()]
    options = {"tokenizer": tokenizer, "tiling": tiling, "max_images": max(1, len(pictures))}
    pair, teacher = load_judges(student, teacher, **options)
    seen = look(pair, prompt, answer, pictures, temperature=temperature, top=top)
    out.write_text(seen.page(f"{student} beside {teacher}"), encoding="utf-8")
    for line in seen.lines():
        typer.echo(line)
    typer.echo(f"mean KL {seen.kl:.3f} nats at τ = {temperature:g}; page: {out}")


def merge(
    student: Annotated[str, Option(help="Student folder or hub id, of any family.")],
    lm: Annotated[str, Option(help="The LM it was built on, or another of its shape.")],
    out: Annotated[Path, Option(help="Where to; with --weights a folder for each below.")],
    weight: Annotated[Text, Option(help="Of the LM, 0 to 1; FIRST:LAST grows with depth.")] = None,
    weights: Annotated[Text, Option(help="Several in one go: 0.1,0.2,0:0.5.")] = None,
    layers: Annotated[Text, Option(help="Only these, from 0, such as 0-3,8.")] = None,
) -> None:
    """Average a student's decoder with a language model: one weight, one a layer, or a sweep."""
    from ldistill.tools.merge import merge

    if (weight is None) == (weights is None):
        raise ValueError("give either --weight, for one model, or --weights, for one of each.")
    several = (weights or "").split(",")
    folders = {weight: out} if weight else {w: out / w.replace(":", "-") for w in several}
    merge(student, lm, folders, layers)
    for text, folder in folders.items():
        typer.echo(f"weight {text}  {folder}")
