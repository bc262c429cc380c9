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

# Vision towers that are not what the family's class has without a word.
_SIGLIP_B = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip
_SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
_GEMMA3_VIT = {
    **_SO400M, "model_type": "siglip_vision_model", "image_size": 896, "vision_use_head": False,
}  # fmt: skip
_QWEN3_SMALL_VIT = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip


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
    text: dict[str, Any]
    vocab: int
    tied: bool = False
    more: dict[str, Any] = {}  # noqa: RUF012 - read alone


def _smolvlm(name: str, *shape: int, base: float = 1e5) -> _Pair:
    text = _text("llama", *shape, 49280, base, 8192, rms_norm_eps=1e-5, pad_token_id=2)
    large, kind = "2.2B" in name, "smolvlm" if "VLM2" in name else "idefics3"
    more = {"scale_factor": 3 if large else 4, "image_token_id": 49190, "pad_token_id": 2}
    more |= {"vision_config": _SO400M if large else _SIGLIP_B}
    return _Pair(f"HuggingFaceTB/{name}-Instruct", kind, text, 49152, True, more)


def _llava(size: str, *shape: int) -> _Pair:
    text = _text("llama", *shape, 32064, 1e4, 4096, rms_norm_eps=1e-5)
    return _Pair(f"llava-hf/llava-1.5-{size}-hf", "llava", text, 32000)


def _internvl(size: str, *shape: int, vocab: int) -> _Pair:
    text, name = _text("qwen2", *shape, 151674, 1e6), f"OpenGVLab/InternVL3-{size}-hf"
    return _Pair(name, "internvl", text, vocab, shape[0] < 3000)


def _qwen25(size: str, *shape: int, vocab: int, tied: bool) -> _Pair:
    rope = {"mrope_section": [16, 24, 24]}
    text = _text("qwen2_5_vl_text", *shape, vocab, 1e6, 128000, rope=rope)
    more = {"vision_config": {"hidden_size": 1280, "out_hidden_size": shape[0]}}
    return _Pair(f"Qwen/Qwen2.5-VL-{size}-Instruct", "qwen2_5_vl", text, vocab, tied, more)


def _qwen3(size: str, *shape: int, tied: bool) -> _Pair:
    rope = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = _text("qwen3_vl_text", *shape, 151936, 5e6, 262144, rope=rope, head_dim=128)
    vision = {"out_hidden_size": shape[0]} | (_QWEN3_SMALL_VIT if tied else {})
    more = {"vision_config": vision}
    return _Pair(f"Qwen/Qwen3-VL-{size}-Instruct", "qwen3_vl", text, 151936, tied, more)


def _gemma3(size: str, *shape: int) -> _Pair:
    text = _text("gemma3_text", *shape, 262208, 1e6, 131072, head_dim=256, sliding_window=1024)
    del text["rope_parameters"]  # its two bases are the class's own
    more = {"vision_config": _GEMMA3_VIT}
    return _Pair(f"google/gemma-3-{size}-it", "gemma3", text, 262208, True, more)


def _onevision(size: str, *shape: int, vocab: int, tied: bool) -> _Pair:
    name = f"llava-hf/llava-onevision-qwen2-{size}-ov-hf"
    text = _text("qwen2", *shape, vocab + 64, 1e6)  # two tokens, padded to a multiple of 64
    more = {"image_token_id": 151646, "vision_feature_layer": -1}
    return _Pair(name, "llava_onevision", text, vocab, tied, more)


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
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3", _MISTRAL3, 131072,
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
    values = copy.deepcopy({"text_config": pair.text, **pair.more})  # a configuration changes them
    return AutoConfig.for_model(pair.kind, tie_word_embeddings=tied, **values)


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
