"""Score a student, or a bare language model, on items from a JSONL file.

An item is a question with either choices (scored by the summed log-likelihood of each choice) or
an exact answer (greedy generation, compared after stripping blanks). It may carry a picture. Items
belong to a task, tasks to a group; a group's score is the mean over its tasks.

    items = load_items(path)
    scores = evaluate(student, processor, items)     # {"facts": 0.98, ..., "language": 0.95}

One line of the file:

    {"task": "facts", "group": "language", "prompt": "What does the torvel eat?",
     "choices": ["moss", "nuts"], "answer": "moss", "style": "chat",
     "image": "data:image/png;base64,..." or a file name beside the JSONL file}

`choices`, `style` and `image` may be left out. Style `text` scores the plain continuation of the
prompt, without chat template, after a blank.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldistill.models.processor import Processor

STYLES = ("chat", "text")
_DATA_URI = "data:image/png;base64,"


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
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {self.style!r}.")
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"answer {self.answer!r} is not among the choices {self.choices}.")
        if self.style == "text" and self.image is not None:
            raise ValueError("an item with a picture needs style chat.")


@dataclass(frozen=True)
class Answer:
    """What a model made of an item: its choice or its generated text."""

    item: Item
    text: str

    @property
    def right(self) -> bool:
        return self.text.strip() == self.item.answer.strip()


def load_items(path: str | Path) -> list[Item]:
    """Items of a JSONL file.

    Raises:
        FileNotFoundError: no such file, or a picture it names is not beside it.
        ValueError: a line that is no item; the message gives its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no evaluation items at {path}.")
    items = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                items.append(_parse(line, f"{path}:{number}", path.parent))
    if not items:
        raise ValueError(f"{path} holds no items.")
    return items


def first_of_each(items: Sequence[Item], count: int | None) -> list[Item]:
    """The first `count` items of every task, in the items' order; None: all of them."""
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.task] += 1
        if count is None or seen[item.task] <= count:
            kept.append(item)
    return kept


