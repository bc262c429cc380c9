"""The families by name, in small sizes: what the published checkpoints of each are made of.

Each becomes, on disk, a random student of transformers' real class with a real processor, and the
LM of its decoder's kind. Names in it are transformers': of classes, of configurations' fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldistill.models.nanovlm_config import extra_tokens
from ldistill.models.zoo import parts
from ldistill.models.zoo.parts import END, PATCH, SIDE

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One kind of student and the kind of LM it was built on."""

    called: str  # what people call it
    kind: str  # ``model_type`` of the student
    lm: str  # and of its LM
    vision: Fields = field(default_factory=dict)  # of its tower's configuration, beyond small sizes
    text: Fields = field(default_factory=dict)  # of the decoder's, likewise
    config: Fields = field(default_factory=dict)  # of the whole student's
    student_text: Fields = field(default_factory=dict)  # of the decoder's too, but not of the LM's
    ids: Fields = field(default_factory=dict)  # of the student's: the ids of these tokens
    template: str | None = None  # of :mod:`parts`; None where the checkpoints have none
    images: str = ""  # class of its image processor, where it is not the kind's own
    image_options: Fields = field(default_factory=dict)  # arguments of the image processor
    processor_options: Fields = field(default_factory=dict)  # and of the whole one
    behind: Sequence[str] = ()  # its tokens behind the LM's vocabulary
    inside: Sequence[str] = ()  # its tokens in it
    named: Mapping[str, str] = field(default_factory=dict)  # what the processor asks for by name
    vocab: int = parts.STUDENT_VOCAB  # of the student, where tokens are behind
    bos: str | None = None  # of the LM's tokenizer
    eos: str = END


# ---- what several share ----

