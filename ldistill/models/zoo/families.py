"""The families by name: one of the kinds each, or one with another decoder."""

from __future__ import annotations

from dataclasses import replace

from ldistill.models.zoo import parts
from ldistill.models.zoo.kinds import (
    AYA,
    GEMMA,
    GEMMA3,
    GLM4V,
    GRID_OF_4,
    IDEFICS3,
    INTERNVL,
    KIMI_TEXT,
    KIMI_TOKENS,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_SIGLIP,
    MISTRAL3,
    MOE,
    NANOVLM,
    ONEVISION,
    OVIS2,
    PALIGEMMA,
    QWEN2_VL,
    QWEN3_VL,
    QWEN25_VL,
    SMOLVLM2,
    SQUARE,
    TOWER,
    WINDOWS,
    Family,
)
from ldistill.models.zoo.parts import PATCH

FAMILIES: dict[str, Family] = {
    "nanovlm": NANOVLM,
    "nanovlm-222m": replace(
        NANOVLM, called="nanoVLM-222M", config={"vlm_extra_tokens": GRID_OF_4}
    ),
    "llava": LLAVA,
    "llava-next": LLAVA_NEXT,
    "llava-onevision": ONEVISION,
    "smolvlm": replace(IDEFICS3, called="SmolVLM"),
    "smolvlm2": SMOLVLM2,
    "idefics3": replace(
        IDEFICS3, text={"num_key_value_heads": 1}, config={"scale_factor": 4},
        processor_options={"image_seq_len": 1},
    ),
    "internvl": INTERNVL,
    "internvl-qwen3": replace(
        INTERNVL, called="InternVL3.5", lm="qwen3", text={"head_dim": 16}, student_text={}
    ),
    "internvl-llama": replace(INTERNVL, called="InternVL with Llama", lm="llama", student_text={}),
    "qwen2-vl": QWEN2_VL,
    "qwen2.5-vl": QWEN25_VL,
    "qwen3-vl": QWEN3_VL,
    "gemma3": GEMMA3,
    "paligemma": PALIGEMMA,
    "paligemma2": replace(
        PALIGEMMA, called="PaliGemma 2", lm="gemma2",
        text={**GEMMA, **WINDOWS, "sliding_window": 512},
    ),
    "mistral3": MISTRAL3,
    "glm4v": GLM4V,
    "glm46v": replace(GLM4V, called="GLM-4.6V", kind="glm46v", processor="Glm46VProcessor",
        images="Glm46VImageProcessor", videos="Glm46VVideoProcessor"),
    "ovis2": OVIS2,
    "aya-vision": AYA,
    "cohere2-vision": replace(
        AYA, called="Command A Vision", kind="cohere2_vision", processor="Cohere2VisionProcessor",
        images="Cohere2VisionImageProcessor",
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
        text={"head_dim": 16, **MOE},
    ),
    "kimi": Family(
        called="Kimi-VL", kind="kimi_k25", lm="deepseek_v3",
        vision={
            **{k: v for k, v in TOWER.items() if k != "image_size"}, "pos_emb_height": 4,
            "pos_emb_width": 4, "merge_kernel_size": [2, 2],
        },
        processor="Kimi_K25Processor", images="Kimi_K25ImageProcessor",
        videos="Kimi_K25VideoProcessor", template=parts.KIMI, text=KIMI_TEXT,
        config={"projection_hidden_size": 32},
        ids={"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>",
             "vision_start_token_id": "<|media_begin|>", "vision_end_token_id": "<|media_end|>"},
        image_options={"patch_size": PATCH, "merge_size": 2, "max_patches": 64,
                       "size": {"max_height": 8, "max_width": 8}},
        inside=KIMI_TOKENS, bos="[BOS]",
    ),
    "videollama3": replace(
        QWEN2_VL, called="VideoLLaMA 3", kind="video_llama_3",
        vision={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "patch_size": PATCH,
        },
        processor="VideoLlama3Processor", images="VideoLlama3ImageProcessor",
        videos="VideoLlama3VideoProcessor", template=parts.chatml("<|image_pad|>\n"),
        student_text={},
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    ),
    "llava-qwen2": replace(LLAVA_SIGLIP, called="LLaVA with Qwen2", lm="qwen2"),
    "llava-qwen3": replace(
        LLAVA_SIGLIP, called="LLaVA with Qwen3", lm="qwen3", text={"head_dim": 16}
    ),
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
    "llava-gpt-oss": replace(
        LLAVA_SIGLIP, called="LLaVA with gpt-oss", lm="gpt_oss",
        text={"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS},
    ),
    "smolvlm-smollm3": replace(
        IDEFICS3, called="SmolVLM with SmolLM3", lm="smollm3",
        text={"no_rope_layers": [1, 0], "use_sliding_window": False},
    ),
    "mistral3-ministral3": replace(
        MISTRAL3, called="Ministral 3", lm="ministral3",
        text={
            "head_dim": 16, "sliding_window": None, "rope_parameters": {
                "type": "yarn", "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
    ),
}  # fmt: skip
