"""What the small checkpoints of the zoo share: a tokenizer, chat templates, sizes, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

VOCAB = 320  # of every LM
STUDENT_VOCAB = 448  # of a student whose tokens lie behind the LM's
SIDE, PATCH = 32, 8  # of a picture, or of a tile of one
END = "<|im_end|>"


def base_tokenizer(inside: Sequence[str] = (), *, bos: str | None = None, eos: str = END):
    """An LM's tokenizer: bytes, special tokens, those of the student that are ``inside`` it already
    (as in Qwen's and Gemma's), and fillers up to VOCAB; ``eos`` ends a turn."""
    special = ["<|endoftext|>", "<s>", "</s>", "<|im_start|>", END, "<pad>"]
    special = list(dict.fromkeys([*special, *filter(None, (bos, eos)), *inside]))
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<filler_{number}>" for number in range(VOCAB - len(tokens))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>"
    )


def student_tokenizer(
    lm: PreTrainedTokenizerFast, behind: Sequence[str], named: Mapping[str, str]
) -> PreTrainedTokenizerFast:
    """The LM's tokenizer with the student's tokens behind it; those ``named`` are what the family's
    processor asks for by attribute (``image_token``)."""
    backend = Tokenizer.from_str(lm.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(token, special=True) for token in behind])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=lm.bos_token,
        eos_token=lm.eos_token,
        pad_token=lm.pad_token,
        **({"extra_special_tokens": dict(named)} if named else {}),
    )


# ---- chat templates, in behaviour those of the published checkpoints ----


_TEXT = "{{ part['text'] }}"


def chat(
    turn: str,
    image: str,
    end: str,
    ask: str,
    *,
    start: str = "",
    text: str = _TEXT,
    pictures_first: bool = False,
) -> str:
    """A template that writes the parts of a message in their order, or its pictures first:
    ``start`` before all, ``turn`` before each (itself a template of ``message``), ``image`` for a
    picture, ``text`` for a part's text, ``end`` behind a message, ``ask`` before an answer."""
    parts = (
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{image}{{% else %}}{text}{{% endif %}}{{% endfor %}}"
    )
    if pictures_first:
        some = "{{% for part in message['content'] | selectattr('type', 'equalto', '{}') %}}"
        some += "{}{{% endfor %}}"
        parts = some.format("image", image) + some.format("text", text)
    return (
        f"{start}{{% for message in messages %}}{turn}{parts}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


def chatml(image: str, system: str = "") -> str:
    """``<|im_start|>role``, text, ``<|im_end|>``; a system message where the user gives none."""
    first = f"<|im_start|>system\n{system}<|im_end|>\n"
    start = f"{{% if messages[0]['role'] != 'system' %}}{first}{{% endif %}}" if system else ""
    turn = "<|im_start|>{{ message['role'] }}\n"
    return chat(turn, image, "<|im_end|>\n", "<|im_start|>assistant\n", start=start)


def _by_role(user: str, system: str, assistant: str = "") -> str:
    """What is written depending on who speaks."""
    return (
        f"{{% if message['role'] == 'user' %}}{user}{{% elif message['role'] == 'system' %}}"
        f"{system}{{% else %}}{assistant}{{% endif %}}"
    )


# llava-hf/llava-1.5: no end mark behind an answer.
LLAVA = chat(
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}",
    "<image>\n", "", "ASSISTANT:", text="{{ part['text'] + ' ' }}", pictures_first=True,
)  # fmt: skip
# llava-hf/llava-v1.6-mistral and mistralai's.
INST = chat(
    _by_role("[INST] ", "<<SYS>>\n", " "), "<image>\n",
    _by_role(" [/INST]", "\n<</SYS>>\n\n", "</s>"), "", pictures_first=True,
)  # fmt: skip
# llava-hf/llava-onevision: what asks for an answer lacks the blank that stands before one.
ONEVISION = chat(
    "<|im_start|>{{ message['role'] + ' ' }}", "<image>", "<|im_end|>", "<|im_start|>assistant\n",
    text="{{ '\n' + part['text'] }}", pictures_first=True,
)  # fmt: skip
# HuggingFaceTB/SmolVLM: no blank behind the colon where a picture follows.
SMOLVLM = chat(
    "{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}",
    "<image>", "<end_of_utterance>\n", "Assistant:", start="<|im_start|>",
)  # fmt: skip
GEMMA = chat(
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n",
    "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n",
    start="{{ bos_token }}", text="{{ part['text'] | trim }}",
)  # fmt: skip
MISTRAL3 = chat(
    _by_role("[INST]", "[SYSTEM_PROMPT]"), "[IMG]", _by_role("[/INST]", "[/SYSTEM_PROMPT]", "</s>"),
    "", start="{{ bos_token }}",
)  # fmt: skip
# zai-org/GLM-4.1V: the next role ends an answer.
GLM = chat(
    "<|{{ message['role'] }}|>\n", "<|begin_of_image|><|image|><|end_of_image|>", "",
    "<|assistant|>\n", start="[gMASK]<sop>",
)  # fmt: skip
COHERE = chat(
    "<|START_OF_TURN_TOKEN|>{% if message['role'] == 'assistant' %}<|CHATBOT_TOKEN|>"
    "{% else %}<|{{ message['role'] | upper }}_TOKEN|>{% endif %}",
    "<image>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    start="{{ bos_token }}",
)  # fmt: skip
KIMI = chat(
    "<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>",
    "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>", "<|im_end|>",
    "<|im_assistant|>assistant<|im_middle|>",
)  # fmt: skip


# ---- weights ----


def spread(model: nn.Module, seed: int) -> None:
    """Weights large enough that wrong attention shows in the logits; biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.normal_(0, 0.12 if parameter.ndim > 1 else 0.1, generator=generator)
