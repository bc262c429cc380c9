"""Items: questions from a JSONL file, scored on a model here, or written as tasks for lmms-eval.

An item is a question with either choices (scored by the summed log-likelihood of each choice) or
an exact answer (greedy generation, compared after stripping blanks). It may carry a picture. Items
belong to a task, tasks to a group; a group's score is the mean over its tasks. A line of the file:

    {"task": "facts", "group": "language", "prompt": "What does the torvel eat?",
     "choices": ["moss", "nuts"], "answer": "moss", "style": "chat",
     "image": "data:image/png;base64,..." or a file name beside the JSONL file}

`choices`, `style` and `image` may be left out. Style `text` scores the plain continuation of the
prompt, without chat template, after a blank.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ldistill.common.errors import refuse
from ldistill.common.images import open_image
from ldistill.evaluation.scorer import LMScorer, Question, StudentScorer
from ldistill.models.processor import Processor

MAX_NEW_TOKENS = 24
CHAT = "ldistill_chat"  # column of a task's data: whether an item is asked in the chat template


@dataclass(frozen=True)
class Item:
    """One question; without `choices` the answer must be generated exactly."""

    task: str
    group: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    image: bytes | None = None
    style: str = "chat"

    def __post_init__(self) -> None:
        cases = {
            f"style must be chat or text, got {self.style!r}.": self.style not in ("chat", "text"),
            f"answer {self.answer!r} is not among the choices {self.choices}.": (
                self.choices and self.answer not in self.choices
            ),
            "an item with a picture needs style chat.": self.image and self.style == "text",
        }
        refuse(cases)

    @property
    def delimiter(self) -> str:
        """What stands between prompt and choice."""
        return " " if self.style == "text" else ""

    def question(self) -> Question:
        pictures = () if self.image is None else (open_image(self.image),)
        return Question(self.prompt, pictures, chat=self.style == "chat")


def load_items(path: str | Path) -> list[Item]:
    """Items of a JSONL file.

    Raises:
        FileNotFoundError, ValueError: no such file or picture; a line that is no item, by number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no evaluation items at {path}.")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image = record.pop("image", None)
            if image and image.startswith("data:"):
                image = base64.b64decode(image.partition(",")[2], validate=True)
            elif image:
                image = (path.parent / image).read_bytes()
            choices = tuple(record.pop("choices", ()))
            items.append(Item(**record, choices=choices, image=image))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not an evaluation item: {error}") from error
    if not items:
        raise ValueError(f"{path} holds no items.")
    return items


def first_of_each(items: Sequence[Item], count: int | None) -> list[Item]:
    """The first `count` items of every task, in the items' order; None: all of them."""
    numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)
    return [item for item in items if count is None or next(numbers[item.task]) < count]


def save_items(items: Iterable[Item], path: str | Path) -> None:
    """Write items, pictures embedded, for `load_items`."""
    lines = []
    for item in items:
        record: dict[str, Any] = {"task": item.task, "group": item.group, "prompt": item.prompt}
        record |= {"choices": item.choices} if item.choices else {}
        record |= {"answer": item.answer, "style": item.style}
        if item.image is not None:
            record["image"] = "data:image/png;base64," + base64.b64encode(item.image).decode()
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def evaluate(
    model: nn.Module, processor: Processor, items: Sequence[Item], *args: Any, **options: Any
) -> dict[str, float]:
    """Scores in [0, 1] by task, then by group; see `answers`."""
    return score(items, answers(model, processor, items, *args, **options))


