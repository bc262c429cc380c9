"""``ldistill merge``: a student's decoder moved towards a language model, without training.

Every weight w of the decoder becomes (1 - weight) w_student + weight w_LM, computed in float32 and
written in the student's type: 0 leaves the student as it is, 1 puts the LM's decoder in. Vision
tower, projector and the added image tokens stay the student's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ldistill.common.locate import resolve
from ldistill.models.formats import export_like, load_processor, load_student
from ldistill.models.student import Student
from ldistill.models.weights import read_model, refuse_misfit

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
_FIELDS += ("num_key_value_heads", "rms_norm_eps", "rope_parameters")


def merge(student: str, lm: str, folders: Mapping[str, Path], layers: str | None = None) -> None:
    """Write a student for every weight.

    Args:
        student, lm: folders or hub ids.
        folders: weight (``0.3``; ``0:0.5`` from the first layer to the last) → where to.
        layers: only these, such as ``0-3,8``; then embedding and head stay as well.

    Raises ValueError: a weight or layer that cannot be, models that do not fit, a folder in use.
    """
    asked = {w: _bounds(w) for w in folders}
    for folder in folders.values():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: choose another --out.")
    base, lm_folder = resolve(student), resolve(lm)
    model = load_student(base)
    chosen = _chosen(layers, count := model.backbone.config.num_hidden_layers)
    towards, problems, _ = read_model(AutoModelForCausalLM, lm_folder, dtype=torch.float32)
    refuse_misfit(lm_folder, problems)
    _check_fit(model, towards)
    for text, (first, last) in asked.items():
        steps = [first + (last - first) * i / max(1, count - 1) for i in range(count)]
        export_like(base, _updates(base, model, towards, steps, chosen), folders[text])


def _bounds(text: str) -> tuple[float, float]:
    """Weight of the first layer and of the last one."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"a weight is a number from 0 to 1, or two, 0:0.5; got {text!r}.")
    return values[0], values[-1]


def _chosen(text: str | None, count: int) -> set[int] | None:
    """Layers of ``0-3,8``; None for the whole decoder."""
    if text is None:
        return None
    parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    spans = [(int(p[1]), int(p[2] or p[1])) for p in parts if p]
    if None in parts or any(first > last or last >= count for first, last in spans):
        known = f"--layers are numbers from 0 to {count - 1}, such as 0-1,3"
        raise ValueError(f"{known}; got {text!r}.")
    return {layer for first, last in spans for layer in range(first, last + 1)}


def _check_fit(student: Student, lm: PreTrainedModel) -> None:
    """Whether the LM's weights are of the student's decoder: kind, shapes, rotation, tie."""
    own, other = student.backbone.config, lm.config
    pairs = [(name, getattr(own, name, None), getattr(other, name, None)) for name in _FIELDS]
    theirs, decoder = lm.state_dict(), student.causal_lm()
    vocabulary = {id(p) for p in _of_vocabulary(decoder)}
    for name, parameter in decoder.named_parameters():
        shape = list(parameter.shape)
        found = list(theirs[name].shape) if name in theirs else None
        if found and id(parameter) in vocabulary and found[0] < shape[0]:
            found[0] = shape[0]  # the student has added tokens
        pairs.append((name, shape, found))
    problems = [f"{name}: student {own}, LM {other}" for name, own, other in pairs if own != other]
    embedding, head = _of_vocabulary(lm)
    if len(vocabulary) == 1 and not head.equal(embedding):
        problems.append("the student's head is its embedding, the LM has a head of its own")
    if problems:
        told = "; ".join(problems[:3]) + (" and others" if len(problems) > 3 else "")
        raise ValueError(f"LM and student do not fit, so they cannot be merged: {told}.")


def _of_vocabulary(lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Embedding and head, [vocabulary, hidden] each; the same tensor where they are tied."""
    return lm.get_input_embeddings().weight, lm.lm_head.weight


def _updates(
    base: Path, student: Student, lm: PreTrainedModel, steps: list[float], chosen: set[int] | None
) -> dict[str, Tensor]:
    """The merged decoder by the student's parameter names; nothing where the weight is 0."""
    decoder, theirs = student.causal_lm(), lm.state_dict()
    embedding, head = _of_vocabulary(decoder)
    updates = {}
    for name, own in decoder.named_parameters():
        layer = _LAYER.match(name)
        # The embedding goes with the first layer, the last norm and the head with the last.
        weight = steps[int(layer[1])] if layer else steps[0 if own is embedding else -1]
        left = chosen is not None and (layer is None or int(layer[1]) not in chosen)
        if left or weight == 0:
            continue
        other, merged = theirs[name], own.detach().clone()
        mixed = other if weight == 1 else torch.lerp(merged[: len(other)], other, weight)
        if own is embedding or own is head:
            kept = _image_tokens(base, student)
            kept = kept[kept < len(other)]
            mixed = mixed.index_copy(0, kept, merged[kept])
        merged[: len(other)] = mixed
        updates[own] = merged
    every = student.named_parameters(remove_duplicate=False)  # a tied pair has two names
    return {name: updates[parameter] for name, parameter in every if parameter in updates}


def _image_tokens(base: Path, student: Student) -> Tensor:
    """Ids of the image tokens, which an LM with the student's whole vocabulary has as well."""
    if student.base_vocab_size is not None:
        return torch.arange(student.base_vocab_size, student.backbone.config.vocab_size)
    processor = load_processor(base)
    known = processor.tokenizer.get_vocab().items()
    return torch.tensor([number for token, number in known if token in processor.literals])
