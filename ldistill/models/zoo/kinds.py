"""The kinds of students: what the published checkpoints of each are made of, in small sizes.

Each becomes, on disk, a random student of transformers' real class with a real processor, and
the LM of its decoder's kind. Names in it are transformers': of classes, of configurations' fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldistill.models.nanovlm_config import extra_tokens
from ldistill.models.zoo import parts
from ldistill.models.zoo.parts import END, PATCH, SIDE

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
HIDDEN = 64


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


LLAVA = Family(
    called="LLaVA-1.5",
    kind="llava",
    lm="llama",
    vision={"model_type": "clip_vision_model", "projection_dim": 32, **TOWER},
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
    image_options=CROPPED,
    behind=("<image>",),
    bos="<s>",
    eos="</s>",
)
LLAVA_SIGLIP = replace(
    LLAVA,
    vision={"model_type": "siglip_vision_model", **TOWER},
    images="SiglipImageProcessor",
    image_options=SQUARE,
    config={"image_seq_length": 16, "vision_feature_select_strategy": "full"},
    processor_options={"patch_size": PATCH, "vision_feature_select_strategy": "full"},
    text={},
)
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
LLAVA_NEXT = replace(
    LLAVA,
    called="LLaVA-NeXT",
    kind="llava_next",
    lm="mistral",
    processor="LlavaNextProcessor",
    images="LlavaNextImageProcessor",
    template=parts.INST,
    text={"sliding_window": None},
    config={"image_grid_pinpoints": GRID, "image_seq_length": 16},
    image_options={**CROPPED, "image_grid_pinpoints": GRID},
)
ONEVISION = replace(
    LLAVA,
    called="LLaVA-OneVision",
    kind="llava_onevision",
    lm="qwen2",
    vision={"model_type": "siglip_vision_model", **TOWER},
    processor="LlavaOnevisionProcessor",
    images="LlavaOnevisionImageProcessor",
    videos="LlavaOnevisionVideoProcessor",
    template=parts.ONEVISION,
    text={},
    config={
        "image_grid_pinpoints": GRID,
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
    image_options={**SQUARE, "image_grid_pinpoints": GRID},
    behind=("<image>", "<video>"),
    bos=None,
    eos=END,
)
PLACES = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
IDEFICS3 = Family(
    called="Idefics3",
    kind="idefics3",
    lm="llama",
    vision={"model_type": "idefics3_vision", **TOWER},
    processor="Idefics3Processor",
    images="Idefics3ImageProcessor",
    template=parts.SMOLVLM,
    config={"scale_factor": 2},
    ids={"image_token_id": "<image>", "pad_token_id": "<pad>"},
    processor_options={"image_seq_len": 4},
    image_options={"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
    behind=("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *PLACES),
    bos="<|im_start|>",
)
SMOLVLM2 = replace(
    IDEFICS3,
    called="SmolVLM2",
    kind="smolvlm",
    vision={"model_type": "smolvlm_vision", **TOWER},
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
INTERNVL = Family(
    called="InternVL3",
    kind="internvl",
    lm="qwen2",
    vision={
        **TOWER,
        "model_type": "internvl_vision",
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
    },
    processor="InternVLProcessor",
    images="GotOcr2ImageProcessor",
    videos="InternVLVideoProcessor",
    template=parts.chatml("<IMG_CONTEXT>\n"),
    student_text={"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    config={"image_seq_length": 4},
    ids={"image_token_id": "<IMG_CONTEXT>"},
    processor_options={"image_seq_length": 4},
    image_options={**SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
    behind=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PIXELS = {
    "patch_size": PATCH,
    "merge_size": 2,
    "size": {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": 64 * PATCH * PATCH},
}
QWEN2_VL = Family(
    called="Qwen2-VL",
    kind="qwen2_vl",
    lm="qwen2",
    vision={
        "depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": PATCH,
    },
    processor="Qwen2VLProcessor",
    images="Qwen2VLImageProcessor",
    videos="Qwen2VLVideoProcessor",
    template=parts.chatml(
        "<|vision_start|><|image_pad|><|vision_end|>", "You are a helpful assistant."
    ),
    student_text={"rope_parameters": MROPE},
    ids={
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    image_options=PIXELS,
    inside=QWEN_TOKENS,
)  # fmt: skip
QWEN25_VL = replace(
    QWEN2_VL,
    called="Qwen2.5-VL",
    kind="qwen2_5_vl",
    processor="Qwen2_5_VLProcessor",
    vision={
        "depth": 2, "hidden_size": 32, "out_hidden_size": HIDDEN, "num_heads": 2,
        "patch_size": PATCH, "intermediate_size": 64, "fullatt_block_indexes": [1],
        "window_size": 4 * PATCH,
    },
)  # fmt: skip
QWEN3_VL = replace(
    QWEN25_VL,
    called="Qwen3-VL",
    kind="qwen3_vl",
    lm="qwen3",
    processor="Qwen3VLProcessor",
    videos="Qwen3VLVideoProcessor",
    template=parts.chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    vision={
        "depth": 3, "hidden_size": 32, "out_hidden_size": HIDDEN, "num_heads": 2,
        "patch_size": PATCH, "intermediate_size": 64, "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 16,
    },
    text={"head_dim": 16},
)  # fmt: skip
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
WINDOWS = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3 = Family(
    called="Gemma 3",
    kind="gemma3",
    lm="gemma3_text",
    vision={"model_type": "siglip_vision_model", **TOWER},
    processor="Gemma3Processor",
    images="Gemma3ImageProcessor",
    template=parts.GEMMA,
    text={
        **GEMMA,
        **WINDOWS,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    config={"mm_tokens_per_image": 4},
    ids={
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    processor_options={"image_seq_length": 4},
    image_options=SQUARE,
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
PALIGEMMA = Family(
    called="PaliGemma",
    kind="paligemma",
    lm="gemma",
    vision={"model_type": "siglip_vision_model", **TOWER},
    processor="PaliGemmaProcessor",
    images="SiglipImageProcessor",
    template=None,
    text={"head_dim": 16},
    config={"projection_dim": HIDDEN, "hidden_size": HIDDEN},
    ids={"image_token_index": "<image>"},
    image_options={**SQUARE, "image_seq_length": 16},
    behind=("<image>",),
    vocab=1536,
    bos="<bos>",
    eos="<eos>",
)
MISTRAL3 = Family(
    called="Mistral 3",
    kind="mistral3",
    lm="mistral",
    vision={"model_type": "pixtral", **TOWER, "head_dim": 16, "image_size": 2 * SIDE},
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
GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GLM_TOKENS = (
    "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
GLM4V = Family(
    called="GLM-4.1V",
    kind="glm4v",
    lm="glm4",
    vision={
        "depth": 2, "hidden_size": 32, "out_hidden_size": HIDDEN, "num_heads": 2,
        "patch_size": PATCH, "intermediate_size": 64, "image_size": SIDE,
    },
    processor="Glm4vProcessor",
    images="Glm4vImageProcessor",
    videos="Glm4vVideoProcessor",
    template=parts.GLM,
    text={"head_dim": 16, "attention_bias": True, "rope_parameters": GLM_ROPE},
    student_text={"rope_parameters": {**GLM_ROPE, "mrope_section": [1, 1, 2]}},
    ids={
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
    image_options=PIXELS,
    inside=GLM_TOKENS,
    eos="<|endoftext|>",
)  # fmt: skip
OVIS_TOKENS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
OVIS2 = Family(
    called="Ovis2",
    kind="ovis2",
    lm="qwen2",
    vision={**TOWER, "vocab_size": 64, "num_visual_indicator_tokens": 5},
    processor="Ovis2Processor",
    images="Ovis2ImageProcessor",
    template=parts.chatml("<image>\n"),
    config={"hidden_size": HIDDEN},
    ids={"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": OVIS_TOKENS},
    processor_options={"image_seq_length": 16},
    image_options={**SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
    inside=("<image>", "<IMG_ATOM>", *OVIS_TOKENS),
)
COHERE_TEXT = {"head_dim": 16, "logit_scale": 2.0, **WINDOWS}
COHERE_TOKENS = (
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL",
)  # fmt: skip
AYA = Family(
    called="Aya Vision",
    kind="aya_vision",
    lm="cohere2",
    vision={"model_type": "siglip_vision_model", **TOWER},
    processor="AyaVisionProcessor",
    images="GotOcr2ImageProcessor",
    template=parts.COHERE,
    text=COHERE_TEXT,
    config={"downsample_factor": 2},
    ids={"image_token_index": "<|IMG_PATCH|>"},
    processor_options={"patch_size": 2 * PATCH, "img_size": SIDE},
    image_options={**SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
    inside=COHERE_TOKENS,
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
)
KIMI_TEXT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
KIMI_TOKENS = (
    "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|media_begin|>",
    "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>",
)  # fmt: skip

NANOVLM = Family(
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
GRID_OF_4 = {k: v for k, v in extra_tokens(4, 4).items() if k != "global_image_token"}
