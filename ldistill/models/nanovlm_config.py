"""nanoVLM's ``config.json``: every key, in its order."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)


def extra_tokens(rows: int = 8, cols: int = 8) -> dict[str, str]:
    """nanoVLM's 66 image tokens: one per image patch, one global view, one per tile place."""
    grid = {
        f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in range(1, rows + 1) for c in range(1, cols + 1)
    }
    return {"image_token": "<|image|>", "global_image_token": "<|global_image|>"} | grid


@dataclass
class NanoVLMConfig:
    """Keys and defaults of huggingface/nanoVLM (460M-8k shapes)."""

    vit_hidden_dim: int = 768
    vit_inter_dim: int = 3072
    vit_patch_size: int = 16
    vit_img_size: int = 512
    vit_n_heads: int = 12
    vit_dropout: float = 0.0
    vit_n_blocks: int = 12
    vit_ln_eps: float = 1e-6
    vit_cls_flag: bool = False
    vit_model_type: str = "google/siglip2-base-patch16-512"
    lm_hidden_dim: int = 960
    lm_inter_dim: int = 2560
    lm_rms_eps: float = 1e-5
    lm_re_base: int = 100000
    lm_max_position_embeddings: int = 8192
    lm_base_vocab_size: int = 49152
    extra_token_amount: int = 66
    lm_vocab_size: int = 49218
    lm_n_heads: int = 15
    lm_n_kv_heads: int = 5
    lm_dropout: float = 0.0
    lm_n_blocks: int = 32
    lm_attn_scaling: float = 1.0
    lm_max_length: int = 8192
    lm_use_tokens: bool = False
    lm_tie_weights: bool = True
    lm_model_type: str = "HuggingFaceTB/SmolLM2-360M-Instruct"
    lm_tokenizer: str = "HuggingFaceTB/SmolLM2-360M-Instruct"
    lm_chat_template: str = CHAT_TEMPLATE
    mp_pixel_shuffle_factor: int = 4
    mp_image_token_length: int = 64
    max_img_size: int = 2048
    resize_to_max_side_len: bool = True
    vlm_extra_tokens: dict[str, str] = field(default_factory=extra_tokens)
    vlm_load_backbone_weights: bool = True
    vlm_checkpoint_path: str = "checkpoints"
    hf_repo_name: str = "nanoVLM"

    def __post_init__(self) -> None:
        side = self.vit_img_size // self.vit_patch_size // self.mp_pixel_shuffle_factor
        problems = []
        if side * side != self.mp_image_token_length:
            problems.append(
                f"mp_image_token_length is {self.mp_image_token_length}, but image size "
                f"{self.vit_img_size}, patch {self.vit_patch_size} and pixel shuffle "
                f"{self.mp_pixel_shuffle_factor} give {side * side} tokens"
            )
        if self.lm_vocab_size < self.lm_base_vocab_size + len(self.vlm_extra_tokens):
            problems.append(
                f"lm_vocab_size {self.lm_vocab_size} has no room for {len(self.vlm_extra_tokens)} "
                f"image tokens after the base vocabulary of {self.lm_base_vocab_size}"
            )
        if self.vit_cls_flag:
            problems.append("vit_cls_flag is true: a vision tower with a class token is no SigLIP")
        if problems:
            raise ValueError(f"a nanoVLM configuration that cannot be: {'; '.join(problems)}.")

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands where an image embedding goes."""
        return self.lm_base_vocab_size + list(self.vlm_extra_tokens).index("image_token")

    @classmethod
    def load(cls, folder: Path) -> NanoVLMConfig:
        """Read ``config.json`` of a checkpoint folder; ValueError for values that cannot be."""
        path, known = folder / "config.json", {f.name for f in fields(cls)}
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if unknown := sorted(set(values) - known):
            logger.warning(
                "%s: keys kept by an export, not understood: %s", path, ", ".join(unknown)
            )
        return cls(**{k: v for k, v in values.items() if k in known})

    def to_json(self) -> str:
        """As nanoVLM writes it."""
        return json.dumps(asdict(self), indent=4)
