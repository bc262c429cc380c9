"""Configurations of the named pairs, as their public checkpoints have them, and of folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Idefics3Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PretrainedConfig,
)

from ldistill.models.hf_vlm import FAMILIES
from ldistill.models.nanovlm import decoder_config
from ldistill.models.nanovlm_config import NanoVLMConfig

# Named pairs and the recipes that train them.
RECIPES = {
    "tiny": "tiny",
    "nanovlm-460m": "lingudistill",
    "smolvlm-256m": "smolvlm-256m",
    "smolvlm-500m": "smolvlm-500m",
    "llava-7b": "llava-7b",
    "llava-13b": "llava-13b",
}
PAIRS = tuple(RECIPES)
# Students whose configurations are known here, so that planning them needs no hub.
KNOWN_STUDENTS = {
    "lusxvr/nanoVLM-460M-8k": "nanovlm-460m",
    "HuggingFaceTB/SmolVLM-256M-Instruct": "smolvlm-256m",
    "HuggingFaceTB/SmolVLM-500M-Instruct": "smolvlm-500m",
    "llava-hf/llava-1.5-7b-hf": "llava-7b",
    "llava-hf/llava-1.5-13b-hf": "llava-13b",
}


def student_config(name: str) -> NanoVLMConfig | PretrainedConfig:
    """Configuration of a named pair's student."""
    if name == "tiny":
        return _tiny_config()
    if name == "nanovlm-460m":
        return NanoVLMConfig()
    family, _, size = name.partition("-")
    return {"smolvlm": _smolvlm_config, "llava": _llava_config}[family](size)


def _tiny_config() -> NanoVLMConfig:
    from ldistill.tiny.align import student_config as tiny_config
    from ldistill.tiny.pretrain import lm_config
    from ldistill.tiny.tokenizer import VOCABULARY

    with torch.device("meta"):
        return tiny_config(LlamaForCausalLM(lm_config(VOCABULARY)))


def _llava_config(size: str) -> LlavaConfig:
    """LLaVA-1.5: CLIP ViT-L/14 at 336 pixels, an MLP of two layers, Vicuna."""
    hidden, inter, layers, heads = {
        "7b": (4096, 11008, 32, 32),
        "13b": (5120, 13824, 40, 40),
    }[size]
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
    )


def _smolvlm_config(size: str) -> Idefics3Config:
    """SmolVLM: SigLIP-B/16 at 512 pixels, pixel shuffle by 4 and a Linear, SmolLM2; head untied."""
    hidden, inter, layers, heads, kv_heads = {
        "256m": (576, 1536, 30, 9, 3),
        "500m": (960, 2560, 32, 15, 5),
    }[size]
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    text = LlamaConfig(
        vocab_size=49280,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        pad_token_id=2,
    )
    return Idefics3Config(
        vision_config=vision,
        text_config=text,
        scale_factor=4,
        image_token_id=49190,
        tie_word_embeddings=False,
        pad_token_id=2,
    )


def base_vocabulary(config: NanoVLMConfig | PretrainedConfig) -> int:
    """Tokens of the LM a student was built on."""
    if isinstance(config, NanoVLMConfig):
        return config.lm_base_vocab_size
    # Both families append their own tokens after the LM's.
    return {32064: 32000, 49280: 49152}.get(
        config.text_config.vocab_size, config.text_config.vocab_size
    )


def folder_config(folder: Path) -> NanoVLMConfig | PretrainedConfig:
    values, _ = PretrainedConfig.get_config_dict(folder)
    if "vit_hidden_dim" in values:
        return NanoVLMConfig.load(folder)
    if values.get("model_type") not in FAMILIES:
        raise ValueError(
            f"{folder} holds a {values.get('model_type')!r} model; shapes are known of nanoVLM, "
            f"{', '.join(FAMILIES)}."
        )
    return AutoConfig.from_pretrained(folder)


def teacher_config(config: NanoVLMConfig | PretrainedConfig) -> PretrainedConfig:
    """The LM's configuration: the student's decoder over the base vocabulary."""
    if isinstance(config, NanoVLMConfig):
        lm = decoder_config(config)
    else:
        lm = type(config.text_config).from_dict(config.text_config.to_dict())
        # SmolLM2 ties its head although SmolVLM does not.
        lm.tie_word_embeddings = config.model_type != "llava"
    lm.vocab_size = base_vocabulary(config)
    return lm
