"""The embedded default as typed, on every DeepSpeed configuration and several numbers of ranks.

Each cell is a whole run in small: evaluation before and after, two steps, export, table. Options
that change what a step does are spread over the cells so that every two of their values meet.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import pytest
from runs import REPO, launch
from safetensors import safe_open

from ldistill.checkpoint.logs import read_metrics
from ldistill.tiny.prepare import prepare

pytestmark = pytest.mark.slow
STEPS = 2
SHORT = ("--max_steps", f"{STEPS}", "--eval_limit", "2", "--logging_steps", "1")
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "type": {"fp32": (), "bf16": ("--bf16", "true")},
    "adapters": {"none": (), "lora": ("--lora_rank", "4")},
    "scope": {
        "full": (),
        "prompt": ("--kv_scope", "prompt"),
        "visual": ("--kv_scope", "visual"),
        "own": ("--kv_scope", "own"),
    },
    "trained": {"usual": (), "parts": ("--train", "vision,projector,attention")},
    "gradient": {"detached": (), "through": ("--kv_grad", "through")},
    "activations": {"kept": (), "checkpointed": ("--gradient_checkpointing", "true")},
    "suite": {"no": (), "tiny": ("--eval_suite", "tiny", "--eval_steps", f"{STEPS}")},
    "graph": {"eager": (), "compiled": ("--compile_blocks", "true")},
}
REFUSED = {("through", "checkpointed")}
"""The graph that the gradient needs is what checkpointing drops (test_recipe.py)."""


@dataclass(frozen=True)
class Cell:
    """One run; its options are those named, and the first value of all others."""

    config: str
    ranks: int
    named: str = ""

    def __str__(self) -> str:
        return " ".join(f"{self.config} {self.ranks} {self.named}".split())

    @property
    def values(self) -> dict[str, str]:
        names = set(self.named.split())
        return {
            option: next((v for v in values if v in names), next(iter(values)))
            for option, values in OPTIONS.items()
        }

    @property
    def arguments(self) -> list[str]:
        return [flag for option, v in self.values.items() for flag in OPTIONS[option][v]]


CELLS = [
    Cell("zero1", 1, "bf16 lora prompt parts through tiny compiled"),
    Cell("zero1", 2, "prompt through"),
    Cell("zero2", 1),
    Cell("zero2", 2, "lora visual through"),
    Cell("zero2_offload", 1, "bf16 lora own checkpointed compiled"),
    Cell("zero2_offload", 2, "lora checkpointed"),
    Cell("zero3", 1, "bf16 lora parts through compiled"),
    Cell("zero3", 2, "own parts checkpointed"),
    Cell("zero3_multinode", 1, "checkpointed tiny"),
    Cell("zero3_multinode", 2, "visual through compiled"),
    Cell("zero3_offload", 1, "visual parts checkpointed"),
    Cell("zero3_offload", 2, "bf16 visual through tiny"),
    Cell("zero2", 3, "own through tiny"),
    Cell("zero3", 4, "lora prompt checkpointed"),
]


def test_cells_meet_every_pair():
    configs = {path.stem for path in (REPO / "ds_configs").glob("*.json")}
    assert {(c.config, c.ranks) for c in CELLS} >= set(product(configs, (1, 2)))
    assert {c.ranks for c in CELLS} == {1, 2, 3, 4}
    stages = {"stage": ("below 3", "3")}
    tables = [c.values | {"stage": "3" if "zero3" in c.config else "below 3"} for c in CELLS]
    for (a, of_a), (b, of_b) in combinations((OPTIONS | stages).items(), 2):
        wanted = set(product(of_a, of_b)) - REFUSED
        assert {(t[a], t[b]) for t in tables} == wanted, (a, b)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Every chosen cell's folder and output, two cells at a time."""
    root = tmp_path_factory.mktemp("matrix")
    prepare(root / "cache")
    chosen = [
        item.callspec.params["cell"]
        for item in request.session.items
        if getattr(item, "originalname", "") == test_a_cell.__name__
    ]

    def run(cell: Cell) -> tuple[Path, str]:
        folder = root / str(cell).replace(" ", "-")
        done = launch(
            *SHORT, *cell.arguments, "--output_dir", str(folder), ranks=cell.ranks,
            config=cell.config, timeout=400, env={"LDISTILL_CACHE": str(root / "cache")},
        )  # fmt: skip
        return folder, done.stdout

    with ThreadPoolExecutor(2) as pool:
        yield {cell: pool.submit(run, cell) for cell in chosen}
        pool.shutdown(cancel_futures=True)


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell(runs: dict[Cell, Future], cell: Cell):
    """To its end, with student, table and paths; the first loss is that of any other cell."""
    if "--eval_suite" in cell.arguments:
        pytest.importorskip("lmms_eval", reason="needs lmms-eval (pip install 'ldistill[eval]')")
    folder, printed = runs[cell].result()
    assert "held-out items, accuracy" in printed
    assert str(folder / "student") in printed.replace("\n", "")
    assert f"ldistill push {folder} --repo" in printed
    assert "| α | 0.7 |" in (folder / "student" / "README.md").read_text()
    scores = json.loads((folder / "evaluation.json").read_text())
    assert scores["before"].keys() == scores["after"].keys()
    assert {"language", "reading", "vision", "facts"} <= scores["before"].keys()
    with (
        safe_open(folder / "student" / "model.safetensors", "pt") as got,
        safe_open(REPO / "ldistill/tiny/pair/student/model.safetensors", "pt") as base,
    ):
        assert set(got.keys()) == set(base.keys())
    records = losses_of(folder)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[0]["teacher_rows"] > 0
    # Before the first update it depends on the batch alone, which three ranks share out otherwise.
    plain = next((c for c in runs if c.values["type"] == "fp32" and c.ranks != 3), cell)
    expected = losses_of(runs[plain].result()[0])[0]["ce"]
    tolerance = {"fp32": 1e-4, "bf16": 0.03}[cell.values["type"]]
    assert cell.ranks == 3 or records[0]["ce"] == pytest.approx(expected, abs=tolerance)
    if cell.values["suite"] == "tiny":
        [evaluated] = [r for r in read_metrics(folder / "metrics.jsonl") if "eval_tiny_facts" in r]
        assert "eval_failed" not in evaluated
