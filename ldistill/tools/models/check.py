"""The contracts of a family, on one pair: what must hold for whatever transformers is installed.

The LM is given the weights of the student's decoder; then its logits over the student's keys and
values must be the student's. Documents packed side by side must be what each is alone, and what is
exported must be what transformers reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from ldistill.common.locate import resolve
from ldistill.common.samples import Turn
from ldistill.data.collate import Collate, LoadedDocument, LoadedPack
from ldistill.distill.attention import recording
from ldistill.distill.distiller import Distiller, student_inputs
from ldistill.distill.objective import COLUMNS
from ldistill.distill.teacher import Teacher
from ldistill.models import formats
from ldistill.models.logits import LogitScaling
from ldistill.models.pair import Pair, load_pair
from ldistill.models.parts import train_only
from ldistill.models.weights import gather_trained, weight_files
from ldistill.models.zoo import copy_decoder, write_pair, write_reduced
from ldistill.sources import SourceWeights

TOLERANCE = 1e-4
"""Largest difference of two float32 logits that are one, relative to their deviation."""
_SHARED = ("full", "prompt", "visual")  # scopes with keys and values of the student's
_WEIGHTS = SourceWeights(("a", "b"), ("language", "language"), (0.5, 0.5), (1.0, 1.0))


@dataclass(frozen=True)
class Verdict:
    """What became of one contract: ``problem`` is empty where it holds."""

    contract: str
    problem: str = ""


def check_folders(student: Path, teacher: Path) -> Iterator[Verdict]:
    """Check the contracts on a pair, one after another.

    Args:
        student, teacher: folders; the LM's weights are not used, but the student decoder's.

    Raises:
        ValueError, OSError: the pair does not load or does not fit.
    """
    pair = load_pair(str(student), str(teacher))
    train_only(pair.student)
    copy_decoder(pair.student.backbone, pair.student.lm_head, pair.lm)
    pair.student.eval()
    documents = _documents(pair)
    batch = _packed(pair, [documents[:2], documents[2:]])
    teacher_ = Teacher(pair.lm, "reference")
    # A prompt read both ways is not what an LM's own keys and values are made of.
    for scope in _SHARED[: 2 if pair.student.sees == "prefix" else 3]:
        made = Distiller(pair.student, teacher_, _WEIGHTS, kv_scope=scope)
        yield Verdict(f"identity, {scope}", _identity(made, batch))
    whole = Distiller(pair.student, teacher_, _WEIGHTS)
    yield Verdict("packing", _packing(whole, batch, [_packed(pair, [[d]]) for d in documents]))
    yield Verdict("training", _training(whole, batch))
    yield Verdict("export", _export(pair, batch))
    yield Verdict("generate", _generates(pair))


def _documents(pair: Pair) -> list[LoadedDocument]:
    """Four: two pictures of different shapes, one in a second turn's question, text alone, one."""
    generator = np.random.default_rng(0)
    questions = ("What is this?", "And what is left of it?"), ("Which one?",), ("Why?",), ("Sum?",)
    sizes = [((40, 70), (70, 33)), ((64, 64),), (), ((30, 90),)]
    loaded = []
    for number, (asked, shapes) in enumerate(zip(questions, sizes, strict=True)):
        images = [
            Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
            for width, height in shapes
        ]
        turns = [Turn(question, f"Answer {number}{turn}.") for turn, question in enumerate(asked)]
        document = pair.processor.encode(turns, shapes)
        pictures = pair.processor.pictures(images)
        rotary = pair.processor.rotary(document.input_ids, pictures)
        loaded.append(LoadedDocument(number, number % 2, document, pictures, rotary))
    return loaded


def _packed(pair: Pair, rows: list[list[LoadedDocument]]) -> dict[str, Tensor]:
    batch = Collate(pair.processor.pad_token_id)([LoadedPack(row) for row in rows])
    return {name: value for name, value in batch.items() if name != "drops"}


