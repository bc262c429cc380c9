"""Small random pairs of every family on disk: what checks and tests run on.

A student is one of transformers' own class with its real processor; beside it lies the LM of its
decoder's kind, with the same tokenizer. A few seconds and a few hundred kilobytes each.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.nanovlm_format import save_nanovlm
from ldistill.models.zoo import parts
from ldistill.models.zoo.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "copy_decoder", "write_pair"]

_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": False,
}


def write_pair(name: str, root: Path, *, same_weights: bool = False, seed: int = 0) -> Path:
    """``root/student``, which is returned, and ``root/teacher``: checkpoints of a family.

    Args:
        name: of ``FAMILIES``.
        root: where to write.
        same_weights: give the LM the student decoder's weights, so that its logits must be equal.
        seed: of the weights.
    """
    family = FAMILIES[name]
    lm_tokenizer = parts.base_tokenizer(family.inside, bos=family.bos, eos=family.eos)
    lm_tokenizer.save_pretrained(root / "teacher")
    lm = AutoModelForCausalLM.from_config(_text_config(family, lm_tokenizer, parts.VOCAB))
    parts.spread(lm, seed + 1)
    if family.kind == "nanovlm":
        student = NanoVLM(_nanovlm_config(family, root))
        parts.spread(student, seed)
        save_nanovlm(student, root / "student")
        decoder = student.decoder
    else:
        tokenizer = parts.student_tokenizer(lm_tokenizer, family.behind, family.named)
        student = AutoModelForImageTextToText.from_config(_student_config(family, tokenizer))
        parts.spread(student, seed)
        student.save_pretrained(root / "student", max_shard_size="200KB")  # several files
        _processor(family, tokenizer).save_pretrained(root / "student")
        decoder = student
    if same_weights:
        copy_decoder(decoder, lm)
    lm.save_pretrained(root / "teacher")
    return root / "student"


def _nanovlm_config(family: Family, root: Path) -> NanoVLMConfig:
    extra = family.config["vlm_extra_tokens"]
    return NanoVLMConfig(
        vit_hidden_dim=32, vit_inter_dim=64, vit_patch_size=parts.PATCH, vit_img_size=parts.SIDE,
        vit_n_heads=2, vit_n_blocks=2, lm_hidden_dim=64, lm_inter_dim=96, lm_re_base=10000,
        lm_max_position_embeddings=512, lm_base_vocab_size=parts.VOCAB, lm_n_heads=4,
        extra_token_amount=len(extra), lm_vocab_size=parts.VOCAB + len(extra), lm_n_kv_heads=2,
        lm_n_blocks=2, mp_pixel_shuffle_factor=2, mp_image_token_length=4,
        max_img_size=2 * parts.SIDE, lm_max_length=512, lm_tokenizer=str(root / "teacher"),
        lm_model_type=str(root / "teacher"), vlm_extra_tokens=dict(extra),
    )  # fmt: skip


def _text_config(
    family: Family, tokenizer: PreTrainedTokenizerFast, vocab: int, **changes
) -> PretrainedConfig:
    # What these configurations default to lies outside the small vocabulary.
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    ids = {name: getattr(tokenizer, name) for name in names}
    values = _DECODER | ids | dict(family.text) | {"vocab_size": vocab} | changes
    return AutoConfig.for_model(family.lm, **values)


def _student_config(family: Family, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    vocab = family.vocab if family.behind else parts.VOCAB
    text = _text_config(family, tokenizer, vocab, **family.student_text)
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in family.ids.items()}
    own = AutoConfig.for_model(family.kind)
    # With fields of its own, the decoder is of a kind of its own, too (Qwen2-VL's).
    kind = type(own.text_config) if family.student_text else type(text)
    values = {"vocab_size": vocab} if "vocab_size" in own.to_dict() else {}
    return type(own)(
        text_config=kind.from_dict(text.to_dict() | {"model_type": kind.model_type}),
        vision_config=dict(family.vision),
        tie_word_embeddings=False,
        **values,
        **family.config,
        **ids,
    )


def _processor(family: Family, tokenizer: PreTrainedTokenizerFast):
    made = {
        "image_processor": getattr(transformers, family.images)(**family.image_options),
        "tokenizer": tokenizer,
    }
    if family.videos:
        made["video_processor"] = getattr(transformers, family.videos)()
    return getattr(transformers, family.processor)(
        **made, chat_template=family.template, **family.processor_options
    )


def copy_decoder(student: PreTrainedModel, lm: PreTrainedModel) -> None:
    """Give an LM the weights of a student's decoder, up to its own vocabulary.

    Raises:
        ValueError: tensors that only one of the two has, or of another shape.
    """
    theirs = lm.base_model.state_dict()
    mine = student.get_decoder().state_dict()
    mine = {key: tensor[: len(theirs[key])] if key.startswith("embed_tokens.") else tensor
            for key, tensor in mine.items()}  # fmt: skip
    problems = [f"{key} is only in one" for key in sorted(set(theirs) ^ set(mine))]
    problems += [
        f"{key}: {list(mine[key].shape)} and {list(theirs[key].shape)}"
        for key in sorted(set(theirs) & set(mine))
        if mine[key].shape != theirs[key].shape
    ]
    if problems:
        raise ValueError(f"not the decoder of this LM: {'; '.join(problems[:5])}.")
    lm.base_model.load_state_dict(mine)
    head = lm.get_output_embeddings().weight
    with torch.no_grad():
        head.copy_(student.get_output_embeddings().weight[: len(head)])
