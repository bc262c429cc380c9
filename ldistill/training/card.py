"""The model card of an export: where it comes from, how it was trained, its scores, how to load it.

    write_card(run, student, out)      # out/README.md

Everything comes from the run's folder, so a card can be made at any later time and place. Nothing
is asked of the hub, and no path of this machine is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ldistill.checkpoint.logs import read_metrics
from ldistill.common import readme, run_files
from ldistill.common.locate import PACKAGE_SCHEME
from ldistill.data.index import ShardIndex
from ldistill.evaluation.lmms_results import EVALUATION
from ldistill.evaluation.loading import kind_of
from ldistill.models.pair import Pair

PAPER = "https://arxiv.org/abs/2604.00829"
_TRAINING = (
    ("recipe", "recipe"),
    ("distilled sources", "distil"),
    ("α", "alpha"),
    ("τ", "temperature"),
    ("objective", "mix"),
    ("rows of a step", "global_batch_size"),
    ("tokens of a row", "max_length"),
    ("learning rate, projector", "projector_lr"),
    ("learning rate, decoder", "decoder_lr"),
    ("learning rate", "learning_rate"),
    ("LoRA rank", "lora_rank"),
    ("seed", "seed"),
)
_LOADING = {
    "nanovlm": """from models.vision_language_model import VisionLanguageModel    # nanoVLM's

model = VisionLanguageModel.from_pretrained("{name}")""",
    "vlm": """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")""",
}


def origins(pair: Pair, student: str, teacher: str, index: ShardIndex) -> dict[str, Any]:
    """What cards say of a run's pair and data, to be kept in its folder.

    Args:
        pair: loaded, so that its folders are here.
        student, teacher: as the recipe names them.
        index: of the shards.
    """
    sources = [
        {
            "source": name,
            "category": entry["category"],
            "samples": sum(shard["samples"] for shard in entry["shards"]),
            **entry.get("origin", {}),  # shards of earlier versions have none
        }
        for name, entry in index.meta.items()
    ]
    found: dict[str, Any] = {"student": _model(student, pair.student_folder), "sources": sources}
    if pair.teacher_folder is not None:
        found["teacher"] = _model(teacher, pair.teacher_folder)
    return found


def _model(name: str, folder: Path) -> dict[str, str]:
    """A hub id, or what a folder is called; and its licence."""
    shipped = name.startswith(PACKAGE_SCHEME)
    local = shipped or Path(name).expanduser().exists()
    shown = folder.resolve().name if local else name
    if shipped:
        shown = name.removeprefix(PACKAGE_SCHEME)
    return {"name": shown} | ({} if local else {"hub": name}) | readme.origin(readme.head(folder))


def write_card(run: Path, student: Path, out: Path) -> None:
    """Write ``out/README.md`` for a student of a run; one that lies there is replaced.

    Args:
        run: the run's folder, with its recipe.
        student: folder of the student in it.
        out: folder of the export.
    """
    (out / readme.NAME).write_text(card(run, student), encoding="utf-8")


def card(run: Path, student: Path, name: str = "FOLDER", curves: bool = False) -> str:
    """The card's text.

    Args:
        run, student: as for :func:`write_card`.
        name: what a reader loads: a hub id, or a folder.
        curves: whether the picture of the run's curves lies beside the card.
    """
    recipe = yaml.safe_load((run / run_files.RECIPE).read_text(encoding="utf-8"))
    recipe["recipe"] = Path(recipe.get("recipe") or "run").stem  # a path may be its author's own
    about = _read(run / run_files.ORIGINS)
    environment = _read(run / run_files.ENVIRONMENT)
    base = about.get("student", {"name": Path(str(recipe["student"])).name})
    lm = about.get("teacher")
    scores = _scores(run)
    title = f"{base['name']}, {recipe['recipe']}"
    data = ModelCardData(
        base_model=[m["hub"] for m in (base, lm) if m and "hub" in m] or None,
        datasets=sorted({s["dataset"] for s in about.get("sources", ()) if "dataset" in s}) or None,
        license=readme.head(student).get("license") or base.get("licence"),
        library_name="transformers" if kind_of(student) == "vlm" else "nanovlm",
        pipeline_tag="image-text-to-text",
        tags=["ldistill", "distillation", "vision-language-model", "arxiv:2604.00829"],
        model_name=title,
        eval_results=list(_eval_results(scores)) or None,
    )
    taught = f"its own language model, {lm['name']}, as the teacher" if lm else "labels alone"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        f"The vision-language model {_named(base)}, trained by ldistill with {taught}"
        + (f" ([LinguDistill]({PAPER})).\n" if lm else ".\n"),
        "It has the keys, shapes, types and configuration of the checkpoint that it comes from.\n",
        f"## Load it\n\n```python\n{_LOADING[kind_of(student)].format(name=name)}\n```\n",
        f'```\nldistill generate --student {name} --image cat.jpg --prompt "What is this?"\n```\n',
        "## Scores\n",
        *_score_lines(scores),
        "## Training\n",
        *_training_lines(run, student, recipe, base, lm, environment),
        "\n## Data\n",
        *_data_lines(about.get("sources", [])),
    ]
    if curves:
        parts.append(f"\n## Curves\n\n![CE and KD by category]({run_files.CURVES})")
    return "\n".join(parts) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _named(model: dict[str, str]) -> str:
    name = model["name"]
    shown = f"[{name}](https://huggingface.co/{name})" if "hub" in model else f"`{name}`"
    return f"{shown} (licence: {model.get('licence', 'not stated')})"


