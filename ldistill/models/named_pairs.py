"""Configurations of the named pairs, as their public checkpoints have them, and of folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PretrainedConfig

from ldistill.models import nanovlm_format
from ldistill.models.formats import format_of
from ldistill.models.hf_vlm import lm_config
from ldistill.models.nanovlm import decoder_config
from ldistill.models.nanovlm_config import NanoVLMConfig

_CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    "projection_dim": 768,
}  # fmt: skip
_SIGLIP_B = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip
_SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
_SIGLIP_SO400M = {"model_type": "siglip_vision_model", **_SO400M, "vision_use_head": False}
_INTERNVIT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
}  # fmt: skip
_QWEN25_VIT = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14,
}  # fmt: skip
_PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 1540, "patch_size": 14,
}  # fmt: skip


def _qwen3_vit(out: int) -> dict[str, Any]:
    names = ("depth", "hidden_size", "intermediate_size", "deepstack_visual_indexes")
    sizes = (27, 1152, 4304, [8, 16, 24]) if out > 4000 else (24, 1024, 4096, [5, 11, 17])
    rest = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304}
    return dict(zip(names, sizes, strict=True)) | rest | {"out_hidden_size": out}


def _text(
    kind: str, hidden: int, inter: int, layers: int, heads: int, kv: int, vocab: int, base: float,
    positions: int = 32768, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inter,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": vocab, "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": base, **more.pop("rope", {})},
        **more,
    }  # fmt: skip


class _Pair(NamedTuple):
    """A published student; ``tied``: whether its LM's head is tied, ``vocab``: of that LM."""

    student: str
    kind: str
    vision: dict[str, Any]
    text: dict[str, Any]
    vocab: int
    tied: bool = False
    rest: dict[str, Any] = {}  # noqa: RUF012 - read alone


def _smolvlm(name: str, *shape: int, base: float = 1e5) -> _Pair:
    text = _text("llama", *shape, 49280, base, 8192, rms_norm_eps=1e-5, pad_token_id=2)
    large, kind = "2.2B" in name, "smolvlm" if "VLM2" in name else "idefics3"
    rest = {"scale_factor": 3 if large else 4, "image_token_id": 49190, "pad_token_id": 2}
    vision = _SO400M if large else _SIGLIP_B
    return _Pair(f"HuggingFaceTB/{name}-Instruct", kind, vision, text, 49152, True, rest)


def _llava(size: str, *shape: int) -> _Pair:
    text = _text("llama", *shape, 32064, 1e4, 4096, rms_norm_eps=1e-5)
    rest = {"image_token_id": 32000, "vision_feature_layer": -2, "image_seq_length": 576}
    rest |= {"vision_feature_select_strategy": "default"}
    return _Pair(f"llava-hf/llava-1.5-{size}-hf", "llava", _CLIP_L, text, 32000, rest=rest)


def _internvl(size: str, *shape: int, vocab: int) -> _Pair:
    text = _text("qwen2", *shape, 151674, 1e6)
    name = f"OpenGVLab/InternVL3-{size}-hf"
    return _Pair(name, "internvl", _INTERNVIT, text, vocab, shape[0] < 3000)


def _qwen25(size: str, *shape: int, vocab: int, tied: bool) -> _Pair:
    rope = {"mrope_section": [16, 24, 24]}
    text = _text("qwen2_5_vl_text", *shape, vocab, 1e6, 128000, rope=rope)
    vision = _QWEN25_VIT | {"out_hidden_size": shape[0]}
    return _Pair(f"Qwen/Qwen2.5-VL-{size}-Instruct", "qwen2_5_vl", vision, text, vocab, tied)


def _qwen3(size: str, *shape: int, tied: bool) -> _Pair:
    rope = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = _text("qwen3_vl_text", *shape, 151936, 5e6, 262144, rope=rope, head_dim=128)
    vision = _qwen3_vit(shape[0])
    return _Pair(f"Qwen/Qwen3-VL-{size}-Instruct", "qwen3_vl", vision, text, 151936, tied)


def _gemma3(size: str, *shape: int) -> _Pair:
    text = _text("gemma3_text", *shape, 262208, 1e6, 131072, head_dim=256, sliding_window=1024)
    del text["rope_parameters"]  # its two bases are the class's own
    vision = _SIGLIP_SO400M | {"image_size": 896}
    return _Pair(f"google/gemma-3-{size}-it", "gemma3", vision, text, 262208, True)


def _onevision(size: str, *shape: int, vocab: int, tied: bool) -> _Pair:
    name = f"llava-hf/llava-onevision-qwen2-{size}-ov-hf"
    text = _text("qwen2", *shape, vocab + 64, 1e6)  # two tokens, padded to a multiple of 64
    vision = _SIGLIP_SO400M | {"num_hidden_layers": 26}
    rest = {"image_token_id": 151646, "vision_feature_layer": -1}
    return _Pair(name, "llava_onevision", vision, text, vocab, tied, rest)


