"""Make the tiny pair: tokenizer, language model, vision tower, alignment; two folders.

    ldistill tiny build --out pair/

writes `pair/teacher` (a Hugging Face Llama folder with its tokenizer, bf16) and `pair/student` (a
nanoVLM folder: `config.json` and `model.safetensors`, fp32). The same seed on the same machine and
number of threads gives the same bytes. The package ships the result of the default settings as
`ldistill/tiny/pair`.

The tokenizer is a byte-level BPE learnt from the world's own text. Its special tokens and chat
template are SmolLM2's (`<|im_start|>` 1, `<|im_end|>` 2 = eos = pad). The image tokens are not in
it: a student adds them, as nanoVLM does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ldistill.common.locate import resolve
from ldistill.models.formats import load_processor
from ldistill.models.nanovlm_config import CHAT_TEMPLATE
from ldistill.models.nanovlm_format import save_nanovlm
from ldistill.models.processor import IGNORE, Document, Processor
from ldistill.tiny import vision
from ldistill.tiny.corpus import Text, pretraining_texts, tokenizer_texts
from ldistill.tiny.prepare import STUDENT, TEACHER
from ldistill.tiny.training import Example, Phase, batches, label_loss, optimise, pad
from ldistill.tiny.world import DEFAULT_SEED, World

PRETRAINING = Phase("language model", steps=2400, batch_size=32, rate=4e-3)
VOCABULARY = 768
MAX_LENGTH = 512
END_OF_TEXT, START, END = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


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
    teacher: Path, student: Path, world: World, scale: float, progress: Progress
) -> dict[str, float]:
    _train_tokenizer(tokenizer_texts(world)).save_pretrained(teacher)
    processor = load_processor(STUDENT, str(teacher.absolute()))
    lm, lm_loss = _pretrain(world, processor, PRETRAINING.scaled(scale), progress)
    # What is stored, in half the bytes, is what vision is aligned to.
    lm.to(torch.bfloat16).save_pretrained(teacher)
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    config["transformers_version"] = "5.17.0"  # the oldest supported; not what happened to build it
    (teacher / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model = vision.new_student(lm.float(), world.seed)
    vision.pretrain_vision(model, world, vision.VISION.scaled(scale), progress)
    projector, alignment = vision.PROJECTOR.scaled(scale), vision.ALIGNMENT.scaled(scale)
    vision.pretrain_projector(model, processor, world, projector, progress)
    loss = vision.align(model, processor, world, alignment, progress)
    save_nanovlm(model, student)
    return {"teacher": lm_loss, "student": loss}


def _train_tokenizer(texts: Iterable[Text]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            # Capitals are read two letters at a time, line breaks one by one.
            pre_tokenizers.Split(Regex("[A-Z]{2}|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_plain(texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END_OF_TEXT,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _plain(texts: Iterable[Text]) -> Iterator[str]:
    for text in texts:
        if isinstance(text, str):
            yield text
        else:
            for turn in text:
                yield from ("user\n", turn.user, "assistant\n", turn.assistant, "\n")


def _pretrain(
    world: World, processor: Processor, phase: Phase, progress: Progress
) -> tuple[LlamaForCausalLM, float]:
    """A language model of the world's text and its final training loss.

    Its shape is the shipped teacher's: half a million parameters, grouped queries, a tied head.
    Weights start large (initializer_range 0.1): at this width the usual 0.02 leaves attention blind
    for long.
    """
    torch.manual_seed(world.seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(resolve(TEACHER)))

    def losses() -> Iterator[Tensor]:
        examples = (_example(processor, text) for text in pretraining_texts(world))
        for batch in batches(examples, phase.batch_size):
            ids, labels = pad(batch, processor.pad_token_id)
            yield label_loss(model, labels, input_ids=ids)

    return model, optimise(phase, model, losses(), progress)


def _example(processor: Processor, text: Text) -> Example:
    """Plain text is learnt token by token, a chat only in its answers."""
    if not isinstance(text, str):
        return processor.encode(text), None
    coded = processor.tokenizer(text + END_OF_TEXT, add_special_tokens=False)
    ids = np.array(coded["input_ids"])
    return Document(ids, np.append(ids[1:], IGNORE)), None
