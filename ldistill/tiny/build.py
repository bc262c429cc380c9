"""Make the tiny pair: tokenizer, language model, vision tower, alignment; two folders.

    ldistill tiny build --out pair/

writes `pair/teacher` (a Hugging Face Llama folder with its tokenizer, bf16) and `pair/student` (a
nanoVLM folder: `config.json` and `model.safetensors`, fp32). The same seed on the same machine and
number of threads gives the same bytes. The package ships the result of the default settings as
`ldistill/tiny/pair`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import LlamaForCausalLM

from ldistill.models.nanovlm_format import load_processor, save_nanovlm
from ldistill.tiny.corpus import tokenizer_texts
from ldistill.tiny.lm import PRETRAINING, pretrain, train_tokenizer
from ldistill.tiny.prepare import STUDENT
from ldistill.tiny.vision import (
    ALIGNMENT,
    PROJECTOR,
    VISION,
    align,
    new_student,
    pretrain_projector,
    pretrain_vision,
)
from ldistill.tiny.world import DEFAULT_SEED, World


def build_pair(
    out: Path, *, seed: int = DEFAULT_SEED, steps_scale: float = 1.0, show_progress: bool = True
) -> dict[str, float]:
    """Build the pair into the folders `teacher` and `student`.

    Args:
        out: made if need be.
        seed: of the world and of the weights.
        steps_scale: share of the full number of steps, for tests; 1 gives the shipped pair.
        show_progress: whether to draw progress bars.

    Returns:
        Folder → the loss that its last phase ended with.

    Raises:
        FileExistsError: `out` holds a teacher or a student.
    """
    for folder in (out / "teacher", out / "student"):
        if folder.exists():
            raise FileExistsError(f"{folder} exists: choose another --out or remove it.")
    with torch.random.fork_rng([]), Progress(disable=not show_progress) as progress:
        torch.use_deterministic_algorithms(True)
        try:
            return _build(out / "teacher", out / "student", World(seed), steps_scale, progress)
        finally:
            torch.use_deterministic_algorithms(False)


def _build(
    teacher: Path, student: Path, world: World, steps_scale: float, progress: Progress
) -> dict[str, float]:
    language, vision, projector, alignment = (
        phase.scaled(steps_scale) for phase in (PRETRAINING, VISION, PROJECTOR, ALIGNMENT)
    )
    tokenizer = train_tokenizer(tokenizer_texts(world))
    tokenizer.save_pretrained(teacher)
    processor = load_processor(STUDENT, str(teacher.absolute()))
    lm, lm_loss = pretrain(world, processor, language, progress)
    # What is stored, in half the bytes, is what vision is aligned to.
    _save_teacher(lm.to(torch.bfloat16), teacher)
    model = new_student(lm.float(), world.seed)
    pretrain_vision(model, world, vision, progress)
    pretrain_projector(model, processor, world, projector, progress)
    loss = align(model, processor, world, alignment, progress)
    save_nanovlm(model, student)
    return {"teacher": lm_loss, "student": loss}


def _save_teacher(lm: LlamaForCausalLM, folder: Path) -> None:
    """Beside its tokenizer: a Hugging Face folder that `AutoModelForCausalLM` loads."""
    lm.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["transformers_version"] = "5.17.0"  # the oldest supported; not what happened to build it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
