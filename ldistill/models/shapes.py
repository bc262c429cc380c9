"""Shapes of a pair, weights never loaded: what planning and benchmarks need of it.

Models are built by their real classes on the meta device: parameters are counted, not estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from ldistill.models import flops
from ldistill.models.flops import decoder_layer_weights
from ldistill.models.hf_vlm import HFVLM
from ldistill.models.named_pairs import base_vocabulary, teacher_config
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.towers import Tower, picture_tokens, tower_of


@dataclass(frozen=True)
class PairShape:
    """Sizes of a pair; weights are numbers of parameters, a tied head counted once."""

    name: str  # as it was asked for
    decoder: PretrainedConfig  # transformers configuration of the student's
    vision: Tower  # sizes of its vision tower
    vision_weights: int
    projector_weights: int
    decoder_weights: int
    teacher_weights: int
    teacher_vocab: int  # of the LM
    image_tokens: int  # positions one picture takes in the decoder, or one tile of it
    length: int = 1024  # of the usual run's packed rows
    micro_batch: int = 8  # rows
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
        return flops.head_dim(self.decoder)

    @property
    def kv_width(self) -> int:
        """Width of the keys of one layer and position."""
        return self.decoder.num_key_value_heads * self.head_dim

    @property
    def embedding_weights(self) -> int:
        return self.decoder.vocab_size * self.decoder.hidden_size

    @property
    def largest_module(self) -> int:
        """Weights that ZeRO-3 must hold whole at once: the embedding or one layer."""
        return max(self.embedding_weights, decoder_layer_weights(self.decoder))

    def step_flops(
        self, counts: flops.StepCounts, kv_scope: str = "full", lora_rank: int = 0
    ) -> float:
        """FLOPs of one rank's step, see :func:`ldistill.models.flops.step_flops`."""
        return flops.step_flops(
            self.decoder,
            counts,
            vision_flops_per_tile=self.vision.tiles * flops.vision_flops(self.vision),
            projector_weights=self.projector_weights,
            tokens_per_tile=self.image_tokens,
            kv_scope=kv_scope,
            lora_rank=lora_rank,
            trained=0.0 if lora_rank else 1.0,
            head_trained=not lora_rank,
        )


def shape_of(name: str, config: NanoVLMConfig | PretrainedConfig, run: dict[str, int]) -> PairShape:
    """Shape of a student's configuration; ``run`` are fields of :class:`PairShape` about the usual
    run."""
    nano = isinstance(config, NanoVLMConfig)
    make = AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        student = NanoVLM(config) if nano else HFVLM(make(config), {})
        teacher = AutoModelForCausalLM.from_config(teacher_config(config))
    projector, decoder = count(student.projector), count(student.backbone, student.lm_head)
    return PairShape(
        name=name,
        decoder=student.backbone.config,
        vision=tower_of(student.vision.config if nano else config),
        vision_weights=count(student) - projector - decoder,
        projector_weights=projector,
        decoder_weights=decoder,
        teacher_weights=count(teacher),
        teacher_vocab=base_vocabulary(config),
        image_tokens=config.mp_image_token_length if nano else picture_tokens(config),
        **run,
    )


def count(*modules: nn.Module) -> int:
    """Parameters of modules, shared ones once."""
    unique = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(unique.values())
