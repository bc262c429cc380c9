"""Small random Hugging Face VLMs on disk: LLaVA and SmolVLM's kind, with processors."""

from __future__ import annotations

from pathlib import Path

import torch
from pairs import spread, write_tokenizer
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE = 28
_MARKS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
_MARKS += [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]


def _tokenizer(root: Path):
    write_tokenizer(root / "lm")
    tokenizer = AutoTokenizer.from_pretrained(root / "lm")
    tokenizer.add_tokens(_MARKS, special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _text_config(tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def write_llava(root: Path) -> Path:
    tokenizer = _tokenizer(root)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=14,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=_text_config(tokenizer), image_token_index=image
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    return _save(LlavaForConditionalGeneration, config, processor, root / "llava")


def write_idefics3(root: Path) -> Path:
    tokenizer = _tokenizer(root)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14,
    }  # fmt: skip
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=vision,
        text_config=_text_config(tokenizer).to_dict(),
        scale_factor=2,
        pad_token_id=2,
    )
    images = Idefics3ImageProcessor(  # splits pictures, as SmolVLM's checkpoints do
        size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=TEMPLATE)
    return _save(Idefics3ForConditionalGeneration, config, processor, root / "idefics3", seed=1)


def _save(kind, config, processor, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(0)  # vectors, which `spread` leaves as they are
    model = kind(config)
    torch.manual_seed(seed)  # of answers that are text
    spread(model)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