@torch.no_grad()
def _states(distiller: Distiller, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher at the taught targets, [taught, vocabulary of both]."""
    supervision = distiller.supervise(batch)
    with recording(distiller.slots) as recorded:
        hidden = distiller.student(**student_inputs(batch)).flatten(0, 1)
        mine = distiller.teacher.hidden(supervision.queries, recorded())
    targets = supervision.targets
    scaling = LogitScaling.of(distiller.student.backbone.config)
    student = scaling(distiller.student.lm_head(hidden[targets.flat[targets.taught]]))
    teacher = distiller.teacher.scaling(distiller.teacher.head(mine, F.linear))
    both = min(student.shape[1], teacher.shape[1])
    return student[:, :both], teacher[:, :both]


def _differ(what: str, found: Tensor, wanted: Tensor) -> str:
    apart, scale = (found - wanted).abs().max().item(), max(wanted.std().item(), 1.0)
    return "" if apart <= TOLERANCE * scale else f"{what} differ by {apart:.1e}"


def _identity(distiller: Distiller, batch: dict[str, Tensor]) -> str:
    student, teacher = _states(distiller, batch)
    if problem := _differ("logits of teacher and student", teacher, student):
        return problem
    supervision = distiller.supervise(batch)
    with torch.no_grad():
        metrics = distiller(batch, supervision, len(supervision.targets), True)["metrics"]
    kl = metrics[:, COLUMNS.index("kl")].sum() / len(student)
    return "" if kl < TOLERANCE else f"equal weights, and the divergence is {kl:.1e}"


def _packing(distiller: Distiller, batch: dict[str, Tensor], alone: list[dict[str, Tensor]]) -> str:
    """Documents side by side against each alone: nothing leaks, nothing is out of place."""
    packed = _states(distiller, batch)
    single = [torch.cat(parts) for parts in zip(*(_states(distiller, a) for a in alone))]
    return next(filter(None, map(_differ, (
        "a student's logits, packed and alone,", "a teacher's logits, packed and alone,"
    ), packed, single)), "")  # fmt: skip


def _training(distiller: Distiller, batch: dict[str, Tensor]) -> str:
    """A step: a finite loss, and a gradient for all that trains."""
    student = distiller.student.train()
    supervision = distiller.supervise(batch)
    loss = distiller(batch, supervision, len(supervision.targets), True)["loss"]
    loss.backward()
    named = dict(student.named_parameters())
    idle = [n for n, p in named.items() if p.requires_grad and p.grad is None]
    frozen = [n for n, p in named.items() if not p.requires_grad and p.grad is not None]
    student.zero_grad()
    student.eval()
    if not loss.isfinite():
        return f"the loss is {loss.item()}"
    problems = [f"no gradient for {', '.join(idle[:3])}"] if idle else []
    problems += [f"a gradient for frozen {', '.join(frozen[:3])}"] if frozen else []
    return "; ".join(problems)


@torch.no_grad()
def _export(pair: Pair, batch: dict[str, Tensor]) -> str:
    """Changed, exported and read again: the checkpoint's keys and dtypes, the student's outputs."""
    for parameter in pair.student.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01)
    trained = gather_trained(pair.student)
    wanted = pair.student(**student_inputs(batch))
    with TemporaryDirectory() as folder:
        out = Path(folder)
        pair.export(trained, out)
        kept = ["config.json", *weight_files(pair.student_folder)]
        if problem := _unlike(pair.student_folder, out, kept):
            return problem
        if formats.format_of(out).name != "nanoVLM":
            _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info[kind]:
                    return f"transformers reads it with {kind}: {', '.join(sorted(info[kind])[:3])}"
        again = replace(pair, student=formats.load_student(out).eval())
    Distiller(again.student, None, SourceWeights(("a",), ("document",), (0.0,), (1.0,)))
    return _differ("states of the exported student", again.student(**student_inputs(batch)), wanted)


def _unlike(base: Path, out: Path, names: list[str]) -> str:
    if (base / names[0]).read_bytes() != (out / names[0]).read_bytes():
        return f"{names[0]} changed"
    for name in names[1:]:
        found = []
        for folder in (base, out):
            with safe_open(folder / name, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            found.append({key: (t.dtype, list(t.shape)) for key, t in tensors.items()})
        if found[0] != found[1]:
            return f"{name} holds other keys, dtypes or shapes"
    return ""


def _generates(pair: Pair) -> str:
    image = Image.new("RGB", (50, 40), (200, 10, 30))
    ids = pair.processor.prompt((), "What colour?", [image.size])
    new = pair.student.generate(
        torch.from_numpy(ids.astype(np.int64))[None], pair.processor.pictures([image]),
        max_new_tokens=3, do_sample=False, pad_token_id=pair.processor.pad_token_id,
    )  # fmt: skip
    return "" if 1 <= new.shape[1] <= 3 else f"{new.shape[1]} tokens instead of 3"


def passes(name: str, student: str | None, teacher: str | None, reduced: bool) -> bool:
    """Check one pair, a family's small one or that of these folders, and say what came of it."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # small configurations, which transformers remarks on
    began, problems, held = time.monotonic(), [], 0
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        pair = (root / "student", root / "teacher")
        try:
            if student is None:
                write_pair(name, root)
            elif reduced:
                write_reduced(
                    resolve(student, weights=False), resolve(teacher, weights=False), root
                )
            else:
                pair = (resolve(student), resolve(teacher))
            for verdict in check_folders(*pair):
                held += not verdict.problem
                problems += [f"{verdict.contract}: {verdict.problem}"] if verdict.problem else []
        except (ValueError, OSError) as error:
            problems.append(str(error))
    seconds = time.monotonic() - began
    print(f"{name:20} {'fails' if problems else 'holds'}  {held} contracts, {seconds:.1f} s")
    for problem in problems:
        print(f"    {problem}")
    return not problems
