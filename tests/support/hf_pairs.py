"""Small random LLaVA and SmolVLM pairs on disk: the real classes, configurations and templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pairs import TEXT, VOCAB, spread, write_pair, write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SIDE = 32
# As llava-hf/llava-1.5-7b-hf ships it: no end mark behind an answer.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As HuggingFaceTB/SmolVLM-256M-Instruct ships it.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# One that ends answers and begins them at once, for models that are only spoken to.
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DECODER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def decoder_config(kind: str = "llama", vocab: int = VOCAB, **changes) -> PretrainedConfig:
    """A decoder of two layers; Llama without grouped heads (as Vicuna), the others with."""
    own = {
        "llama": {"num_key_value_heads": 6},
        "mistral": {"num_key_value_heads": 2, "sliding_window": 512},
        "qwen2": {"num_key_value_heads": 2},
        "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
        "olmo2": {"num_key_value_heads": 2},
        "smollm3": {
            "num_key_value_heads": 2,
            "no_rope_layers": [1, 0],
            "use_sliding_window": False,
        },
    }.get(kind, {})
    # What else these configurations default to lies outside the small vocabulary.
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return AutoConfig.for_model(kind, **(_DECODER | own | ids | {"vocab_size": vocab} | changes))


def write_llama_tokenizer(folder: Path) -> None:
    """Exactly VOCAB tokens; a start token that the tokenizer adds itself, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    while tokenizer.get_vocab_size() < VOCAB:
        tokenizer.add_tokens([f"<filler_{tokenizer.get_vocab_size()}>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_teacher(root: Path, config: PretrainedConfig, student: PreTrainedModel | None) -> None:
    """``root/teacher``: random, or (``student``: a decoder with head) with the same weights."""
    teacher = AutoModelForCausalLM.from_config(config)
    _spread_all(teacher)
    if student is not None:
        state = student.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][: config.vocab_size]
        teacher.load_state_dict(state)
    teacher.save_pretrained(root / "teacher")


def _spread_all(model: torch.nn.Module) -> None:
    """As `spread`; biases too, or a forgotten one would not show."""
    spread(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_(0, 0.3)


def _decoder_of(vlm: PreTrainedModel) -> PreTrainedModel:
    from ldistill.models.hf_vlm import HFVLM

    return HFVLM(vlm, {}).causal_lm()


def write_llava(
    root: Path,
    *,
    same_weights: bool = False,
    kind: str = "llama",
    seed: int = 0,
    template: str = LLAVA_TEMPLATE,
    shard_size: str = "200KB",
    **decoder,
) -> Path:
    """``root/student`` (LLaVA, vocabulary padded to 384), returned, and ``root/teacher``."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            image_size=SIDE, patch_size=8, projection_dim=32,
        ),
        text_config=decoder_config(kind, 384, **decoder),
        image_token_index=VOCAB,
        image_seq_length=16,
    )  # fmt: skip
    student = LlavaForConditionalGeneration(config)
    _spread_all(student)
    student.save_pretrained(root / "student", max_shard_size=shard_size)
    same = _decoder_of(student) if same_weights else None
    write_teacher(root, decoder_config(kind, **decoder), same)
    write_llama_tokenizer(root / "teacher")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "teacher")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # id VOCAB
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(root / "student")
    return root / "student"


def write_smolvlm(
    root: Path,
    *,
    same_weights: bool = False,
    seed: int = 0,
    template: str = SMOLVLM_TEMPLATE,
    **decoder,
) -> Path:
    """``root/student`` (SmolVLM, an Idefics3), returned, and ``root/teacher`` (a small SmolLM2)."""
    torch.manual_seed(seed)
    write_tokenizer(root / "teacher")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "teacher")
    places = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    own = ["<global-img>", *places, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": own})
    tokenizer.pad_token = tokenizer.eos_token
    shape = {"num_key_value_heads": 2, **decoder}
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=SIDE, patch_size=8,
        ),
        text_config=decoder_config("llama", VOCAB + 64, **shape),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=2,
    )  # fmt: skip
    student = Idefics3ForConditionalGeneration(config)
    _spread_all(student)
    student.save_pretrained(root / "student")
    same = _decoder_of(student) if same_weights else None
    write_teacher(root, decoder_config("llama", **shape), same)
    images = Idefics3ImageProcessor(
        size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(
        root / "student"
    )
    return root / "student"


def _of_kind(kind: str) -> Callable[..., Path | None]:
    return lambda root, **options: write_llava(root, kind=kind, **options)


WRITERS: dict[str, Callable[..., Path | None]] = {
    "nanovlm": write_pair,
    "llava": write_llava,
    "smolvlm": write_smolvlm,
    "llava-mistral": _of_kind("mistral"),
    "llava-qwen2": _of_kind("qwen2"),
    "llava-qwen3": _of_kind("qwen3"),
    "llava-olmo2": _of_kind("olmo2"),
    "llava-smollm3": _of_kind("smollm3"),
}
