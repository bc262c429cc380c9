"""Items as local lmms-eval tasks: a folder of YAML and parquet files for ``--include-path``.

Each of the items' tasks becomes one lmms-eval task: `multiple_choice` where its items have choices,
else `generate_until` with exact match. Scores are those of ``evaluation.items`` on the same model.

Text-only choices are scored as plain text by our lmms-eval models; an item of style ``chat`` is
therefore written with the model's chat template around it, so a folder belongs to a template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ldistill.evaluation.items import Item

MAX_NEW_TOKENS = 24
_PROBE = "\N{PILCROW SIGN}"


def write_tasks(
    items: Iterable[Item],
    folder: Path,
    render: Callable[[str], str],
    prefix: str = "",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Write tasks; returns lmms-eval's names of them.

    Args:
        items: in any order; the order within a task is kept.
        folder: made if need be. The files name their data by absolute path: don't move it.
        render: a user's turn in the chat template, up to where the answer starts.
        prefix: before the items' own task names (lmms-eval knows a thousand tasks already).
        max_new_tokens: most tokens of a generated answer.

    Raises:
        ValueError: a task whose items differ in kind (choices, style, picture), or no items.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    if not by_task:
        raise ValueError("no items to make tasks of.")
    for task, own in by_task.items():
        _write_task(prefix + task, own, folder, render, max_new_tokens)
    return [prefix + task for task in by_task]


def _write_task(
    name: str, items: Sequence[Item], folder: Path, render: Callable[[str], str], limit: int
) -> None:
    kinds = {(bool(i.choices), i.style, i.image is not None) for i in items}
    if len(kinds) > 1:
        raise ValueError(
            f"task {name}: its items differ in kind (choices, style, picture); give each kind a "
            "task of its own."
        )
    choices, style, picture = kinds.pop()
    data = folder / f"{name}.parquet"
    plain_chat = choices and style == "chat" and not picture
    _write_data(data, items, render if plain_chat else (lambda prompt: prompt))
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "context",
    }
    if picture:
        config["doc_to_visual"] = "image"
    config |= _scoring(choices, style, limit)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _scoring(choices: bool, style: str, limit: int) -> dict[str, Any]:
    if choices:
        return {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "target",
            "target_delimiter": " " if style == "text" else "",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
        }
    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": [], "max_new_tokens": limit, "do_sample": False},
        "metric_list": [_mean("exact_match")],
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _write_data(path: Path, items: Sequence[Item], render: Callable[[str], str]) -> None:
    from datasets import Dataset, Features, Image, List, Value

    columns: dict[str, list[Any]] = {
        "group": [item.group for item in items],
        "prompt": [item.prompt for item in items],
        "context": [render(item.prompt) for item in items],
        "answer": [item.answer.strip() for item in items],
    }
    features: dict[str, Any] = {name: Value("string") for name in columns}
    if items[0].choices:
        columns["choices"] = [list(item.choices) for item in items]
        columns["target"] = [item.choices.index(item.answer) for item in items]
        features |= {"choices": List(Value("string")), "target": Value("int64")}
    if items[0].image is not None:
        columns["image"] = [{"bytes": item.image, "path": None} for item in items]
        features["image"] = Image()
    Dataset.from_dict(columns, features=Features(features)).to_parquet(str(path))


def chat_renderer(tokenizer: Any) -> Callable[[str], str]:
    """``render`` for a tokenizer (or processor): the template, or the text itself without one."""
    if not tokenizer.chat_template:
        return lambda prompt: prompt

    def render(prompt: str) -> str:
        turn = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    return render


def fingerprint_of(render: Callable[[str], str]) -> str:
    """What identifies a template: a probe rendered with it."""
    return render(_PROBE)