HIDDEN = 64
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
TILES = {**SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
AREA = {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": 64 * PATCH * PATCH}
PIXELS = {"patch_size": PATCH, "merge_size": 2, "size": AREA}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
GRID_OF_4 = {k: v for k, v in extra_tokens(4, 4).items() if k != "global_image_token"}
PLACES = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
GLM_ROPE = {**ROPE, "partial_rotary_factor": 0.5}
VISION_IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
OVIS_TOKENS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


# ---- the kinds ----

LLAVA = Family(
    called="LLaVA-1.5", kind="llava", lm="llama", bos="<s>", eos="</s>", template=parts.LLAVA,
    text={"num_key_value_heads": 4}, config={"image_seq_length": 16},
    ids={"image_token_index": "<image>"}, behind=("<image>",),
    images="CLIPImageProcessor", image_options=CROPPED,
    processor_options={
        "patch_size": PATCH, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
)  # fmt: skip
FULL = {"vision_feature_select_strategy": "full"}
LLAVA_SIGLIP = replace(
    LLAVA, vision={"model_type": "siglip_vision_model"}, text={},
    images="SiglipImageProcessor", image_options=SQUARE,
    config={"image_seq_length": 16, **FULL}, processor_options={"patch_size": PATCH, **FULL},
)  # fmt: skip
ANYRES = {**FULL, "vision_aspect_ratio": "anyres_max_9"}
IDEFICS3 = Family(
    called="Idefics3", kind="idefics3", lm="llama", bos="<|im_start|>", template=parts.SMOLVLM,
    config={"scale_factor": 2}, ids={"image_token_id": "<image>", "pad_token_id": "<pad>"},
    behind=("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *PLACES),
    image_options={"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
    processor_options={"image_seq_len": 4},
)  # fmt: skip
INTERNVL = Family(
    called="InternVL3", kind="internvl", lm="qwen2", template=parts.chatml("<IMG_CONTEXT>\n"),
    student_text={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    config={"image_seq_length": 4}, ids={"image_token_id": "<IMG_CONTEXT>"},
    image_options=TILES, processor_options={"image_seq_length": 4},
    behind=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    named={
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    },
)  # fmt: skip
QWEN2_VL = Family(
    called="Qwen2-VL", kind="qwen2_vl", lm="qwen2", image_options=PIXELS,
    template=parts.chatml(QWEN_PICTURE, "You are a helpful assistant."),
    student_text={"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    ids={
        **VISION_IDS, "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    inside=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)  # fmt: skip
QWEN3_VL = replace(
    QWEN2_VL, called="Qwen3-VL", kind="qwen3_vl", lm="qwen3", template=parts.chatml(QWEN_PICTURE),
    vision={"depth": 3},
)  # fmt: skip
PALIGEMMA = Family(
    called="PaliGemma", kind="paligemma", lm="gemma", bos="<bos>", eos="<eos>",
    config={"projection_dim": HIDDEN, "hidden_size": HIDDEN},
    ids={"image_token_index": "<image>"}, behind=("<image>",), vocab=1536,
    image_options={**SQUARE, "image_seq_length": 16},
)  # fmt: skip
MISTRAL3 = Family(
    called="Mistral 3", kind="mistral3", lm="mistral", bos="<s>", eos="</s>",
    template=parts.MISTRAL3, text={"sliding_window": None}, vision={"image_size": 2 * SIDE},
    config={"spatial_merge_size": 2, "vision_feature_layer": -1},
    ids={"image_token_index": "[IMG]"},
    image_options={"size": {"longest_edge": 2 * SIDE}, "patch_size": PATCH},
    processor_options={"patch_size": PATCH, "spatial_merge_size": 2},
    inside=(
        "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
    ),
)  # fmt: skip
GLM4V = Family(
    called="GLM-4.1V", kind="glm4v", lm="glm4", eos="<|endoftext|>", template=parts.GLM,
    text={"attention_bias": True, "rope_parameters": GLM_ROPE},
    student_text={"rope_parameters": {**GLM_ROPE, "mrope_section": [1, 1, 2]}},
    ids={
        "image_token_id": "<|image|>", "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>",
    },
    image_options=PIXELS,
    inside=(
        "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>",
        "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    ),
)  # fmt: skip
AYA = Family(
    called="Aya Vision", kind="aya_vision", lm="cohere2", bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>", template=parts.COHERE,
    text={"logit_scale": 2.0, **WINDOWS}, config={"downsample_factor": 2},
    ids={"image_token_index": "<|IMG_PATCH|>"}, image_options=TILES,
    processor_options={"patch_size": 2 * PATCH, "img_size": SIDE},
    inside=(
        "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
        "<|SYSTEM_TOKEN|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL",
    ),
)  # fmt: skip
NANOVLM = Family(
    called="nanoVLM", kind="nanovlm", lm="llama", bos="<|im_start|>",
    text={"tie_word_embeddings": True}, config={"vlm_extra_tokens": extra_tokens()},
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "nanovlm": NANOVLM,
    "nanovlm-222m": replace(NANOVLM, called="nanoVLM-222M", config={"vlm_extra_tokens": GRID_OF_4}),
    "llava": LLAVA,
    "llava-next": replace(
        LLAVA, called="LLaVA-NeXT", kind="llava_next", lm="mistral", template=parts.INST,
        text={"sliding_window": None}, images="",
        config={"image_grid_pinpoints": GRID, "image_seq_length": 16},
        image_options={**CROPPED, "image_grid_pinpoints": GRID},
    ),
    "llava-onevision": replace(
        LLAVA, called="LLaVA-OneVision", kind="llava_onevision", lm="qwen2", bos=None, eos=END,
        template=parts.ONEVISION, text={},
        config={"image_grid_pinpoints": GRID, "vision_feature_layer": -1, **ANYRES},
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        images="", image_options={**SQUARE, "image_grid_pinpoints": GRID},
        processor_options={"num_image_tokens": 16, **ANYRES}, behind=("<image>", "<video>"),
    ),
    "smolvlm": replace(IDEFICS3, called="SmolVLM"),
    "smolvlm2": replace(
        IDEFICS3, called="SmolVLM2", kind="smolvlm",
        named={
            "fake_image_token": "<fake_token_around_image>", "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>",
        },
    ),
    "idefics3": replace(
        IDEFICS3, text={"num_key_value_heads": 1}, config={"scale_factor": 4},
        processor_options={"image_seq_len": 1},
    ),
    "internvl": INTERNVL,
    "internvl-qwen3": replace(INTERNVL, called="InternVL3.5", lm="qwen3", student_text={}),
    "internvl-llama": replace(INTERNVL, called="InternVL with Llama", lm="llama", student_text={}),
    "qwen2-vl": QWEN2_VL,
    "qwen2.5-vl": replace(
        QWEN2_VL, called="Qwen2.5-VL", kind="qwen2_5_vl", vision={"window_size": 4 * PATCH}
    ),
    "qwen3-vl": QWEN3_VL,
    "gemma3": Family(
        called="Gemma 3", kind="gemma3", lm="gemma3_text", bos="<bos>", eos="<eos>",
        template=parts.GEMMA, config={"mm_tokens_per_image": 4},
        text={
            **GEMMA, **WINDOWS, "rope_parameters": {
                "full_attention": {**ROPE, "rope_theta": 1e6}, "sliding_attention": ROPE,
            },
        },
        ids={
            "image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        image_options=SQUARE, processor_options={"image_seq_length": 4},
        behind=("<image_soft_token>",),
        inside=("<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"),
        named={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
    "paligemma": PALIGEMMA,
    "paligemma2": replace(
        PALIGEMMA, called="PaliGemma 2", lm="gemma2",
        text={**GEMMA, **WINDOWS, "sliding_window": 512},
    ),
    "mistral3": MISTRAL3,
    "glm4v": GLM4V,
    "glm46v": replace(GLM4V, called="GLM-4.6V", kind="glm46v"),
    "ovis2": Family(
        called="Ovis2", kind="ovis2", lm="qwen2", template=parts.chatml("<image>\n"),
        vision={"vocab_size": 64}, config={"hidden_size": HIDDEN}, image_options=TILES,
        ids={"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": OVIS_TOKENS},
        processor_options={"image_seq_length": 16}, inside=("<image>", "<IMG_ATOM>", *OVIS_TOKENS),
    ),
    "aya-vision": AYA,
    "cohere2-vision": replace(
        AYA, called="Command A Vision", kind="cohere2_vision",
        config={"downsample_factor": 2, "alignment_intermediate_size": 64},
        ids={"image_token_id": "<|IMG_PATCH|>"}, processor_options={},
        image_options={**SQUARE, "min_patches": 1, "max_patches": 4, "patch_size": 2},
        template=parts.COHERE.replace("<image>", "<|IMG_PATCH|>"),
        named={
            "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>", "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    ),
    "qwen3-vl-moe": replace(
        QWEN3_VL, called="Qwen3-VL MoE", kind="qwen3_vl_moe", lm="qwen3_moe",
        images="Qwen2VLImageProcessor", text={"decoder_sparse_step": 1, "norm_topk_prob": True},
    ),
    "kimi": Family(
        called="Kimi-VL", kind="kimi_k25", lm="deepseek_v3", bos="[BOS]", template=parts.KIMI,
        vision={"pos_emb_height": 4, "pos_emb_width": 4}, text={"num_key_value_heads": 4},
        config={"projection_hidden_size": 32},
        ids={
            "image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>",
            "vision_start_token_id": "<|media_begin|>", "vision_end_token_id": "<|media_end|>",
        },
        image_options={
            "patch_size": PATCH, "merge_size": 2, "max_patches": 64,
            "size": {"max_height": 8, "max_width": 8},
        },
        inside=(
            "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|media_begin|>",
            "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>",
        ),
    ),
    "videollama3": replace(
        QWEN2_VL, called="VideoLLaMA 3", kind="video_llama_3", student_text={}, ids=VISION_IDS,
        template=parts.chatml("<|image_pad|>\n"),
    ),
    "llava-qwen2": replace(LLAVA_SIGLIP, called="LLaVA with Qwen2", lm="qwen2"),
    "llava-qwen3": replace(LLAVA_SIGLIP, called="LLaVA with Qwen3", lm="qwen3"),
    "llava-phi3": replace(LLAVA_SIGLIP, called="LLaVA with Phi-3", lm="phi3"),
    "llava-granite": replace(
        LLAVA_SIGLIP, called="LLaVA with Granite", lm="granite",
        text={"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
              "embedding_multiplier": 2.0},
    ),
    "llava-olmo2": replace(LLAVA_SIGLIP, called="LLaVA with OLMo 2", lm="olmo2"),
    "llava-gemma2": replace(
        LLAVA_SIGLIP, called="LLaVA with Gemma 2", lm="gemma2", text={**GEMMA, **WINDOWS}
    ),
    "llava-gpt-oss": replace(LLAVA_SIGLIP, called="LLaVA with gpt-oss", lm="gpt_oss", text=WINDOWS),
    "smolvlm-smollm3": replace(
        IDEFICS3, called="SmolVLM with SmolLM3", lm="smollm3",
        text={"no_rope_layers": [1, 0], "use_sliding_window": False},
    ),
    "mistral3-ministral3": replace(
        MISTRAL3, called="Ministral 3", lm="ministral3",
        text={
            "sliding_window": None, "rope_parameters": {
                "type": "yarn", "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
    ),
}  # fmt: skip
