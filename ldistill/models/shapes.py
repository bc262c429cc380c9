"""Shapes of a pair, weights never loaded: what planning and benchmarks need of it.

Named pairs carry their public configurations; a recipe or a checkpoint folder brings its own. The
models are built by their real classes on the meta device, so parameters are counted, not estimated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from ldistill.common.locate import resolve
from ldistill.models.flops import decoder_layer_weights, vision_flops
from ldistill.models.hf_vlm import FAMILIES, tokens_per_tile
from ldistill.models.named_pairs import (
    KNOWN_STUDENTS,
    PAIRS,
    RECIPES,
    base_vocabulary,
    folder_config,
    student_config,
    teacher_config,
)
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.recipe import load_recipe, shipped_recipes


@dataclass(frozen=True)
class PairShape:
    """Sizes of a pair; weights are numbers of parameters, a tied head counted once.

    Args:
        name: as it was asked for.
        decoder: transformers configuration of the student's decoder.
        vision: transformers configuration of its vision tower.
        vision_weights, projector_weights, decoder_weights: of the student.
        teacher_weights, teacher_vocab: of the LM.
        image_tokens: positions one picture or tile takes in the decoder.
        projector_width: features that enter the projector per image token.
        length, micro_batch, global_batch, steps: the usual run's packed rows and their number.
    """

    name: str
    decoder: PretrainedConfig
    vision: PretrainedConfig
    vision_weights: int
    projector_weights: int
    decoder_weights: int
    teacher_weights: int
    teacher_vocab: int
    image_tokens: int
    projector_width: int
    length: int = 1024
    micro_batch: int = 8
    global_batch: int = 128
    steps: int = 4000

    @property
    def student_weights(self) -> int:
        return self.vision_weights + self.projector_weights + self.decoder_weights

    @property
    def trained_weights(self) -> int:
        """Projector and decoder; the vision tower is frozen."""
        return self.projector_weights + self.decoder_weights

    @property
    def head_dim(self) -> int:
        config = self.decoder
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def kv_width(self) -> int:
        """Width of the keys of one layer and position."""
        return self.decoder.num_key_value_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Matrix weights of one decoder layer."""
        return decoder_layer_weights(self.decoder)

    @property
    def embedding_weights(self) -> int:
        return self.decoder.vocab_size * self.decoder.hidden_size

    @property
    def largest_module(self) -> int:
        """Weights that ZeRO-3 must hold whole at once: the embedding or one layer."""
        return max(self.embedding_weights, self.layer_weights)

    @property
    def vision_flops(self) -> float:
        """Forward pass of the vision tower on one picture or tile."""
        return vision_flops(self.vision)


def pair_shape(name: str) -> PairShape:
    """Shape of a named pair, of a recipe (shipped name or YAML file) or of a checkpoint folder.

    A folder holds a student; its teacher is taken to be its own decoder over the base vocabulary.

    Raises:
        ValueError: no such pair, or a model of another kind.
        FileNotFoundError: a recipe's checkpoint is not at hand.
    """
    if name in PAIRS:
        return shape_of(name, student_config(name), _usual_run(RECIPES[name]))
    if name in KNOWN_STUDENTS:
        return pair_shape(KNOWN_STUDENTS[name])
    if name in shipped_recipes() or name.endswith((".yaml", ".yml")):
        return _of_recipe(name)
    if Path(name).is_dir():
        return shape_of(name, folder_config(Path(name)), {})
    raise ValueError(
        f"no pair {name!r}: give one of {', '.join(PAIRS)}, a recipe "
        f"({', '.join(shipped_recipes())} or a YAML file), or a student's folder."
    )


def _of_recipe(name: str) -> PairShape:
    student = load_recipe(name)["student"]
    known = KNOWN_STUDENTS.get(student)
    config = student_config(known) if known else folder_config(resolve(student, weights=False))
    return shape_of(name, config, _usual_run(name))


def _usual_run(recipe: str) -> dict[str, int]:
    """Fields of a :class:`PairShape` that a recipe sets."""
    values = load_recipe(recipe)
    fields = {
        "length": "max_length",
        "micro_batch": "per_device_train_batch_size",
        "global_batch": "global_batch_size",
        "steps": "max_steps",
    }
    return {name: values[field] for name, field in fields.items() if values.get(field)}


def shape_of(name: str, config: NanoVLMConfig | PretrainedConfig, run: dict[str, int]) -> PairShape:
    """Shape of a configuration, by building its models on the meta device.

    Args:
        name: what it is called.
        config: a student's.
        run: fields of :class:`PairShape` about the usual run.
    """
    with torch.device("meta"):
        parts = (_nanovlm_parts if isinstance(config, NanoVLMConfig) else _hf_parts)(config)
        teacher = AutoModelForCausalLM.from_config(teacher_config(config))
    return PairShape(
        name=name,
        teacher_weights=count(teacher),
        teacher_vocab=base_vocabulary(config),
        **parts,
        **run,
    )


def _nanovlm_parts(config: NanoVLMConfig) -> dict[str, Any]:
    student = NanoVLM(config)
    return {
        "decoder": student.decoder.config,
        "vision": student.vision.config,
        "vision_weights": count(student.vision),
        "projector_weights": count(student.projector),
        "decoder_weights": count(student.decoder),
        "image_tokens": config.mp_image_token_length,
        "projector_width": config.vit_hidden_dim * config.mp_pixel_shuffle_factor**2,
    }


def _hf_parts(config: PretrainedConfig) -> dict[str, Any]:
    model = AutoModelForImageTextToText.from_config(config)
    family = FAMILIES[config.model_type]
    vision = getattr(model.model, family.vision)
    projector, decoder = (getattr(model.model, n) for n in (family.projector, family.backbone))
    shuffle = getattr(config, "scale_factor", 1)
    return {
        "decoder": config.text_config,
        "vision": config.vision_config,
        "vision_weights": count(vision),
        "projector_weights": count(projector),
        "decoder_weights": count(decoder, model.lm_head),
        "image_tokens": tokens_per_tile(config),
        "projector_width": config.vision_config.hidden_size * shuffle**2,
    }


def count(*modules: nn.Module) -> int:
    """Parameters of modules, shared ones once."""
    unique = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(unique.values())
