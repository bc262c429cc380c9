"""Fill the tables of docs/scaling.md from the planner's own functions and draw docs/scaling.svg.

python docs/make_scaling.py

Every table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; a test holds the page
against what this file computes.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from ldistill.models.shapes import PairShape, pair_shape
from ldistill.tools.plan.hardware import GIB, ZEROS, Cluster, Strategy
from ldistill.tools.plan.layouts import Request
from ldistill.tools.plan.memory import memory
from ldistill.tools.plan.network import HOST, NODE, WORLD, network_seconds, transfers
from ldistill.tools.plan.plan import Plan, make_plan
from ldistill.tools.plan.report import Block

HERE = Path(__file__).resolve().parent
# GB/s into a node and what people call it.
LINKS = {12.5: "100 Gb/s", 50.0: "400 Gb/s", 400.0: "3200 Gb/s"}
PAIRS = ("nanovlm-460m", "smolvlm-500m", "llava-7b", "llava-13b")
shape_of = cache(pair_shape)


def machines() -> list[tuple[str, Cluster]]:
    """From one card to hundreds."""
    return [
        ("1 × RTX 4090, 24 GiB", Cluster.of(1, gpu="RTX 4090")),
        ("1 × RTX A6000, 48 GiB", Cluster.of(1, gpu="RTX A6000")),
        ("1 × H100, 80 GiB", Cluster.of(1)),
        ("8 × A100, 80 GiB", Cluster.of(8, gpu="A100")),
        ("8 × H100, 80 GiB", Cluster.of(8)),
        ("32 × H100", Cluster.of(32)),
        ("128 × H100", Cluster.of(128)),
    ]


def overview() -> Block:
    """What each pair does on each machine."""
    rows = []
    for label, cluster in machines():
        for pair in PAIRS:
            plan = _plan(shape_of(pair), cluster, Request())
            rows.append((label, pair, *_cells(plan)))
    columns = ("machine", "pair", "ds_config", "teacher", "rows a GPU", "GiB a GPU",
               "CPU GiB a node", "tokens/s", "GPU-hours")  # fmt: skip
    return Block("", columns, rows)


def lora() -> Block:
    """The big pairs on one or two cards."""
    rows = []
    for pair in ("llava-7b", "llava-13b"):
        for label, cluster in machines()[1:3]:
            plan = _plan(shape_of(pair), cluster, Request(lora=16))
            rows.append((pair, label, *_cells(plan)))
    columns = ("pair", "machine", "ds_config", "teacher", "rows a GPU", "GiB a GPU",
               "CPU GiB a node", "tokens/s", "GPU-hours")  # fmt: skip
    return Block("", columns, rows)


def _plan(shape: PairShape, cluster: Cluster, request: Request) -> Plan | None:
    try:
        return make_plan(shape, cluster, request)
    except ValueError:
        return None


def _cells(plan: Plan | None) -> tuple[str, ...]:
    if plan is None:
        return ("does not fit", "", "", "", "", "", "")
    chosen, strategy = plan.chosen, plan.chosen.strategy
    micro = f"{strategy.micro_batch}{', recomputed' if strategy.checkpointing else ''}"
    speed = f"{plan.tokens_per_s:,.0f} – {plan.tokens_per_s_exposed:,.0f}"
    hours = f"{plan.gpu_hours:,.1f} – {plan.gpu_hours_exposed:,.1f}"
    if not chosen.transfers or chosen.network < 0.005 * chosen.compute:
        speed, hours = f"{plan.tokens_per_s:,.0f}", f"{plan.gpu_hours:,.1f}"
    return (
        strategy.zero.name,
        strategy.teacher_name,
        micro,
        f"{chosen.memory.total / GIB:.0f}",
        f"{chosen.memory.host / GIB:.0f}" if chosen.memory.host else "",
        speed,
        hours,
    )


def sharded() -> Block:
    """Model states of one GPU under every configuration."""
    shape, cluster = shape_of("llava-13b"), Cluster.of(32)
    rows = []
    for zero in ZEROS.values():
        for teacher in ("replicated", "zero3"):
            if teacher == "zero3" and zero.stage < 3:
                continue
            found = memory(shape, cluster, Strategy(zero, teacher, 1, checkpointing=True), 2048)
            sizes = (found.weights, found.gradients, found.optimizer, found.teacher, found.buffers)
            rows.append((zero.name, teacher, *(f"{size / GIB:.1f}" for size in sizes),
                         f"{found.host / GIB:.0f}"))  # fmt: skip
    columns = ("ds_config", "teacher engine", "weights", "gradients", "AdamW", "teacher",
               "buffers", "CPU memory of a node")  # fmt: skip
    return Block("", columns, rows)


def network() -> Block:
    """What one GPU receives in a step, and how long that takes on three networks."""
    shape, rows = shape_of("llava-13b"), []
    for zero in ZEROS.values():
        if zero.offload_optimizer:
            continue
        for teacher in ("replicated", "zero3"):
            if teacher == "zero3" and zero.stage < 3:
                continue
            for accumulation in (1, 4):
                strategy = Strategy(zero, teacher, 4)
                found = transfers(shape, Cluster.of(32), strategy, accumulation)
                moved = [
                    sum(t.bytes for t in found if t.where == where) / 1e9 for where in (WORLD, NODE)
                ]
                times = [
                    network_seconds(
                        transfers(shape, Cluster.of(32, node_link=link), strategy, accumulation)
                    )
                    for link in LINKS
                ]
                rows.append(
                    (
                        zero.name,
                        teacher,
                        str(accumulation),
                        *(f"{size:.0f}" for size in moved),
                        *(f"{seconds:.2f}" for seconds in times),
                    )
                )
    columns = ("ds_config", "teacher", "micro-batches", "GB, all GPUs", "GB, within nodes",
               *(f"s at {name}" for name in LINKS.values()))  # fmt: skip
    return Block("", columns, rows)


def host() -> Block:
    """What passes between a GPU and CPU memory where something is offloaded."""
    shape, rows = shape_of("llava-13b"), []
    for name, teacher, offload in (
        ("zero2_offload", "replicated", False),
        ("zero3_offload", "replicated", False),
        ("zero3_offload", "zero3", True),
        ("zero3", "zero3", True),
    ):
        strategy = Strategy(ZEROS[name], teacher, 4, teacher_offload=offload)
        for gpus in (8, 32):
            found = [t for t in transfers(shape, Cluster.of(gpus), strategy, 4) if t.where == HOST]
            size, seconds = sum(t.bytes for t in found) / 1e9, sum(t.seconds for t in found)
            rows.append((name, strategy.teacher_name, str(gpus), f"{size:.1f}", f"{seconds:.2f}"))
    columns = ("ds_config", "teacher", "GPUs", "GB a GPU and step", "seconds")
    return Block("", columns, rows)


def strong() -> Block:
    """The same 128 rows a step on more and more GPUs."""
    rows = []
    for pair in ("nanovlm-460m", "llava-7b", "llava-13b"):
        for gpus in (8, 16, 32, 64, 128):
            plan = _plan(shape_of(pair), Cluster.of(gpus), Request())
            if plan is None:
                rows.append((pair, str(gpus), "does not fit", "", "", "", ""))
                continue
            chosen = plan.chosen
            rows.append(
                (
                    pair,
                    str(gpus),
                    chosen.strategy.zero.name,
                    f"{chosen.compute:.2f}",
                    f"{chosen.network:.2f}",
                    f"{plan.tokens_per_s / 1e3:,.0f} – {plan.tokens_per_s_exposed / 1e3:,.0f}",
                    f"{efficiency(plan):.0%}",
                )
            )
    columns = ("pair", "GPUs", "ds_config", "compute s", "transfers s", "1000 tokens/s",
               "compute / step")  # fmt: skip
    return Block("", columns, rows)


def efficiency(plan: Plan) -> float:
    """Share of a step that is compute when transfers hide behind nothing."""
    return plan.chosen.compute / plan.chosen.seconds_exposed


def enough_rows() -> Block:
    """Rows a GPU must take in a step for its compute to outlast the network, on 256 GPUs."""
    rows = []
    for pair in PAIRS:
        cells = []
        for link in LINKS:
            cells.append(_enough_rows(shape_of(pair), Cluster.of(256, node_link=link)))
        rows.append((pair, str(shape_of(pair).length), *cells))
    return Block("", ("pair", "tokens a row", *LINKS.values()), rows)


def _enough_rows(shape: PairShape, cluster: Cluster) -> str:
    for rows in (1, 2, 4, 8, 16, 32, 64, 128):
        plan = _plan(shape, cluster, Request(global_batch=rows * cluster.gpus))
        if plan is not None and plan.chosen.network <= plan.chosen.compute:
            return f"{rows} ({plan.chosen.strategy.zero.name})"
    return "more than 128"


TABLES = {
    "overview": overview,
    "lora": lora,
    "sharded": sharded,
    "network": network,
    "host": host,
    "strong": strong,
    "rows": enough_rows,
}


def filled(page: str) -> str:
    """The page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name]().markdown()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def draw(path: Path) -> None:
    """Share of a step that is compute, on more and more GPUs with 8 rows each."""
    import matplotlib

    matplotlib.use("Agg")
    # the same bytes every time; text as text
    matplotlib.rcParams |= {"svg.hashsalt": "ldistill", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    counts = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    for axes, (title, batch) in zip(
        panels,
        (
            ("8 rows a GPU: the batch grows with the machine", lambda gpus: 8 * gpus),
            ("512 rows in all: the batch stays", lambda gpus: 512),
        ),
    ):
        for pair, colour in zip(
            ("nanovlm-460m", "llava-7b", "llava-13b"), ("#355c7d", "#c06c84", "#d9a441")
        ):
            for link, style in zip((12.5, 50.0, 400.0), (":", "--", "-")):
                points = []
                for gpus in counts:
                    cluster = Cluster.of(gpus, node_link=link)
                    plan = _plan(shape_of(pair), cluster, Request(global_batch=batch(gpus)))
                    points.append(float("nan") if plan is None else efficiency(plan))
                label = pair if style == "-" else None
                axes.plot(counts, points, style, color=colour, label=label, linewidth=1.6)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(0, 1.05)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("H100s, 8 a node")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for style, name in zip((":", "--", "-"), LINKS.values()):
        panels[1].plot([], [], style, color="grey", label=f"{name} a node")
    panels[0].set_ylabel("compute / (compute + transfers)")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    page = HERE / "scaling.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(HERE / "scaling.svg")
