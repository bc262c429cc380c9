"""Small random pairs on disk in the real formats, and batches for them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ldistill.models.hf_vlm import HFVLM
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import CHAT_TEMPLATE, NanoVLMConfig, extra_tokens
from ldistill.models.nanovlm_format import save_nanovlm
from ldistill.models.student import Student
from ldistill.models.towers import picture_tokens
from ldistill.sources import SourceWeights

VOCAB = 320
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "what is the total on this receipt?",
    "user assistant answer yes no red green blue 0 1 2 3 4 5 6 7 8 9",
]
SOURCES = ("vqav2", "docvqa")


def small_config(**changes) -> NanoVLMConfig:
    """A nanoVLM small enough for tests, with a GQA ratio of 3 that is not square."""
    values = {
        "vit_hidden_dim": 32,
        "vit_inter_dim": 64,
        "vit_patch_size": 8,
        "vit_img_size": 32,
        "vit_n_heads": 2,
        "vit_n_blocks": 2,
        "lm_hidden_dim": 48,
        "lm_inter_dim": 96,
        "lm_re_base": 10000,
        "lm_max_position_embeddings": 512,
        "lm_base_vocab_size": VOCAB,
        "lm_vocab_size": VOCAB + 66,
        "lm_n_heads": 6,
        "lm_n_kv_heads": 2,
        "lm_n_blocks": 3,
        "mp_pixel_shuffle_factor": 2,
        "mp_image_token_length": 4,
        "max_img_size": 64,
        "lm_max_length": 512,
        "lm_tokenizer": "unset",
        "lm_model_type": "unset",
    }
    return NanoVLMConfig(**(values | changes))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of exactly VOCAB tokens with the chat tokens at the front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    while tokenizer.get_vocab_size() < VOCAB:
        tokenizer.add_tokens([f"<filler_{tokenizer.get_vocab_size()}>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_pair(root: Path, *, same_weights: bool = False, seed: int = 0, **changes) -> None:
    """``root/student`` (nanoVLM) and ``root/teacher`` (Llama with tokenizer)."""
    torch.manual_seed(seed)
    config = small_config(lm_tokenizer=str(root / "teacher"), **changes)
    student = NanoVLM(config)
    spread(student)
    save_nanovlm(student, root / "student")
    teacher = LlamaForCausalLM(teacher_config(config))
    if same_weights:
        copy_decoder(student, teacher)
    else:
        spread(teacher)
    teacher.save_pretrained(root / "teacher")
    write_tokenizer(root / "teacher")


def teacher_config(config: NanoVLMConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.lm_base_vocab_size,
        hidden_size=config.lm_hidden_dim,
        intermediate_size=config.lm_inter_dim,
        num_hidden_layers=config.lm_n_blocks,
        num_attention_heads=config.lm_n_heads,
        num_key_value_heads=config.lm_n_kv_heads,
        rms_norm_eps=config.lm_rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.lm_re_base)},
        max_position_embeddings=config.lm_max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def spread(model: torch.nn.Module) -> None:
    """Weights large enough that wrong attention shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)


def copy_decoder(student: NanoVLM, teacher: LlamaForCausalLM) -> None:
    """Give the teacher the student decoder's weights (base vocabulary)."""
    state = student.decoder.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][: teacher.config.vocab_size]
    teacher.load_state_dict(state)


def weights(alpha=(0.7, 0.0), temperature: float = 4.0) -> SourceWeights:
    return SourceWeights(SOURCES, ("language", "document"), tuple(alpha), (temperature,) * 2)


def random_batch(
    student: Student,
    rows: list[list[int]],
    *,
    seq: int = 64,
    seed: int = 0,
    turns: int = 1,
    images: bool = True,
) -> dict[str, torch.Tensor]:
    """A packed batch: ``rows[b]`` lists the lengths of the documents of batch row b.

    A document is (one image,) a prompt and an answer, ``turns`` times; documents alternate between
    the two sources.
    """
    generator = torch.Generator().manual_seed(seed)
    size, per_tile = (len(rows), seq), image_tokens(student)
    batch = {
        "input_ids": torch.full(size, 2),
        "position_ids": torch.zeros(size, dtype=torch.long),
        "labels": torch.full(size, -100),
        "document_ids": torch.full(size, -1),
    }
    table: dict[str, list[int]] = {k: [] for k in ("batch", "start", "length", "source", "sample")}
    for b, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            ids = torch.randint(3, VOCAB, (length,), generator=generator)
            offset = 2 + per_tile if images else 0
            if images:
                ids[2:offset] = student.image_token_id
            end = start + length
            batch["input_ids"][b, start:end] = ids
            batch["position_ids"][b, start:end] = torch.arange(length)
            batch["document_ids"][b, start:end] = number
            span = (length - offset) // turns
            for turn in range(turns):
                last = offset + (turn + 1) * span
                first = last - max(span // 2, 1)
                batch["labels"][b, start + first - 1 : start + last - 1] = ids[first:last]
            for key, value in zip(table, (b, start, length, len(table["source"]) % 2, 0)):
                table[key].append(value)
            start = end
        batch["position_ids"][b, start:] = torch.arange(seq - start)
    batch |= {f"doc_{k}": torch.tensor(v, dtype=torch.long) for k, v in table.items()}
    tiles = len(table["batch"]) if images else 0
    shape = (1, 3, 32, 32)
    if isinstance(student, HFVLM):
        shape = student.blank["pixel_values"].shape
    pixels = torch.rand(tiles, *shape[1:], generator=generator)
    return batch | {"pictures": {"pixel_values": pixels} if images else {}}


def image_tokens(student: Student) -> int:
    """Positions of one picture of one tile."""
    if isinstance(student, HFVLM):
        return picture_tokens(student.config)
    return student.config.mp_image_token_length


__all__ = ["SOURCES", "extra_tokens", "random_batch", "small_config", "weights", "write_pair"]
