"""The tiny language model, which becomes the teacher: tokenizer, shape, training on text.

The tokenizer is a byte-level BPE learnt from the world's own text. Its special tokens and chat
template are SmolLM2's (`<|im_start|>` 1, `<|im_end|>` 2 = eos = pad). The image tokens are not in
it: a student adds them, as nanoVLM does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ldistill.common.locate import resolve
from ldistill.models.nanovlm_config import CHAT_TEMPLATE
from ldistill.models.processor import IGNORE, Document, Processor
from ldistill.tiny.corpus import Text, pretraining_texts
from ldistill.tiny.prepare import TEACHER
from ldistill.tiny.training import Example, Phase, batches, label_loss, optimise, pad
from ldistill.tiny.world import World

PRETRAINING = Phase("language model", steps=2400, batch_size=32, rate=4e-3)
VOCABULARY = 768
MAX_LENGTH = 512
END_OF_TEXT, *_ = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PARTS = "[A-Z]{2}|\n"  # capitals are read two letters at a time, line breaks one by one


def train_tokenizer(texts: Iterable[Text]) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY` entries; the same texts give the same tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(_PARTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_plain(texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
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


def pretrain(
    world: World, processor: Processor, phase: Phase, progress: Progress
) -> tuple[LlamaForCausalLM, float]:
    """A language model of the world's text and its final training loss.

    Its shape is the shipped teacher's: half a million parameters, grouped queries, a tied head.
    Weights start large (initializer_range 0.1): at this width the usual 0.02 leaves attention blind
    for long.
    """
    torch.manual_seed(world.seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(resolve(TEACHER)))
    return model, optimise(phase, model, _losses(model, world, processor, phase), progress)


def _losses(
    model: LlamaForCausalLM, world: World, processor: Processor, phase: Phase
) -> Iterator[Tensor]:
    examples = (_example(processor, text) for text in pretraining_texts(world))
    for batch in batches(examples, phase.batch_size):
        ids, labels = pad(batch, processor.pad_token_id)
        yield label_loss(model, labels, input_ids=ids)


def _example(processor: Processor, text: Text) -> Example:
    """Plain text is learnt token by token, a chat only in its answers."""
    if not isinstance(text, str):
        return processor.encode(text), None
    coded = processor.tokenizer(text + END_OF_TEXT, add_special_tokens=False)
    ids = np.array(coded["input_ids"])
    return Document(ids, np.append(ids[1:], IGNORE)), None
