"""Make the tiny pair: tokenizer, language model, vision tower, alignment; two folders.

    ldistill tiny build --out pair/

writes `pair/teacher` (a Hugging Face Llama folder with its tokenizer, bf16) and `pair/student` (a
nanoVLM folder: `config.json` and `model.safetensors`, fp32). The same seed on the same machine and
number of threads gives the same bytes. The package ships the result of the default settings as
`ldistill/tiny/pair`.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_format import load_processor, save_nanovlm
from ldistill.tiny.align import ALIGNMENT, align, new_student
from ldistill.tiny.corpus import tokenizer_texts
from ldistill.tiny.pretrain import PRETRAINING, pretrain
from ldistill.tiny.projector import WORDS, learn_words
from ldistill.tiny.sight import SIGHT, learn_to_see
from ldistill.tiny.tokenizer import train_tokenizer
from ldistill.tiny.training import Phase
from ldistill.tiny.world import DEFAULT_SEED, World


@dataclass(frozen=True)
class BuiltPair:
    """Where the pair lies and how well its phases ended."""

    teacher: Path
    student: Path
    lm_loss: float
    sight_loss: float
    words_loss: float
    alignment_loss: float


def build_pair(
    out: str | Path,
    *,
    seed: int = DEFAULT_SEED,
    steps_scale: float = 1.0,
    show_progress: bool = True,
) -> BuiltPair:
    """Build the pair into a new folder.

    Args:
        out: made if need be; must not hold a pair already.
        seed: of the world and of the weights.
        steps_scale: share of the full number of steps, for tests; 1 gives the shipped pair.
        show_progress: whether to draw progress bars.

    Raises:
        FileExistsError: `out` holds a teacher or a student.
        ValueError: `steps_scale` is not above 0.
    """
    out = Path(out)
    if steps_scale <= 0:
        raise ValueError(f"steps_scale must be above 0, got {steps_scale}.")
    teacher, student = out / "teacher", out / "student"
    for folder in (teacher, student):
        if folder.exists():
            raise FileExistsError(f"{folder} exists: choose another --out or remove it.")
    world = World(seed)
    with _deterministic(), Progress(disable=not show_progress) as progress:
        tokenizer = train_tokenizer(tokenizer_texts(world))
        phase = PRETRAINING.scaled(steps_scale)
        lm, lm_loss = pretrain(world, tokenizer, phase, _bar(progress, "language model", phase))
        round_to_bf16(lm)
        save_teacher(lm, tokenizer, teacher)
        model = new_student(lm, seed)
        phase = SIGHT.scaled(steps_scale)
        sight_loss = learn_to_see(model, world, phase, _bar(progress, "vision tower", phase))
        phase = WORDS.scaled(steps_scale)
        words = _bar(progress, "projector", phase)
        words_loss = learn_words(model, tokenizer, world, phase, words)
        phase = ALIGNMENT.scaled(steps_scale)
        alignment_loss = _align(model, teacher, world, phase, progress)
    save_nanovlm(model, student)
    return BuiltPair(teacher, student, lm_loss, sight_loss, words_loss, alignment_loss)


def _align(model: NanoVLM, teacher: Path, world: World, phase: Phase, progress: Progress) -> float:
    """Phase 2, with a processor from the student's configuration and the teacher's tokenizer."""
    scratch = teacher.with_name(".config")
    scratch.mkdir()
    try:
        (scratch / "config.json").write_text(model.config.to_json(), encoding="utf-8")
        processor = load_processor(scratch, str(teacher.absolute()))
    finally:
        shutil.rmtree(scratch)
    return align(model, processor, world, phase, _bar(progress, "alignment", phase))


@torch.no_grad()
def round_to_bf16(lm: LlamaForCausalLM) -> None:
    """Weights rounded to bf16 values: what is stored, in half the bytes, is what was aligned to."""
    for parameter in lm.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))


def save_teacher(lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A Hugging Face folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    copy.deepcopy(lm).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["transformers_version"] = "5.17.0"  # the oldest supported; not what happened to build it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _bar(progress: Progress, name: str, phase: Phase):
    """A progress bar that shows the loss."""
    task = progress.add_task(name, total=phase.steps)

    def advance(loss: float) -> None:
        progress.update(task, advance=1, description=f"{name}, loss {loss:.2f}")

    return advance


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels, and the caller's random state given back."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
