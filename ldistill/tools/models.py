"""`ldistill models`: the families, and whether they hold what is promised of them.

The LM is given the weights of the student's decoder; then its logits over the student's keys and
values must be the student's. Documents packed side by side must be what each is alone, and what is
exported must be what transformers reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ldistill.common.errors import did_you_mean
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
from ldistill.models.zoo import FAMILIES, Family, copy_decoder, write_pair, write_reduced
from ldistill.sources import SourceWeights
from ldistill.tools.table import Table

REFUSED = {
    "Qwen3.5, Qwen3-Next": "linear attention: a state carries positions on, there are no keys",
    "LFM2-VL": "short convolutions mix positions beside the attention",
    "Llama 3.2 Vision (Mllama)": "pictures come in through cross-attention that its LM lacks",
    "Llama 4": "attends in chunks and scales queries by their place in the whole sequence",
    "Gemma 3n, Gemma 4 with per-layer inputs": "layers read other layers' keys or the token ids",
    "rotary types `dynamic`, `longrope` in rows longer than the LM's own": (
        "frequencies are chosen by the length of a batch"
    ),
}


def asked_for(names: Sequence[str] | None) -> dict[str, Family]:
    """Families by name; all of them without. Raises ValueError: no such family."""
    for name in names or ():
        if name not in FAMILIES:
            hint = did_you_mean(name, FAMILIES)
            raise ValueError(f"no family {name!r}.{hint} `ldistill models` lists them.")
    return {name: FAMILIES[name] for name in names or FAMILIES}


def families_table(families: Mapping[str, Family]) -> Table:
    """A line a family: its classes, its scopes, and what is particular about its attention."""
    rows = []
    for name, family in families.items():
        model = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family.kind)
        scopes = "full, prompt" if family.kind == "paligemma" else "all"
        needs = {
            "windows": family.text.get("sliding_window"),
            "soft cap": family.lm == "gemma2",
            "sinks": family.lm == "gpt_oss",
            "pictures both ways": family.kind in ("gemma3", "paligemma"),
            "narrow values": family.lm == "deepseek_v3",
            "logit scale": family.lm in ("granite", "cohere2"),
        }
        found = ", ".join(need for need, here in needs.items() if here)
        lm = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.lm]
        rows.append((name, family.called, model or "nanoVLM's own", lm, scopes, found))
    columns = ("name", "family", "student", "LM", "kv_scope", "needs")
    return Table("", columns, rows, left=range(len(columns)))


def refused_table() -> Table:
    """What does not fit, and why."""
    return Table("", ("does not fit", "because"), list(REFUSED.items()), left=(0, 1))


TOLERANCE = 1e-4  # of two float32 logits that are one, relative to their deviation
_WEIGHTS = SourceWeights(("a", "b"), ("language", "language"), (0.5, 0.5), (1.0, 1.0))


def check_folders(student: Path, teacher: Path) -> Iterator[tuple[str, str]]:
    """Check a pair, with the student decoder's weights in the LM: contract → problem, or nothing.

    Raises ValueError or OSError: the pair does not load or does not fit.
    """
    pair = load_pair(str(student), str(teacher))
    train_only(pair.student)
    copy_decoder(pair.student.backbone, pair.student.lm_head, pair.lm)
    pair.student.eval()
    documents = _documents(pair)
    batch = _packed(pair, [documents[:2], documents[2:]])
    teacher_ = Teacher(pair.lm, "reference")
    # A prompt read both ways is not what an LM's own keys and values are made of.
    scopes = ("full", "prompt", "visual")[: 2 if pair.student.sees == "prefix" else 3]
    for scope in scopes:
        made = Distiller(pair.student, teacher_, _WEIGHTS, kv_scope=scope)
        yield f"identity, {scope}", _identity(made, batch)
    whole = Distiller(pair.student, teacher_, _WEIGHTS)
    yield "packing", _packing(whole, batch, [_packed(pair, [[d]]) for d in documents])
    yield "training", _training(whole, batch)
    yield "export", _export(pair, batch)
    yield "generate", _generates(pair)


def _documents(pair: Pair) -> list[LoadedDocument]:
    """Four: two pictures of different shapes, one in a second turn's question, text alone, one."""
    generator = np.random.default_rng(0)
    questions = ("What is this?", "And what is left of it?"), ("Which one?",), ("Why?",), ("Sum?",)
    sizes, loaded = [((40, 70), (70, 33)), ((64, 64),), (), ((30, 90),)], []
    for number, (asked, shapes) in enumerate(zip(questions, sizes, strict=True)):
        pixels = (generator.integers(0, 255, (h, w, 3), dtype=np.uint8) for w, h in shapes)
        images = [*map(Image.fromarray, pixels)]
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
    whose = [f"a {name}'s logits, packed and alone," for name in ("student", "teacher")]
    return next(filter(None, map(_differ, whose, packed, single)), "")


def _training(distiller: Distiller, batch: dict[str, Tensor]) -> str:
    """A step: a finite loss, and a gradient for all that trains."""
    student = distiller.student.train()
    supervision = distiller.supervise(batch)
    loss = distiller(batch, supervision, len(supervision.targets), True)["loss"]
    loss.backward()
    amiss = [n for n, p in student.named_parameters() if p.requires_grad == (p.grad is None)]
    student.eval().zero_grad()
    if not loss.isfinite():
        return f"the loss is {loss.item()}"
    told = f"trains without a gradient, or has one and is frozen: {', '.join(amiss[:3])}"
    return told if amiss else ""


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
        base = pair.student_folder
        if (base / "config.json").read_bytes() != (out / "config.json").read_bytes():
            return "config.json changed"
        for name in weight_files(base):
            if _stored(base / name) != _stored(out / name):
                return f"{name} holds other keys, dtypes or shapes"
        if formats.format_of(out).NAME != "nanoVLM":
            _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info[kind]:
                    return f"transformers reads it with {kind}: {', '.join(sorted(info[kind])[:3])}"
        again = formats.load_student(out).eval()
    Distiller(again, None, SourceWeights(("a",), ("document",), (0.0,), (1.0,)))
    return _differ("states of the exported student", again(**student_inputs(batch)), wanted)


def _stored(path: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(path, "pt") as file:
        stored = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (part.get_dtype(), part.get_shape()) for key, part in stored.items()}


def _generates(pair: Pair) -> str:
    image = Image.new("RGB", (50, 40), (200, 10, 30))
    ids = pair.processor.prompt((), "What colour?", [image.size])
    ids, pictures = torch.from_numpy(ids.astype(np.int64))[None], pair.processor.pictures([image])
    how = {"do_sample": False, "pad_token_id": pair.processor.pad_token_id}
    new = pair.student.generate(ids, pictures, max_new_tokens=3, **how)
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
                write_reduced(*(resolve(of, weights=False) for of in (student, teacher)), root)
            else:
                pair = (resolve(student), resolve(teacher))
            for contract, problem in check_folders(*pair):
                held += not problem
                problems += [f"{contract}: {problem}"] if problem else []
        except (ValueError, OSError) as error:
            problems.append(str(error))
    told = f"{name:20} {'fails' if problems else 'holds'}  {held} contracts"
    print(f"{told}, {time.monotonic() - began:.1f} s", *problems, sep="\n    ")
    return not problems
