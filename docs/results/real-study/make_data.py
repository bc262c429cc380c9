"""The real study's data from public sets on disk: shards to train on, tasks and texts to score on.

    python make_data.py DATA STUDENT OUT [--items 100] [--limit 0]

DATA holds `images/` (tars of pictures beside LLaVA JSON: flags, icons, nlvr, wtq, sroie_lines,
sroie_crops) and `text/` (JSON lines: ARC, HellaSwag, PIQA, OpenBookQA, Winogrande, BLiMP,
CommonsenseQA, WikiText-2). Writes

    OUT/shards/       seven sources; the seventh, `text`, has no pictures: CommonsenseQA's questions
                      and paragraphs of WikiText-2's validation part to be continued
    OUT/tasks/        tasks of lmms-eval, `--items` of each; nothing of them is trained on
    OUT/measured/     what `measure.py` reads: answers to be given, paragraphs of the test part
"""

from __future__ import annotations

import argparse
import json
import random
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ldistill.cli import app
from ldistill.evaluation.items import Item, first_of_each, load_items, save_items, write_tasks

LANGUAGE = ("flags", "icons", "nlvr", "wtq")
DOCUMENT = ("sroie_lines", "sroie_crops")
HELD_OUT = 10  # every tenth receipt
ASKED = "Question: {}\nAnswer:"
PROMPTS = {"arc_easy": ASKED, "arc_challenge": ASKED, "piqa": ASKED, "hellaswag": "{}"}
PROMPTS |= {"openbookqa": "{}"}
GROUPS = {"wtq_cell": "reading", "wtq_number": "reading"}  # the others: vision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "student", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--items", type=int, default=100, help="of each task")
    parser.add_argument("--limit", type=int, default=0, help="samples of each source; 0: all")
    asked = parser.parse_args()
    records, held_out = asked.out / "records", asked.out / "measured"
    for folder in (records, held_out):
        folder.mkdir(parents=True, exist_ok=True)
    pictures = asked.data / "images"
    for name in (*LANGUAGE, *DOCUMENT):
        with tarfile.open(pictures / f"{name}.tar") as tar:
            tar.extractall(records, filter="data")
    reading = []
    for name in DOCUMENT:
        every = json.loads((pictures / f"{name}_train.json").read_text(encoding="utf-8"))
        reading += _reading(name, [r for r in every if _held_out(r)], records)
        _save(records / f"{name}.json", [r for r in every if not _held_out(r)])
    for name in LANGUAGE:
        every = json.loads((pictures / f"{name}_train.json").read_text(encoding="utf-8"))
        _save(records / f"{name}.json", every)
    _save(records / "text.json", list(_texts(asked.data / "text")))
    for name in (*LANGUAGE, *DOCUMENT, "text"):
        _build(records / f"{name}.json", name, asked)
    items = [*_benchmarks(asked.data / "text"), *_pictured(pictures, records), *reading]
    random.Random(0).shuffle(items)
    items = first_of_each(items, asked.items)
    print("tasks", *sorted(write_tasks(items, asked.out / "tasks", "real_")))
    save_items([item for item in items if not item.choices], held_out / "answers.jsonl")
    lines = _lines(asked.data / "text" / "wikitext2_test.jsonl")
    texts = [line["text"] for line in lines if len(line["text"]) > 600]
    _save(held_out / "texts.json", random.Random(0).sample(texts, asked.items))


def _held_out(record: dict[str, Any]) -> bool:
    """By the receipt, which both document sources have cuttings of."""
    return int(record["id"].split("_")[0]) % HELD_OUT == 0


def _reading(name: str, held_out: list[dict[str, Any]], folder: Path) -> Iterator[Item]:
    for record in held_out:
        asked, answer = (turn["value"] for turn in record["conversations"][:2])
        picture = (folder / record["image"]).read_bytes()
        yield Item(name, "reading", asked.replace("<image>\n", ""), answer, image=picture)


def _texts(folder: Path) -> Iterator[dict[str, Any]]:
    """Chats; none of a task that is scored."""
    for line in _lines(folder / "commonsense_qa.jsonl"):
        listed = ", ".join(line["choices"])
        yield _chat(f"{line['question']} Choose: {listed}.", line["choices"][line["answer"]])
    for line in _lines(folder / "wikitext2_valid.jsonl"):
        words = line["text"].split()
        if len(words) >= 60:
            yield _chat(f"Continue: {' '.join(words[:20])}", " ".join(words[20:100]))


def _chat(user: str, assistant: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"source": "text", "messages": turns}


def _build(path: Path, name: str, asked: argparse.Namespace) -> None:
    category = "document" if name in DOCUMENT else "language"
    words = ["shards", "build", "--dataset", str(path), "--extra-sources", f"{name}={category}"]
    words += ["--student", str(asked.student), "--out", str(asked.out / "shards"), "--workers", "1"]
    words += ["--max-samples", str(asked.limit)] if asked.limit else []
    app(words, standalone_mode=False)


def _benchmarks(folder: Path) -> Iterator[Item]:
    for task, prompt in PROMPTS.items():
        for line in _lines(folder / f"{task}.jsonl"):
            choices = tuple(line["choices"])
            if len(set(choices)) == len(choices):
                right = choices[line["answer"]]
                asked = prompt.format(line["question"])
                yield Item(task, "language", asked, right, choices, style="text")
    # Whole sentences, of which the likelier one is right.
    for task, file in (("winogrande", "winogrande"), ("blimp", "blimp_light")):
        for line in _lines(folder / f"{file}.jsonl"):
            both = (line["good"], line["bad"])
            yield Item(task, "language", "", both[0], both, style="text")


def _pictured(pictures: Path, folder: Path) -> Iterator[Item]:
    """Held-out questions with their pictures; facts of countries also without."""
    for name in ("flags_test", "icons_test", "nlvr_dev", "wtq_test"):
        lines = (pictures / f"{name}_items.jsonl").read_text(encoding="utf-8")
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        for item in load_items(folder / f"{name}.jsonl"):
            text = item.task.endswith("_text")
            group = "language" if text else GROUPS.get(item.task, "vision")
            task = "flag_facts" if text else "flags" if item.task.startswith("flags") else item.task
            yield Item(task, group, item.prompt, item.answer, item.choices, item.image)


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _save(path: Path, values: list[Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