def score(items: Iterable[Item], texts: Iterable[str]) -> dict[str, float]:
    """Share of right answers by task, then by group."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for item, text in zip(items, texts, strict=True):
        right[item.group][item.task].append(text.strip() == item.answer.strip())
    tasks, groups = {}, {}
    for group, of_group in right.items():
        shares = {task: sum(own) / len(own) for task, own in of_group.items()}
        tasks |= shares
        groups[group] = sum(shares.values()) / len(shares)
    return tasks | groups


def answers(
    model: nn.Module,
    processor: Processor,
    items: Sequence[Item],
    batch_size: int = 64,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's answer to every item, in the items' order: its choice, or what it generates.

    Args:
        model: a student, or a causal LM; it is left in eval mode.
        processor: the student's; its tokenizer and template serve a bare LM as well.
        items: the questions; ValueError: some have pictures, and the model is a bare LM.
        batch_size: sequences per forward.
        max_new_tokens: of a generated answer.
        progress: called with the number of items just answered.
    """
    is_student = hasattr(model, "embed")
    scorer = StudentScorer(model, processor) if is_student else LMScorer(model, processor.tokenizer)
    texts: dict[int, str] = {}

    def kind(index: int) -> tuple[int, bool]:
        return len(items[index].choices), items[index].image is not None

    order = sorted(range(len(items)), key=lambda i: (kind(i), len(items[i].prompt)))
    for (choices, _), alike in itertools.groupby(order, key=kind):
        indices, size = list(alike), max(1, batch_size // max(1, choices))
        for batch in (indices[i : i + size] for i in range(0, len(indices), size)):
            asked = [items[i] for i in batch]
            questions = [item.question() for item in asked]
            if choices:
                both = zip(asked, questions, strict=True)
                pairs = [(asks, item.delimiter + c) for item, asks in both for c in item.choices]
                totals = iter([total for total, _ in scorer.log_likelihoods(pairs)])
                likely = [[next(totals) for _ in item.choices] for item in asked]
                found = [i.choices[t.index(max(t))] for i, t in zip(asked, likely, strict=True)]
            else:
                found = scorer.generate(questions, max_new_tokens)
            texts |= zip(batch, found, strict=True)
            if progress:
                progress(len(batch))
    return [texts[i] for i in range(len(items))]


def write_tasks(
    items: Iterable[Item], folder: Path, prefix: str = "", max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str]:
    """Write items as local lmms-eval tasks: YAML and parquet files for ``--include-path``.

    Our lmms-eval models put the same questions to the same scorer: it scores as `evaluate` does.

    Args:
        items: all of a task with choices or none, with a picture or none, in one style.
        folder: made if need be. The files name their data by absolute path: don't move it.
        prefix: before the items' own task names, which are returned so.
        max_new_tokens: of a generated answer.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    by_task: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_task[prefix + item.task].append(item)
    for name, own in by_task.items():
        data = folder / f"{name}.parquet"
        _write_data(data, own)
        config = _task(name, data, own[0], max_new_tokens)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return list(by_task)


def _task(name: str, data: Path, like: Item, max_new_tokens: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "prompt",
    }
    if like.image is not None:
        config["doc_to_visual"] = "image"
    if like.choices:
        metrics = ("acc", "acc_norm")
        config |= {"output_type": "multiple_choice", "target_delimiter": like.delimiter}
        config |= {"doc_to_choice": "choices", "doc_to_target": "target"}
    else:
        metrics = ("exact_match",)
        generation = {"until": [], "max_new_tokens": max_new_tokens, "do_sample": False}
        config |= {"output_type": "generate_until", "generation_kwargs": generation}
        config |= {"doc_to_target": "answer"}
    means = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
    return config | {"metric_list": means}


def _write_data(path: Path, items: Sequence[Item]) -> None:
    from datasets import Dataset, Image, disable_progress_bars

    disable_progress_bars()  # one for every little file
    records = []
    for item in items:
        record = {"group": item.group, "prompt": item.prompt, "answer": item.answer.strip()}
        record[CHAT] = item.style == "chat"
        if item.choices:
            record["choices"] = list(item.choices)
            record["target"] = item.choices.index(item.answer)
        if item.image is not None:
            record["image"] = {"bytes": item.image, "path": None}
        records.append(record)
    data = Dataset.from_list(records)
    if items[0].image is not None:
        data = data.cast_column("image", Image())
    data.to_parquet(path)
