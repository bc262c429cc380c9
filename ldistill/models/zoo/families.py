"""The families: what the published checkpoints of each are made of, as a table of small sizes.

Each entry becomes, on disk, a random student of transformers' real class with a real processor, and
the LM of its decoder's kind. Names in it are transformers': of classes, of configurations' fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldistill.models.nanovlm_config import extra_tokens
from ldistill.models.zoo import parts
from ldistill.models.zoo.parts import END, PATCH, SIDE

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
_HIDDEN = 64


@dataclass(frozen=True)
class Family:
    """One kind of student and the kind of LM it was built on.

    Args:
        called: what people call it.
        kind: ``model_type`` of the student.
        lm: ``model_type`` of its LM.
        vision: fields of the vision tower's configuration.
        processor, images, videos: classes of its processor and the parts.
        template: its chat template, of :mod:`parts`; None where the checkpoints have none.
        text: fields of the decoder's configuration, beyond those that all share.
        student_text: fields that only the student's decoder has.
        config: other fields of the student's configuration.
        ids: fields of the student's configuration that hold the ids of tokens.
        processor_options, image_options: arguments of the processor, of the image processor.
        behind, inside: its tokens, behind the LM's vocabulary or in it.
        named: tokens that the processor asks the tokenizer for.
        vocab: of the student, where tokens are behind.
        bos, eos: of the LM's tokenizer.
    """

    called: str
    kind: str
    lm: str
    vision: Mapping[str, Any]
    processor: str
    images: str
    template: str | None
    videos: str | None = None
    text: Mapping[str, Any] = field(default_factory=dict)
    student_text: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    image_options: Mapping[str, Any] = field(default_factory=dict)
    behind: Sequence[str] = ()
    inside: Sequence[str] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    vocab: int = parts.STUDENT_VOCAB
    bos: str | None = None
    eos: str = END


_LLAVA = Family(
    called="LLaVA-1.5",
    kind="llava",
    lm="llama",
    vision={"model_type": "clip_vision_model", "projection_dim": 32, **_TOWER},
    processor="LlavaProcessor",
    images="CLIPImageProcessor",
    template=parts.LLAVA,
    text={"num_key_value_heads": 4},
    config={"image_seq_length": 16},
    ids={"image_token_index": "<image>"},
    processor_options={
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    image_options=_CROPPED,
    behind=("<image>",),
    bos="<s>",
    eos="</s>",
)
_LLAVA_SIGLIP = replace(
    _LLAVA,
    vision={"model_type": "siglip_vision_model", **_TOWER},
    images="SiglipImageProcessor",
    image_options=_SQUARE,
    config={"image_seq_length": 16, "vision_feature_select_strategy": "full"},
    processor_options={"patch_size": PATCH, "vision_feature_select_strategy": "full"},
    text={},
)
_GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
_LLAVA_NEXT = replace(
    _LLAVA,
    called="LLaVA-NeXT",
    kind="llava_next",
    lm="mistral",
    processor="LlavaNextProcessor",
    images="LlavaNextImageProcessor",
    template=parts.INST,
    text={"sliding_window": None},
    config={"image_grid_pinpoints": _GRID, "image_seq_length": 16},
    image_options={**_CROPPED, "image_grid_pinpoints": _GRID},
)
_ONEVISION = replace(
    _LLAVA,
    called="LLaVA-OneVision",
    kind="llava_onevision",
    lm="qwen2",
    vision={"model_type": "siglip_vision_model", **_TOWER},
    processor="LlavaOnevisionProcessor",
    images="LlavaOnevisionImageProcessor",
    videos="LlavaOnevisionVideoProcessor",
    template=parts.ONEVISION,
    text={},
    config={
        "image_grid_pinpoints": _GRID,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
    ids={"image_token_index": "<image>", "video_token_index": "<video>"},
    processor_options={
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
    image_options={**_SQUARE, "image_grid_pinpoints": _GRID},
    behind=("<image>", "<video>"),
    bos=None,
    eos=END,
)
_PLACES = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
_IDEFICS3 = Family(
    called="Idefics3",
    kind="idefics3",
    lm="llama",
    vision={"model_type": "idefics3_vision", **_TOWER},
    processor="Idefics3Processor",
    images="Idefics3ImageProcessor",
    template=parts.SMOLVLM,
    config={"scale_factor": 2},
    ids={"image_token_id": "<image>", "pad_token_id": "<pad>"},
    processor_options={"image_seq_len": 4},
    image_options={"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
    behind=("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_PLACES),
    bos="<|im_start|>",
)
_SMOLVLM2 = replace(
    _IDEFICS3,
    called="SmolVLM2",
    kind="smolvlm",
    vision={"model_type": "smolvlm_vision", **_TOWER},
    processor="SmolVLMProcessor",
    images="SmolVLMImageProcessor",
    videos="SmolVLMVideoProcessor",
    named={
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    },
)
_INTERNVL = Family(
    called="InternVL3",
    kind="internvl",
    lm="qwen2",
    vision={
        **_TOWER,
        "model_type": "internvl_vision",
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
    },
    processor="InternVLProcessor",
    images="GotOcr2ImageProcessor",
    videos="InternVLVideoProcessor",
    template=parts.chatml("<IMG_CONTEXT>\n"),
    config={"image_seq_length": 4},
    ids={"image_token_id": "<IMG_CONTEXT>"},
    processor_options={"image_seq_length": 4},
    image_options={**_SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
    behind=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
)
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_PIXELS = {
    "patch_size": PATCH,
    "merge_size": 2,
    "size": {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": 64 * PATCH * PATCH},
}
_QWEN2_VL = Family(
    called="Qwen2-VL",
    kind="qwen2_vl",
    lm="qwen2",
    vision={
        "depth": 2, "embed_dim": 32, "hidden_size": _HIDDEN, "num_heads": 2, "patch_size": PATCH,
    },
    processor="Qwen2VLProcessor",
    images="Qwen2VLImageProcessor",
    videos="Qwen2VLVideoProcessor",
    template=parts.chatml(
        "<|vision_start|><|image_pad|><|vision_end|>", "You are a helpful assistant."
    ),
    student_text={"rope_parameters": _MROPE},
    ids={
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    image_options=_PIXELS,
    inside=_QWEN_TOKENS,
)  # fmt: skip
_QWEN25_VL = replace(
    _QWEN2_VL,
    called="Qwen2.5-VL",
    kind="qwen2_5_vl",
    processor="Qwen2_5_VLProcessor",
    vision={
        "depth": 2, "hidden_size": 32, "out_hidden_size": _HIDDEN, "num_heads": 2,
        "patch_size": PATCH, "intermediate_size": 64, "fullatt_block_indexes": [1],
        "window_size": 4 * PATCH,
    },
)  # fmt: skip
_QWEN3_VL = replace(
    _QWEN25_VL,
    called="Qwen3-VL",
    kind="qwen3_vl",
    lm="qwen3",
    processor="Qwen3VLProcessor",
    videos="Qwen3VLVideoProcessor",
    template=parts.chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    vision={
        "depth": 3, "hidden_size": 32, "out_hidden_size": _HIDDEN, "num_heads": 2,
        "patch_size": PATCH, "intermediate_size": 64, "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 16,
    },
    text={"head_dim": 16},
)  # fmt: skip
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_WINDOWS = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3 = Family(
    called="Gemma 3",
    kind="gemma3",
    lm="gemma3_text",
    vision={"model_type": "siglip_vision_model", **_TOWER},
    processor="Gemma3Processor",
    images="Gemma3ImageProcessor",
    template=parts.GEMMA,
    text={**_GEMMA, **_WINDOWS},
    config={"mm_tokens_per_image": 4},
    ids={
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    processor_options={"image_seq_length": 4},
    image_options=_SQUARE,
    behind=("<image_soft_token>",),
    inside=("<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"),
    named={
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
    bos="<bos>",
    eos="<eos>",
)
_PALIGEMMA = Family(
    called="PaliGemma",
    kind="paligemma",
    lm="gemma",
    vision={"model_type": "siglip_vision_model", **_TOWER},
    processor="PaliGemmaProcessor",
    images="SiglipImageProcessor",
    template=None,
    text={"head_dim": 16},
    config={"projection_dim": _HIDDEN, "hidden_size": _HIDDEN},
    ids={"image_token_index": "<image>"},
    image_options={**_SQUARE, "image_seq_length": 16},
    behind=("<image>",),
    vocab=1536,
    bos="<bos>",
    eos="<eos>",
)
_MISTRAL3 = Family(
    called="Mistral 3",
    kind="mistral3",
    lm="mistral",
    vision={"model_type": "pixtral", **_TOWER, "head_dim": 16, "image_size": 2 * SIDE},
    processor="PixtralProcessor",
    images="PixtralImageProcessor",
    template=parts.MISTRAL3,
    text={"head_dim": 16, "sliding_window": None},
    config={"spatial_merge_size": 2, "vision_feature_layer": -1},
    ids={"image_token_index": "[IMG]"},
    processor_options={"patch_size": PATCH, "spatial_merge_size": 2},
    image_options={"size": {"longest_edge": 2 * SIDE}, "patch_size": PATCH},
    inside=(
        "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
    ),
    bos="<s>",
    eos="</s>",
)  # fmt: skip
_GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_GLM_TOKENS = (
    "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
_GLM4V = Family(
    called="GLM-4.1V",
    kind="glm4v",
    lm="glm4",
    vision={
        "depth": 2, "hidden_size": 32, "out_hidden_size": _HIDDEN, "num_heads": 2,
        "patch_size": PATCH, "intermediate_size": 64, "image_size": SIDE,
    },
    processor="Glm4vProcessor",
    images="Glm4vImageProcessor",
    videos="Glm4vVideoProcessor",
    template=parts.GLM,
    text={"head_dim": 16, "attention_bias": True, "rope_parameters": _GLM_ROPE},
    student_text={"rope_parameters": {**_GLM_ROPE, "mrope_section": [1, 1, 2]}},
    ids={
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
    image_options=_PIXELS,
    inside=_GLM_TOKENS,
    eos="<|endoftext|>",
)  # fmt: skip
_OVIS_TOKENS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
_OVIS2 = Family(
    called="Ovis2",
    kind="ovis2",
    lm="qwen2",
    vision={**_TOWER, "vocab_size": 64, "num_visual_indicator_tokens": 5},
    processor="Ovis2Processor",
    images="Ovis2ImageProcessor",
    template=parts.chatml("<image>\n"),
    config={"hidden_size": _HIDDEN},
    ids={"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": _OVIS_TOKENS},
    processor_options={"image_seq_length": 16},
    image_options={**_SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
    inside=("<image>", "<IMG_ATOM>", *_OVIS_TOKENS),
)
_COHERE_TEXT = {"head_dim": 16, "logit_scale": 2.0, **_WINDOWS}
_COHERE_TOKENS = (
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL",
)  # fmt: skip
_AYA = Family(
    called="Aya Vision",
    kind="aya_vision",
    lm="cohere2",
    vision={"model_type": "siglip_vision_model", **_TOWER},
    processor="AyaVisionProcessor",
    images="GotOcr2ImageProcessor",
    template=parts.COHERE,
    text=_COHERE_TEXT,
    config={"downsample_factor": 2},
    ids={"image_token_index": "<|IMG_PATCH|>"},
    processor_options={"patch_size": 2 * PATCH, "img_size": SIDE},
    image_options={**_SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
    inside=_COHERE_TOKENS,
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
)
_KIMI_TEXT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
_KIMI_TOKENS = (
    "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|media_begin|>",
    "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>",
)  # fmt: skip

_NANOVLM = Family(
    called="nanoVLM",
    kind="nanovlm",
    lm="llama",
    vision={},
    processor="",
    images="",
    template="",
    text={"tie_word_embeddings": True},
    bos="<|im_start|>",
    config={"vlm_extra_tokens": extra_tokens()},
)
_GRID_OF_4 = {k: v for k, v in extra_tokens(4, 4).items() if k != "global_image_token"}

FAMILIES: dict[str, Family] = {
    "nanovlm": _NANOVLM,
    "nanovlm-222m": replace(
        _NANOVLM, called="nanoVLM-222M", config={"vlm_extra_tokens": _GRID_OF_4}
    ),
    "llava": _LLAVA,
    "llava-next": _LLAVA_NEXT,
    "llava-onevision": _ONEVISION,
    "smolvlm": replace(_IDEFICS3, called="SmolVLM"),
    "smolvlm2": _SMOLVLM2,
    "idefics3": replace(
        _IDEFICS3, text={"num_key_value_heads": 1}, config={"scale_factor": 4},
        processor_options={"image_seq_len": 1},
    ),
    "internvl": _INTERNVL,
    "internvl-qwen3": replace(_INTERNVL, called="InternVL3.5", lm="qwen3", text={"head_dim": 16}),
    "internvl-llama": replace(_INTERNVL, called="InternVL with Llama", lm="llama"),
    "qwen2-vl": _QWEN2_VL,
    "qwen2.5-vl": _QWEN25_VL,
    "qwen3-vl": _QWEN3_VL,
    "gemma3": _GEMMA3,
    "paligemma": _PALIGEMMA,
    "paligemma2": replace(
        _PALIGEMMA, called="PaliGemma 2", lm="gemma2",
        text={**_GEMMA, **_WINDOWS, "sliding_window": 512},
    ),
    "mistral3": _MISTRAL3,
    "glm4v": _GLM4V,
    "glm46v": replace(_GLM4V, called="GLM-4.6V", kind="glm46v", processor="Glm46VProcessor",
        images="Glm46VImageProcessor", videos="Glm46VVideoProcessor"),
    "ovis2": _OVIS2,
    "aya-vision": _AYA,
    "cohere2-vision": replace(
        _AYA, called="Command A Vision", kind="cohere2_vision", processor="Cohere2VisionProcessor",
        images="Cohere2VisionImageProcessor",
        config={"downsample_factor": 2, "alignment_intermediate_size": 64},
        ids={"image_token_id": "<|IMG_PATCH|>"}, processor_options={},
        image_options={**_SQUARE, "min_patches": 1, "max_patches": 4, "patch_size": 2},
        template=parts.COHERE.replace("<image>", "<|IMG_PATCH|>"),
        named={
            "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>", "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    ),
    "qwen3-vl-moe": replace(
        _QWEN3_VL, called="Qwen3-VL MoE", kind="qwen3_vl_moe", lm="qwen3_moe",
        text={"head_dim": 16, **_MOE},
    ),
    "kimi": Family(
        called="Kimi-VL", kind="kimi_k25", lm="deepseek_v3",
        vision={
            **{k: v for k, v in _TOWER.items() if k != "image_size"}, "pos_emb_height": 4,
            "pos_emb_width": 4, "merge_kernel_size": [2, 2],
        },
        processor="Kimi_K25Processor", images="Kimi_K25ImageProcessor",
        videos="Kimi_K25VideoProcessor", template=parts.KIMI, text=_KIMI_TEXT,
        config={"projection_hidden_size": 32},
        ids={"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>",
             "vision_start_token_id": "<|media_begin|>", "vision_end_token_id": "<|media_end|>"},
        image_options={"patch_size": PATCH, "merge_size": 2, "max_patches": 64,
                       "size": {"max_height": 8, "max_width": 8}},
        inside=_KIMI_TOKENS, bos="[BOS]",
    ),
    "videollama3": replace(
        _QWEN2_VL, called="VideoLLaMA 3", kind="video_llama_3",
        vision={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "patch_size": PATCH,
        },
        processor="VideoLlama3Processor", images="VideoLlama3ImageProcessor",
        videos="VideoLlama3VideoProcessor", template=parts.chatml("<|image_pad|>\n"),
        student_text={},
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    ),
    "llava-qwen2": replace(_LLAVA_SIGLIP, called="LLaVA with Qwen2", lm="qwen2"),
    "llava-qwen3": replace(
        _LLAVA_SIGLIP, called="LLaVA with Qwen3", lm="qwen3", text={"head_dim": 16}
    ),
    "llava-phi3": replace(_LLAVA_SIGLIP, called="LLaVA with Phi-3", lm="phi3"),
    "llava-granite": replace(
        _LLAVA_SIGLIP, called="LLaVA with Granite", lm="granite",
        text={"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
              "embedding_multiplier": 2.0},
    ),
    "llava-olmo2": replace(_LLAVA_SIGLIP, called="LLaVA with OLMo 2", lm="olmo2"),
    "llava-gemma2": replace(
        _LLAVA_SIGLIP, called="LLaVA with Gemma 2", lm="gemma2", text={**_GEMMA, **_WINDOWS}
    ),
    "llava-gpt-oss": replace(
        _LLAVA_SIGLIP, called="LLaVA with gpt-oss", lm="gpt_oss",
        text={"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOWS},
    ),
    "smolvlm-smollm3": replace(
        _IDEFICS3, called="SmolVLM with SmolLM3", lm="smollm3",
        text={"no_rope_layers": [1, 0], "use_sliding_window": False},
    ),
    "mistral3-ministral3": replace(
        _MISTRAL3, called="Ministral 3", lm="ministral3",
        text={
            "head_dim": 16, "sliding_window": None, "rope_parameters": {
                "type": "yarn", "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
    ),
}  # fmt: skip
