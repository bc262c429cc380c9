"""The model card of an export: where it comes from, how it was trained, its scores, how to load it.

Everything comes from the run's folder, so a card can be made at any later time and place. Nothing
is asked of the hub, and no path of this machine is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ldistill.checkpoint.logs import read_metrics
from ldistill.common import readme, run_files
from ldistill.common.locate import PACKAGE_SCHEME
from ldistill.common.run_files import read_json
from ldistill.data.index import ShardIndex
from ldistill.evaluation.lmms_run import EVALUATION
from ldistill.evaluation.scorer import kind_of
from ldistill.models.pair import Pair

PAPER = "https://arxiv.org/abs/2604.00829"
_TRAINING = (  # label, field of the recipe
    ("recipe", "recipe"),
    ("distilled sources", "distil"),
    ("α", "alpha"),
    ("τ", "temperature"),
    ("objective", "combine"),
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
    """What cards say of a run's pair, as its recipe names it, and data; kept in its folder."""
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
    found = {"name": name, "hub": name}
    if name.startswith(PACKAGE_SCHEME):
        found = {"name": name.removeprefix(PACKAGE_SCHEME)}
    elif Path(name).expanduser().exists():
        found = {"name": folder.resolve().name}
    return found | readme.origin(readme.head(folder))


def card(run: Path, student: Path, name: str = "FOLDER", curves: bool = False) -> str:
    """The card's text.

    Of the run and the student in these folders; ``name`` is what a reader loads, ``curves`` whether
    the picture of the run's curves lies beside the card.
    """
    recipe = yaml.safe_load((run / run_files.RECIPE).read_text(encoding="utf-8"))
    recipe["recipe"] = Path(recipe.get("recipe") or "run").stem  # a path may be its author's own
    about = read_json(run / run_files.ORIGINS)
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
        eval_results=[
            EvalResult("image-text-to-text", task, f"{task} ({by})", "score", round(after, 4))
            for task, _, after, by in scores
        ]
        or None,
    )
    taught = f"its own language model, {lm['name']}, as the teacher" if lm else "labels alone"
    table = "| task | before | after | measured by |\n|---|---|---|---|"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        f"The vision-language model {_named(base)}, trained by ldistill with {taught}"
        + (f" ([LinguDistill]({PAPER})).\n" if lm else ".\n"),
        "It has the keys, shapes, types and configuration of the checkpoint that it comes from.\n",
        f"## Load it\n\n```python\n{_LOADING[kind_of(student)].format(name=name)}\n```\n",
        f'```\nldistill generate --student {name} --image cat.jpg --prompt "What is this?"\n```\n',
        "## Scores\n",
        table if scores else "Not measured.",
        *(_row(t, "" if b is None else f"{b:.3f}", f"{a:.3f}", by) for t, b, a, by in scores),
        "",
        "## Training\n",
        "| | |\n|---|---|",
        _row("base", _named(base)),
        _row("language model, the frozen teacher", _named(lm) if lm else "none"),
        *(_row(*told) for told in _training(run, student, recipe, lm is not None) if told[1]),
        "\n## Data\n",
        "| source | category | samples | licence | from |\n|---|---|---|---|---|",
    ]
    for s in about.get("sources", []):
        licence = s.get("licence", "not stated in the shards")
        place = s.get("dataset") or s.get("homepage") or ""
        parts.append(_row(s["source"], s["category"], s["samples"], licence, place))
    if curves:
        parts.append(f"\n## Curves\n\n![CE and KD by category]({run_files.CURVES})")
    return "\n".join(parts) + "\n"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _named(model: dict[str, str]) -> str:
    name = model["name"]
    shown = f"[{name}](https://huggingface.co/{name})" if "hub" in model else f"`{name}`"
    return f"{shown} (licence: {model.get('licence', 'not stated')})"


# Task, score before training or None, score after it, who measured.
Score = tuple[str, float | None, float, str]


def _scores(run: Path) -> list[Score]:
    """On the recipe's items, before and after; by `ldistill eval`, where its results lie here."""
    items = read_json(run / run_files.EVALUATION)
    before, after = items.get("before", {}), items.get("after", {})
    found: list[Score] = [(k, before.get(k), v, "held-out items") for k, v in after.items()]
    for file in sorted(run.glob(f"*/{EVALUATION}")):
        result = read_json(file)
        by = "lmms-eval" + (f", first {result['limit']}" if result["limit"] else "")
        found += [(s["name"], None, s["value"], by) for s in result["scores"].values()]
    return found


def _training(
    run: Path, student: Path, recipe: dict[str, Any], taught: bool
) -> Iterator[tuple[str, Any]]:
    """What is told of a training, by its label."""
    _, _, step = student.parent.name.partition("checkpoint-")
    records = read_metrics(run / run_files.METRICS)
    yield "steps", step or (records[-1]["step"] if records else recipe.get("max_steps"))
    if recipe.get("projector_lr") and recipe.get("decoder_lr"):
        recipe = recipe | {"learning_rate": None}  # nothing trains at it
    for label, key in _TRAINING:
        if taught or key not in ("distil", "alpha", "temperature", "combine"):
            yield label, recipe.get(key)
    environment = read_json(run / run_files.ENVIRONMENT)
    if git := environment.get("git"):
        yield "commit of ldistill", git["commit"] + (", changed" if git["changed"] else "")
    packages = environment.get("packages", {})
    yield "versions", ", ".join(f"{name} {found}" for name, found in packages.items() if found)
