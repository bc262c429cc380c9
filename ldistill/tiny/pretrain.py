"""Phase 1 of the tiny pair: a small Llama learns the world's text. It becomes the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ldistill.tiny.corpus import Text, pretraining_texts
from ldistill.tiny.tokenizer import MAX_LENGTH
from ldistill.tiny.training import Coded, Phase, batches, encode_chat, optimise, pad, shifted
from ldistill.tiny.world import World

PRETRAINING = Phase(steps=2400, batch_size=32, rate=4e-3)


def lm_config(vocabulary: int) -> LlamaConfig:
    """A Llama of half a million parameters with grouped queries and a tied head."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.1,  # at this width the usual 0.02 leaves attention blind for long
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def pretrain(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    phase: Phase = PRETRAINING,
    advance: Callable[[float], None] = lambda loss: None,
) -> tuple[LlamaForCausalLM, float]:
    """A language model of the world's text and its final training loss."""
    torch.manual_seed(world.seed)
    model = LlamaForCausalLM(lm_config(len(tokenizer)))
    steps = _losses(model, _documents(world, tokenizer, phase), tokenizer.pad_token_id, phase)
    loss = optimise(phase, model, steps, advance)
    return model.eval(), loss


def _documents(world: World, tokenizer: PreTrainedTokenizerBase, phase: Phase) -> Iterator[Coded]:
    # One window more than the steps use: the last one is cut off by whoever stops first.
    for text in pretraining_texts(world, (phase.steps + 16) * phase.batch_size):
        yield Coded(*_encode(tokenizer, text))


def _encode(tokenizer: PreTrainedTokenizerBase, text: Text) -> tuple[Tensor, Tensor]:
    """Plain text is learnt token by token, a chat only in its answers."""
    if not isinstance(text, str):
        return encode_chat(tokenizer, text)
    ids = torch.tensor(tokenizer(text + "<|endoftext|>", add_special_tokens=False)["input_ids"])
    return shifted(ids, torch.ones_like(ids, dtype=torch.bool))


def _losses(
    model: LlamaForCausalLM, documents: Iterator[Coded], pad_id: int, phase: Phase
) -> Iterator[Callable[[], Tensor]]:
    for batch in batches(documents, phase.batch_size, lambda document: len(document.ids)):
        ids, labels = pad(batch, pad_id)
        learnt = labels >= 0

        def loss(ids=ids, labels=labels, learnt=learnt) -> Tensor:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            return F.cross_entropy(model.lm_head(hidden[learnt]), labels[learnt])

        yield loss
