"""What of a student trains: `--train projector,decoder`, or other parts by commas."""

from __future__ import annotations

import re

from torch import nn

from ldistill.models.student import Student
from ldistill.sources import split_names

DEFAULT_TRAIN = "projector,decoder"
"""As in the paper (its Table 4): the vision tower stays as it is."""
_DECODER = {  # part → names of its parameters in the decoder
    "decoder": "",
    "attention": r"\.self_attn\.",
    "mlp": r"\.mlp\.",
    "gate_up": r"\.(gate|up|gate_up)_proj\.",
}
TRAINABLE = ("vision", "projector", *_DECODER)


def parse_train(text: str) -> set[str]:
    """Parts of ``projector,attention``. Raises ValueError for none, or one not of ``TRAINABLE``."""
    parts = split_names(text)
    unknown = [part for part in parts if part not in TRAINABLE]
    if unknown or not parts:
        raise ValueError(f"train takes {', '.join(TRAINABLE)}, by commas; got {text!r}.")
    return set(parts)


def train_only(student: Student, text: str = DEFAULT_TRAIN) -> None:
    """Freeze all of a student but these parts, before an optimizer or an engine knows it.

    Raises:
        ValueError: an unknown part, or one of which this decoder has nothing.
    """
    parts = parse_train(text)
    student.requires_grad_("projector" in parts)  # with what lies in none of the three, if anything
    for module in (student.backbone, student.lm_head):
        module.requires_grad_(False)
    student.vision.train("vision" in parts)
    for parameter in student.vision_parameters():
        parameter.requires_grad_("vision" in parts)
    for name in parts & _DECODER.keys():
        chosen = [p for n, p in student.backbone.named_parameters() if re.search(_DECODER[name], n)]
        if not chosen:
            raise ValueError(f"--train {name}: this decoder has no parameters of that name.")
        for parameter in chosen:
            parameter.requires_grad_(True)
    if "decoder" in parts:
        student.lm_head.requires_grad_(True)


def trained_share(module: nn.Module) -> float:
    """Of a module's own weight matrices, adapters left out: how much of them trains, 0 to 1."""
    sizes = {True: 0, False: 0}
    for name, parameter in module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # whole, also under ZeRO-3
        if len(shape) > 1 and "lora_" not in name:
            sizes[parameter.requires_grad] += shape.numel()
    return sizes[True] / max(1, sum(sizes.values()))
