"""Make the tiny pair: tokenizer, language model, vision tower, alignment; two folders.

    ldistill tiny build --out pair/

writes `pair/teacher` (a Hugging Face Llama folder with its tokenizer, bf16) and `pair/student` (a
nanoVLM folder: `config.json` and `model.safetensors`, fp32). The same seed on the same machine and
number of threads gives the same bytes. The package ships the result of the default settings as
`ldistill/tiny/pair`, and what is not learnt is read there. The language model has half a million
parameters, grouped queries, a tied head. Its weights start large (initializer_range 0.1): at this
width the usual 0.02 leaves attention blind for long.

The tokenizer is a byte-level BPE learnt from the world's own text, after digits and line breaks
were split off one by one, capitals in twos. Its special tokens and chat template are SmolLM2's. The
image tokens are not in it: a student adds them, as nanoVLM does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ldistill.common.locate import resolve
from ldistill.models.formats import load_processor
from ldistill.models.nanovlm_format import save_nanovlm
from ldistill.models.processor import IGNORE, Document, Processor
from ldistill.tiny import vision
from ldistill.tiny.corpus import Text, pretraining_texts
from ldistill.tiny.prepare import STUDENT, TEACHER
from ldistill.tiny.training import Example, Phase, label_losses, optimise
from ldistill.tiny.world import DEFAULT_SEED, PIECES, World

PRETRAINING = Phase("language model", steps=2400, batch_size=32, rate=4e-3)


def build_pair(
    out: Path, *, seed: int = DEFAULT_SEED, steps_scale: float = 1.0
) -> dict[str, float]:
    """Build the pair into the folders `teacher` and `student`.

    Args:
        out: made if need be.
        seed: of the world and of the weights.
        steps_scale: share of the full number of steps, for tests; 1 gives the shipped pair.

    Returns:
        Folder → the loss that its last phase ended with.

    Raises:
        FileExistsError: `out` holds a teacher or a student.
    """
    for folder in (out / "teacher", out / "student"):
        if folder.exists():
            raise FileExistsError(f"{folder} exists: choose another --out or remove it.")
    with torch.random.fork_rng([]), Progress() as progress:
        torch.use_deterministic_algorithms(True)
        try:
            return _build(out / "teacher", out / "student", World(seed), steps_scale, progress)
        finally:
            torch.use_deterministic_algorithms(False)


def _build(
    teacher: Path, student: Path, world: World, scale: float, progress: Progress
) -> dict[str, float]:
    learn = partial(optimise, scale=scale, progress=progress)
    shipped = resolve(TEACHER)
    like, texts = AutoTokenizer.from_pretrained(shipped), _tokenizer_texts(world)
    like.train_new_from_iterator(texts, len(like), show_progress=False).save_pretrained(teacher)
    processor = load_processor(STUDENT, str(teacher.absolute()))
    torch.manual_seed(world.seed)
    lm = LlamaForCausalLM(LlamaConfig.from_pretrained(shipped))
    examples = (_example(processor, text) for text in pretraining_texts(world))
    embed = lm.get_input_embeddings()
    losses = label_losses(PRETRAINING, lm, processor, examples, lambda ids, _: embed(ids))
    lm_loss = learn(PRETRAINING, lm, losses)
    # What is stored, in half the bytes, is what vision is aligned to.
    lm.to(torch.bfloat16).save_pretrained(teacher)
    for name in ("config.json", "tokenizer_config.json"):  # else with notes on how it was built
        shutil.copyfile(shipped / name, teacher / name)
    model = vision.new_student(lm.float(), world.seed)
    loss = vision.teach(model, processor, world, learn)
    save_nanovlm(model, student)
    return {"teacher": lm_loss, "student": loss}


def _tokenizer_texts(world: World) -> Iterator[str]:
    """A sample, and every piece of writing often enough."""
    for text in islice(pretraining_texts(world), 7000):
        if isinstance(text, str):
            yield text
        else:
            for turn in text:
                yield from ("user\n", turn.user, "assistant\n", turn.assistant, "\n")
    yield from [" ".join(PIECES)] * 400


def _example(processor: Processor, text: Text) -> Example:
    """Plain text is learnt token by token, a chat only in its answers."""
    if not isinstance(text, str):
        return processor.encode(text), None
    tokenizer = processor.tokenizer
    ids = np.array(tokenizer(text + tokenizer.unk_token, add_special_tokens=False)["input_ids"])
    return Document(ids, np.append(ids[1:], IGNORE)), None