Score = tuple[str, float | None, float, str]
"""Task, score before training or None, score after it, who measured."""


def _scores(run: Path) -> list[Score]:
    """On the recipe's items, before and after; by `ldistill eval`, where its results lie here."""
    items, found = _read(run / run_files.EVALUATION), []
    before = items.get("before", {})
    found += [(k, before.get(k), v, "held-out items") for k, v in items.get("after", {}).items()]
    for file in sorted(run.glob(f"*/{EVALUATION}")):
        result = _read(file)
        by = "lmms-eval" + (f", first {result['limit']}" if result["limit"] else "")
        found += [(s["name"], None, s["value"], by) for s in result["scores"].values()]
    return found


def _eval_results(scores: list[Score]) -> Iterator[EvalResult]:
    for task, _, after, by in scores:
        yield EvalResult(
            task_type="image-text-to-text",
            dataset_type=task,
            dataset_name=f"{task} ({by})",
            metric_type="score",
            metric_value=round(after, 4),
        )


def _score_lines(scores: list[Score]) -> Iterator[str]:
    if not scores:
        yield "Not measured.\n"
        return
    yield "| task | before | after | measured by |\n|---|---|---|---|"
    for task, before, after, by in scores:
        yield f"| {task} | {'' if before is None else f'{before:.3f}'} | {after:.3f} | {by} |"
    yield ""


def _training_lines(
    run: Path,
    student: Path,
    recipe: dict[str, Any],
    base: dict[str, str],
    lm: dict[str, str] | None,
    environment: dict[str, Any],
) -> Iterator[str]:
    yield "| | |\n|---|---|"
    yield f"| base | {_named(base)} |"
    yield f"| language model, the frozen teacher | {_named(lm) if lm else 'none'} |"
    _, _, step = student.parent.name.partition("checkpoint-")
    records = read_metrics(run / run_files.METRICS) if (run / run_files.METRICS).is_file() else []
    yield f"| steps | {step or (records[-1]['step'] if records else recipe.get('max_steps'))} |"
    if recipe.get("projector_lr") and recipe.get("decoder_lr"):
        recipe = recipe | {"learning_rate": None}  # nothing trains at it
    for label, key in _TRAINING:
        value = recipe.get(key) or None  # an adapter of rank 0 is none
        if value is not None and (lm or key not in ("distil", "alpha", "temperature", "mix")):
            yield f"| {label} | {value} |"
    git, packages = environment.get("git"), environment.get("packages", {})
    if git:
        changed = ", changed" if git["changed"] else ""
        yield f"| commit of ldistill | {git['commit']}{changed} |"
    versions = ", ".join(f"{k} {v}" for k, v in packages.items() if v)
    yield f"| versions | {versions} |"


def _data_lines(sources: list[dict[str, Any]]) -> Iterator[str]:
    yield "| source | category | samples | licence | from |\n|---|---|---|---|---|"
    for entry in sources:
        licence = entry.get("licence", "not stated in the shards")
        place = entry.get("dataset") or entry.get("homepage") or ""
        cells = (entry["source"], entry["category"], entry["samples"], licence, place)
        yield f"| {' | '.join(map(str, cells))} |"