_MISTRAL3 = _text(
    "mistral", 5120, 32768, 40, 32, 8, 131072, 1e9, 131072, head_dim=128, sliding_window=None
)
_PAIRS = {
    "smolvlm-256m": _smolvlm("SmolVLM-256M", 576, 1536, 30, 9, 3),
    "smolvlm-500m": _smolvlm("SmolVLM-500M", 960, 2560, 32, 15, 5),
    "smolvlm2-256m": _smolvlm("SmolVLM2-256M-Video", 576, 1536, 30, 9, 3),
    "smolvlm2-500m": _smolvlm("SmolVLM2-500M-Video", 960, 2560, 32, 15, 5),
    "smolvlm2-2.2b": _smolvlm("SmolVLM2-2.2B", 2048, 8192, 24, 32, 32, base=1.3e5),
    "llava-7b": _llava("7b", 4096, 11008, 32, 32, 32),
    "llava-13b": _llava("13b", 5120, 13824, 40, 40, 40),
    "internvl3-1b": _internvl("1B", 896, 4864, 24, 14, 2, vocab=151936),
    "internvl3-2b": _internvl("2B", 1536, 8960, 28, 12, 2, vocab=151936),
    "internvl3-8b": _internvl("8B", 3584, 18944, 28, 28, 4, vocab=152064),
    "qwen2.5-vl-3b": _qwen25("3B", 2048, 11008, 36, 16, 2, vocab=151936, tied=True),
    "qwen2.5-vl-7b": _qwen25("7B", 3584, 18944, 28, 28, 4, vocab=152064, tied=False),
    "qwen3-vl-2b": _qwen3("2B", 2048, 6144, 28, 16, 8, tied=True),
    "qwen3-vl-4b": _qwen3("4B", 2560, 9728, 36, 32, 8, tied=True),
    "qwen3-vl-8b": _qwen3("8B", 4096, 12288, 36, 32, 8, tied=False),
    "gemma3-4b": _gemma3("4b", 2560, 10240, 34, 8, 4),
    "gemma3-12b": _gemma3("12b", 3840, 15360, 48, 16, 8),
    "llava-onevision-0.5b": _onevision("0.5b", 896, 4864, 24, 14, 2, vocab=151936, tied=True),
    "llava-onevision-7b": _onevision("7b", 3584, 18944, 28, 28, 4, vocab=152064, tied=False),
    "mistral3-24b": _Pair(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3", _PIXTRAL, _MISTRAL3, 131072,
        rest={"image_token_id": 10, "spatial_merge_size": 2, "vision_feature_layer": -1},
    ),
}  # fmt: skip

# Students whose configurations are known here, so that planning them needs no hub.
KNOWN_STUDENTS = {
    "lusxvr/nanoVLM-460M-8k": "nanovlm-460m",
    **{pair.student: name for name, pair in _PAIRS.items()},
}


def student_config(name: str) -> NanoVLMConfig | PretrainedConfig:
    """Configuration of a named pair's student."""
    if name == "nanovlm-460m":
        return NanoVLMConfig()
    pair = _PAIRS[name]
    # The head's tie is the student's: SmolVLM has two matrices where its LM has one.
    tied = pair.tied and pair.kind not in ("idefics3", "smolvlm", "internvl")
    return AutoConfig.for_model(
        pair.kind,
        vision_config=dict(pair.vision),
        text_config=dict(pair.text),
        tie_word_embeddings=tied,
        **pair.rest,
    )


def _pair_of(config: PretrainedConfig) -> _Pair | None:
    """The named pair whose decoder this is, known by its sizes."""
    text = config.text_config
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
    of_its_kind = (pair for pair in _PAIRS.values() if pair.kind == config.model_type)
    return next((p for p in of_its_kind if all(p.text[n] == getattr(text, n) for n in sizes)), None)


def base_vocabulary(config: NanoVLMConfig | PretrainedConfig) -> int:
    """Tokens of the LM a student was built on; its own where that is not known."""
    if isinstance(config, NanoVLMConfig):
        return config.lm_base_vocab_size
    pair = _pair_of(config)
    return pair.vocab if pair else config.text_config.vocab_size


def folder_config(folder: Path) -> NanoVLMConfig | PretrainedConfig:
    """Configuration of a student's folder. Raises ValueError for a family that is not known."""
    nano = format_of(folder) is nanovlm_format
    return NanoVLMConfig.load(folder) if nano else AutoConfig.from_pretrained(folder)


def teacher_config(config: NanoVLMConfig | PretrainedConfig) -> PretrainedConfig:
    """The LM's configuration: the student's decoder over the base vocabulary.

    Decoders of a kind of their own (Qwen2-VL's) stand for their LM: they have its shapes.
    """
    if isinstance(config, NanoVLMConfig):
        lm = decoder_config(config)
    else:
        text = config.text_config
        lm = copy.deepcopy(lm_config(text))
        pair = _pair_of(config)
        lm.tie_word_embeddings = pair.tied if pair else text.tie_word_embeddings
    lm.vocab_size = base_vocabulary(config)
    return lm
