"""The item scorer against a direct computation, one sequence at a time."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from pairs import write_pair
from PIL import Image

from ldistill.evaluation.items import (
    Item,
    answers,
    evaluate,
    load_items,
    save_items,
    score,
    write_tasks,
)
from ldistill.evaluation.scorer import StudentScorer
from ldistill.models.formats import load_processor, load_student
from ldistill.models.weights import load_lm
from ldistill.training import result
from ldistill.training.result import evaluate_student


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    write_pair(root)
    return (
        load_student(root / "student"),
        load_processor(root / "student"),
        load_lm(root / "teacher"),
    )


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def some_items(images: bool) -> list[Item]:
    rng = random.Random(0)
    words = ["fox", "lazy dog", "quick brown", "the total", "red", "yes, no"]
    items = []
    for number in range(12):
        prompt = "what is it? " * rng.randint(1, 4) + str(number)
        image = picture(number) if images and number % 3 else None
        choices = tuple(rng.sample(words, 3)) if number % 2 else ()
        style = "text" if number == 9 else "chat"
        answer = choices[0] if choices else "fox"
        items.append(Item("t", "language", prompt, answer, choices, image, style))
    return items


def sequence(
    processor, item: Item, answer: str | None
) -> tuple[list[int], int, dict[str, torch.Tensor]]:
    """Ids of prompt and answer, length of the prompt, tiles: straight from the processor."""
    images = [] if item.image is None else [processor.load_image(item.image)]
    tokenizer = processor.tokenizer
    if item.style == "text":
        prompt = tokenizer(item.prompt)["input_ids"]
        answer = answer and " " + answer
    else:
        prompt = processor.prompt((), item.prompt, [image.size for image in images]).tolist()
    rest = tokenizer(answer)["input_ids"] if answer else []
    return prompt + rest, len(prompt), processor.pictures(images)


@torch.no_grad()
def direct_logits(student, ids: list[int], tiles) -> torch.Tensor:
    return student.lm_head(student(torch.tensor([ids]), pictures=tiles))[0].log_softmax(-1)


def direct_answer(student, processor, item: Item, longest: int) -> str:
    if item.choices:
        scores = []
        for choice in item.choices:
            ids, start, tiles = sequence(processor, item, choice)
            logp = direct_logits(student, ids, tiles)
            scores.append(sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids))))
        return item.choices[int(np.argmax(scores))]
    ids, start, tiles = sequence(processor, item, None)
    for _ in range(longest):
        token = direct_logits(student, ids, tiles)[-1].argmax().item()
        if token == processor.tokenizer.eos_token_id:
            break
        ids.append(token)
    return processor.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_answers_are_those_of_a_direct_computation(pair, batch_size):
    student, processor, _ = pair
    items = some_items(images=True)
    expected = [direct_answer(student.eval(), processor, item, 6) for item in items]
    got = answers(student, processor, items, batch_size, max_new_tokens=6)
    assert got == expected
    assert len(set(expected)) > 6  # a model that says one thing would pass by accident


def test_a_bare_language_model_answers_text_items(pair):
    _, processor, lm = pair
    items = some_items(images=False)
    one = answers(lm, processor, items, 1, max_new_tokens=6)
    assert answers(lm, processor, items, 64, max_new_tokens=6) == one
    with pytest.raises(ValueError, match="cannot see"):
        evaluate(lm, processor, some_items(images=True))


def test_scores_are_means_of_tasks():
    items = [Item(task, "language", "q", "a") for task in "xxxxyyyy"]
    scores = score(items, [" a\n", "a", "a ", "b", "a", "b", "b", "b"])
    assert scores == {"x": 0.75, "y": 0.25, "language": 0.5}
    assert score([Item("z", "reading", "q", "a")], ["a"])["reading"] == 1.0


def test_progress_counts_every_item(pair):
    student, processor, _ = pair
    counted: list[int] = []
    items = some_items(images=True)
    evaluate(student, processor, items, 4, max_new_tokens=2, progress=counted.append)
    assert sum(counted) == len(items)


def test_a_run_scores_its_items_as_it_trains(pair_root, monkeypatch):
    """With its tiles, and beside its models on a GPU in the type they compute in."""
    loaded = []
    monkeypatch.setattr(result, "load_items", lambda path: [])
    monkeypatch.setattr(result, "evaluate", lambda _, processor, *rest, **told: processor.images)

    def load(folder, dtype):
        loaded.append(dtype)
        return torch.nn.Identity()

    monkeypatch.setattr(result, "load_student", load)
    for device, tiling in (("cpu", True), ("cuda", False)):
        recipe = SimpleNamespace(
            run=SimpleNamespace(eval_items="items.jsonl", evaluate=True, eval_limit=None),
            training=SimpleNamespace(device=torch.device(device), bf16=True, fp16=False),
            pair=SimpleNamespace(tokenizer=None),
            data=SimpleNamespace(tiling=tiling),
        )
        assert evaluate_student(recipe, pair_root / "student", "now").tiling is tiling
    assert loaded == [torch.float32, torch.bfloat16]


def test_files_give_items_back(tmp_path):
    items = some_items(images=True)
    save_items(items, tmp_path / "items.jsonl")
    assert load_items(tmp_path / "items.jsonl") == items


def test_pictures_may_lie_beside_the_file(tmp_path):
    (tmp_path / "one.png").write_bytes(picture(1))
    line = {"task": "t", "group": "reading", "prompt": "q", "answer": "a", "image": "one.png"}
    (tmp_path / "items.jsonl").write_text(json.dumps(line) + "\n\n")
    (item,) = load_items(tmp_path / "items.jsonl")
    assert item.image == picture(1)
    line["image"] = "two.png"
    (tmp_path / "items.jsonl").write_text(json.dumps(line))
    with pytest.raises(FileNotFoundError, match=r"two\.png"):
        load_items(tmp_path / "items.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "1 is not an evaluation item"),
        ('{"task": "t"}', "missing"),
        ('{"task": "t", "group": "g", "prompt": "p", "answer": "a", "colour": 1}', "colour"),
        ('{"task": "t", "group": "g", "prompt": "p", "answer": "a", "choices": ["b"]}', "among"),
        ('{"task": "t", "group": "g", "prompt": "p", "answer": "a", "style": "x"}', "style"),
        ("", "holds no items"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, line, message):
    (tmp_path / "items.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        load_items(tmp_path / "items.jsonl")


def test_items_refuse_what_cannot_be_scored():
    item = Item("t", "g", "p", "a")
    with pytest.raises(ValueError, match="style chat"):
        replace(item, style="text", image=b"png")
    with pytest.raises(FileNotFoundError, match="no evaluation items"):
        load_items("nowhere.jsonl")


def asked_by_lmms_eval(folder, task: str):
    """Documents of a written task, and its requests as lmms-eval makes them from its YAML."""
    from datasets import load_dataset
    from lmms_eval.api.instance import Instance

    config = yaml.safe_load((folder / f"{task}.yaml").read_text())
    documents = load_dataset(config["dataset_path"], split="test", **config["dataset_kwargs"])
    choices = config["output_type"] == "multiple_choice"

    def visual(document):
        return [document[config["doc_to_visual"]]] if "doc_to_visual" in config else None

    requests = []
    for number, document in enumerate(documents):
        between = config.get("target_delimiter", "")
        asks = [between + choice for choice in document["choices"]] if choices else [None]
        for ask in asks:
            ask = config["generation_kwargs"] if ask is None else ask
            kind = "loglikelihood" if choices else "generate_until"
            arguments = (document[config["doc_to_text"]], ask, visual, number, task, "test")
            metadata = {"task": task, "doc_id": number, "repeats": 1}
            requests.append(Instance(kind, arguments, len(requests), metadata))
    return list(documents), requests


def test_eval_and_a_run_give_the_same_answers(pair, pair_root, tmp_path, monkeypatch):
    """Chats and plain text, with pictures and without: the same questions to the same scorer."""
    pytest.importorskip("lmms_eval", reason="needs lmms-eval (pip install 'ldistill[eval]')")
    from ldistill.evaluation.lmms_model import ScoredModel

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = [
        replace(item, task=f"{bool(item.choices)}-{item.style}-{item.image is not None}")
        for item in some_items(images=True)
    ]
    items.append(Item("plain", "language", "the quick brown", "fox", style="text"))
    student, processor, _ = pair
    expected = answers(student, processor, items, 5, max_new_tokens=6)
    model = ScoredModel(str(pair_root / "student"), batch_size=3, device="cpu")
    monkeypatch.setattr(model, "scorer", StudentScorer(student, processor))
    model.task_dict = {}
    found: dict[str, list[str]] = {}
    for task in write_tasks(items, tmp_path, max_new_tokens=6):
        documents, requests = asked_by_lmms_eval(tmp_path, task)
        model.task_dict[task] = {"test": documents}
        if requests[0].request_type == "generate_until":
            found[task] = model.generate_until(requests)
            continue
        losses = iter(result.text[0] for result in model.loglikelihood(requests))
        found[task] = []
        for document in documents:
            own = [next(losses) for _ in document["choices"]]
            found[task].append(document["choices"][own.index(min(own))])
    assert len(found) == 6
    for task, texts in found.items():
        assert texts == [text for item, text in zip(items, expected) if item.task == task]
