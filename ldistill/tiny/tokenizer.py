"""The tiny pair's tokenizer: byte-level BPE learnt from the world's own text, SmolLM2's manners.

Special tokens and chat template are SmolLM2's (`<|im_start|>` 1, `<|im_end|>` 2 = eos = pad). The
image tokens are not in it: a student adds them, as nanoVLM does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ldistill.models.nanovlm_config import CHAT_TEMPLATE
from ldistill.tiny.corpus import Text

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 768
MAX_LENGTH = 512
_PARTS = "[A-Z]{2}|\n"  # capitals are read two letters at a time, line breaks one by one


def train_tokenizer(texts: Iterable[Text], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocabulary` entries; the same texts give the same tokenizer."""
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
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_plain(texts), trainer)
    if bpe.get_vocab_size() != vocabulary:
        raise ValueError(
            f"the texts give {bpe.get_vocab_size()} tokens instead of {vocabulary}: use more texts"
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _plain(texts: Iterable[Text]) -> Iterator[str]:
    for text in texts:
        if isinstance(text, str):
            yield text
            continue
        for turn in text:
            yield from ("user\n", turn.user, "assistant\n", turn.assistant, "\n")