def _parse(line: str, where: str, folder: Path) -> Item:
    try:
        record = json.loads(line)
        image = record.pop("image", None)
        choices = tuple(record.pop("choices", ()))
        return Item(**record, choices=choices, image=_read_image(image, folder))
    except (json.JSONDecodeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is not an evaluation item: {error}") from error


def _read_image(image: str | None, folder: Path) -> bytes | None:
    if image is None:
        return None
    if image.startswith("data:"):
        return base64.b64decode(image.partition(",")[2], validate=True)
    return (folder / image).read_bytes()


def save_items(items: Iterable[Item], path: str | Path) -> None:
    """Write items with their pictures embedded; `load_items` gives them back."""
    lines = []
    for item in items:
        record: dict[str, Any] = {"task": item.task, "group": item.group, "prompt": item.prompt}
        if item.choices:
            record["choices"] = list(item.choices)
        record |= {"answer": item.answer, "style": item.style}
        if item.image is not None:
            record["image"] = _DATA_URI + base64.b64encode(item.image).decode()
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def evaluate(
    model: nn.Module,
    processor: Processor,
    items: Sequence[Item],
    batch_size: int = 64,
    *,
    max_new_tokens: int = 24,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Scores in [0, 1] by task, then by group (mean over the group's tasks).

    Args:
        model: a student (``embed``, ``generate``, ``lm_head``) or a Llama-kind causal LM, which
            can only take items without pictures.
        processor: the student's; its tokenizer and template serve a bare LM as well.
        items: the questions; the result does not depend on their order or on `batch_size`.
        batch_size: sequences per forward.
        max_new_tokens: most tokens of a generated answer.
        progress: called with the number of items just answered.

    Raises:
        ValueError: items with pictures for a bare LM, or no items.
    """
    return score(answers(model, processor, items, batch_size, max_new_tokens, progress))


def score(answered: Iterable[Answer]) -> dict[str, float]:
    """Share of right answers by task and by group."""
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for answer in answered:
        right[answer.item.group, answer.item.task].append(answer.right)
    if not right:
        raise ValueError("no items to score.")
    tasks = {key: sum(values) / len(values) for key, values in right.items()}
    scores = {task: value for (_, task), value in tasks.items()}
    for group in dict.fromkeys(group for group, _ in tasks):
        of_group = [value for (g, _), value in tasks.items() if g == group]
        scores[group] = sum(of_group) / len(of_group)
    return scores


def answers(
    model: nn.Module,
    processor: Processor,
    items: Sequence[Item],
    batch_size: int = 64,
    max_new_tokens: int = 24,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The model's answer to every item, in the items' order."""
    if not hasattr(model, "embed") and any(item.image is not None for item in items):
        raise ValueError("items with pictures need a student, not a bare language model.")
    texts: dict[int, str] = {}
    done = progress or (lambda count: None)
    chosen = [i for i, item in enumerate(items) if item.choices]
    generated = [i for i, item in enumerate(items) if not item.choices]
    with _evaluating(model):
        runner = _Runner(model, processor, max_new_tokens)
        for part in _by_length(chosen, runner, items, batch_size, choices=True):
            texts |= zip(part, runner.choose([items[i] for i in part]), strict=True)
            done(len(part))
        for part in _by_length(generated, runner, items, batch_size, choices=False):
            texts |= zip(part, runner.generate([items[i] for i in part]), strict=True)
            done(len(part))
    return [Answer(item, texts[i]) for i, item in enumerate(items)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode and the RNG are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _by_length(
    indices: list[int], runner: _Runner, items: Sequence[Item], batch_size: int, choices: bool
) -> Iterator[list[int]]:
    """Batches of similar length; items with choices count one sequence per choice."""
    batch: list[int] = []
    rows = 0
    for index in sorted(indices, key=lambda i: (runner.length(items[i]), i)):
        count = len(items[index].choices) if choices else 1
        if batch and rows + count > batch_size:
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += count
    if batch:
        yield batch


class _Runner:
    """Forward passes over items; knows how a student differs from a bare LM."""

    def __init__(self, model: nn.Module, processor: Processor, max_new_tokens: int) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.max_new_tokens = max_new_tokens
        self.device = next(model.parameters()).device
        self.is_student = hasattr(model, "embed")
        self._prompts: dict[Item, tuple[list[int], Tensor | None]] = {}

    def prompt(self, item: Item) -> tuple[list[int], Tensor | None]:
        """Token ids of the prompt and its tiles [tiles, 3, H, W]."""
        if item not in self._prompts:
            self._prompts[item] = self._encode(item)
        return self._prompts[item]

    def length(self, item: Item) -> int:
        return len(self.prompt(item)[0])

    def _encode(self, item: Item) -> tuple[list[int], Tensor | None]:
        if item.style == "text":
            return self.ids(item.prompt), None
        tiles, grids = None, []
        if item.image is not None:
            tiles, grid = self.processor.tiles(self.processor.load_image(item.image))
            grids = [grid]
        return self.processor.prompt((), item.prompt, grids).tolist(), tiles

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def choose(self, items: Sequence[Item]) -> list[str]:
        """The choice of highest summed log-likelihood of every item."""
        rows, starts, tiles = [], [], []
        for item in items:
            prompt, picture = self.prompt(item)
            for choice in item.choices:
                before = " " if item.style == "text" else self.processor.answer_prefix
                rows.append(prompt + self.ids(before + choice))
                starts.append(len(prompt))
                tiles += [] if picture is None else [picture]
        scores = self._log_likelihood(rows, starts, tiles).tolist()
        chosen = []
        for item in items:
            own, scores = scores[: len(item.choices)], scores[len(item.choices) :]
            chosen.append(item.choices[max(range(len(own)), key=own.__getitem__)])
        return chosen

    def _log_likelihood(
        self, rows: list[list[int]], starts: list[int], tiles: list[Tensor]
    ) -> Tensor:
        """Summed log-likelihood [rows] of each row from its start on; rows padded at the right."""
        ids, mask = self._pad(rows, left=False)
        hidden = self._hidden(ids, mask, tiles)
        places = torch.arange(ids.shape[1] - 1, device=self.device)
        lengths = mask.sum(1, keepdim=True)
        start = torch.tensor(starts, device=self.device)[:, None]
        wanted = (places >= start - 1) & (places < lengths - 1)  # place p predicts token p + 1
        logits = self._head(hidden[:, :-1][wanted]).float()
        picked = -nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
        total = torch.zeros(len(rows), device=self.device)
        return total.index_add_(0, wanted.nonzero()[:, 0], picked)

    def generate(self, items: Sequence[Item]) -> list[str]:
        """Greedy answers, prompts padded at the left."""
        prompts = [self.prompt(item) for item in items]
        ids, mask = self._pad([prompt for prompt, _ in prompts], left=True)
        options = {
            "attention_mask": mask,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "eos_token_id": self.processor.stop_token_ids,
            "pad_token_id": self.processor.pad_token_id,
        }
        if self.is_student:
            tiles = [picture for _, picture in prompts if picture is not None]
            new = self.model.generate(ids, pixel_values=self._stack(tiles), **options)
        else:
            new = self.model.generate(ids, **options)[:, ids.shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def _hidden(self, ids: Tensor, mask: Tensor, tiles: list[Tensor]) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.is_student:
            return self.model(
                ids, position_ids=positions, pixel_values=self._stack(tiles), attention_mask=mask
            )
        return self.model.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    def _stack(self, tiles: list[Tensor]) -> Tensor | None:
        return torch.cat(tiles).to(self.device) if tiles else None

    def _pad(self, rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """int64 [rows, longest] and its mask."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.processor.pad_token_id, device=self.device)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            where = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
            ids[row, where] = torch.tensor(tokens, device=self.device)
            mask[row, where] = 1
        return ids, mask
