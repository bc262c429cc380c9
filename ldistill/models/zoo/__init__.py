"""Small random pairs of every family on disk: what checks and tests run on.

A student is one of transformers' own class with its real processor; beside it lies the LM of its
decoder's kind, with the same tokenizer. A few seconds and a few hundred kilobytes each.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import PretrainedConfig as Config
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from ldistill.models.fit import reduced, small_sizes
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.nanovlm_format import save_nanovlm
from ldistill.models.zoo import parts
from ldistill.models.zoo.families import FAMILIES, ROPE, Family

__all__ = ["FAMILIES", "Family", "copy_decoder", "write_pair", "write_reduced"]

_DECODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
_DECODER |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_parameters": ROPE}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_heads": 2}
_TOWER |= {"embed_dim": 32, "out_hidden_size": 64, "projection_dim": 32, "head_dim": 16}
_TOWER |= {"deepstack_visual_indexes": [0, 1], "fullatt_block_indexes": [1]}


def write_pair(name: str, root: Path) -> Path:
    """``root/student``, which is returned, and ``root/teacher``: checkpoints of a family."""
    family = FAMILIES[name]
    lm_tokenizer = parts.base_tokenizer(family.inside, bos=family.bos, eos=family.eos)
    lm_tokenizer.save_pretrained(root / "teacher")
    lm = AutoModelForCausalLM.from_config(_text_config(family, lm_tokenizer, parts.VOCAB))
    parts.spread(lm, 1)
    lm.save_pretrained(root / "teacher")
    if family.kind == "nanovlm":
        student = NanoVLM(_nanovlm_config(family, root))
        parts.spread(student, 0)
        save_nanovlm(student, root / "student")
    else:
        tokenizer = parts.student_tokenizer(lm_tokenizer, family.behind, family.named)
        student = AutoModelForImageTextToText.from_config(_student_config(family, tokenizer))
        parts.spread(student, 0)
        student.save_pretrained(root / "student", max_shard_size="200KB")  # several files
        _processor(family, tokenizer).save_pretrained(root / "student")
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


def _text_config(family: Family, tokenizer: Tokenizer, vocab: int, **changes) -> Config:
    # What these configurations default to lies outside the small vocabulary.
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    small = small_sizes(AutoConfig.for_model(family.lm))
    values = _DECODER | small | ids | dict(family.text) | {"vocab_size": vocab} | changes
    # A configuration completes the rotary parameters it is given.
    return AutoConfig.for_model(family.lm, **copy.deepcopy(values))


def _student_config(family: Family, tokenizer: Tokenizer) -> Config:
    vocab = family.vocab if family.behind else parts.VOCAB
    text = _text_config(family, tokenizer, vocab, **family.student_text)
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in family.ids.items()}
    own = AutoConfig.for_model(family.kind)
    # With fields of its own, the decoder is of a kind of its own, too (Qwen2-VL's).
    kind = type(own.text_config) if family.student_text else type(text)
    values = {"vocab_size": vocab} if "vocab_size" in own.to_dict() else {}
    sizes = {"image_size": parts.SIDE, "patch_size": parts.PATCH, "num_position_embeddings": 16}
    tower = _small_tower(own.vision_config, num_hidden_layers=2, depth=2, **sizes)
    return type(own)(
        text_config=kind.from_dict(text.to_dict() | {"model_type": kind.model_type}),
        vision_config={"model_type": own.vision_config.model_type, **tower, **family.vision},
        tie_word_embeddings=False,
        **values,
        **family.config,
        **ids,
    )


def _processor(family: Family, tokenizer: Tokenizer):
    """Of the classes that transformers' auto classes take for its kind, unless it names another."""
    own = IMAGE_PROCESSOR_MAPPING_NAMES.get(family.kind)
    images = getattr(transformers, family.images or own["torchvision"])
    made = {"tokenizer": tokenizer, "image_processor": images(**family.image_options)}
    if videos := VIDEO_PROCESSOR_MAPPING_NAMES.get(family.kind):
        made["video_processor"] = getattr(transformers, videos["torchvision"])()
    processor = getattr(transformers, PROCESSOR_MAPPING_NAMES[family.kind])
    return processor(**made, chat_template=family.template, **family.processor_options)


def write_reduced(student: Path, teacher: Path, root: Path) -> None:
    """``root/student`` and ``root/teacher``: a user's pair of folders, small and random, all else
    as it is; weights are not read."""
    whole, lm = (AutoConfig.from_pretrained(folder) for folder in (student, teacher))
    text = whole.get_text_config()
    small = {"text_config": reduced(text, text.vocab_size), "vision_config": _reduced_vision(whole)}
    fields = {"hidden_size": 64} if "hidden_size" in whole.to_dict() else {}
    config = type(whole)(**(whole.to_dict() | small | fields))
    for part, folder, model in (
        ("student", student, AutoModelForImageTextToText.from_config(config)),
        ("teacher", teacher, AutoModelForCausalLM.from_config(reduced(lm, lm.vocab_size))),
    ):
        parts.spread(model, 0)
        model.save_pretrained(root / part)
        for file in folder.iterdir():
            written = file.name == "config.json" or "safetensors" in file.name
            if file.suffix in (".json", ".jinja", ".model", ".txt") and not written:
                shutil.copyfile(file, root / part / file.name)


def _reduced_vision(whole: Config) -> Config:
    """Its tower with three layers, as features of some are taken; patches as they are."""
    vision = whole.vision_config
    small = _small_tower(vision, num_hidden_layers=3, depth=3)
    return type(vision).from_dict(vision.to_dict() | small)


def _small_tower(vision: Config, **sizes: int) -> dict[str, Any]:
    """Those of `_TOWER` and ``sizes`` that towers of this kind have."""
    values, sizes = vision.to_dict(), _TOWER | sizes
    small = {name: size for name, size in sizes.items() if values.get(name) is not None}
    # Qwen2-VL calls the decoder's width hidden.
    return small | ({"hidden_size": 64} if "embed_dim" in values else {})


def copy_decoder(backbone: Model, head: nn.Linear, lm: Model) -> None:
    """Give an LM, with which it fits, a student decoder's weights; of the vocabularies, what both
    have."""
    mine, embedding = backbone.state_dict(), lm.get_input_embeddings().weight
    with torch.no_grad():
        lm.base_model.load_state_dict(mine | {"embed_tokens.weight": embedding})
        for to, weight in (
            (embedding, mine["embed_tokens.weight"]),
            (lm.get_output_embeddings().weight, head.weight),
        ):
            shared = min(len(to), len(weight))
            to[:shared] = weight[:shared]
