"""Students of transformers' families: its own classes, whole, with this program's entrances.

The model is kept as transformers built it, under ``vlm``, and its own forward puts features in
their places; what it is given are pictures as its processor made them, and positions that keep the
documents of a packed row apart. `hf_vlm_format` reads and writes checkpoints and makes inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ldistill.common.ranks import partitioned_by
from ldistill.common.samples import Pictures
from ldistill.models.student import LMHead, Student, keep_rotary_float32


@dataclass(frozen=True)
class Family:
    """What must be said of one of transformers' VLM classes, beyond what it says itself.

    tiling:   option of its image processor that cuts large pictures into tiles; ``always`` where
              it cannot be turned off, None where pictures are seen whole.
    sees:     positions that see what follows them: ``""`` none, ``pictures`` those of one picture
              each other, ``prefix`` all before the first answer.
    """

    tiling: str | None = None
    sees: str = ""

    def picture_options(self, kind: str, tiling: bool) -> dict[str, bool]:
        """Options of the image processor. Raises ValueError for tiles where there are none."""
        if tiling and self.tiling is None:
            raise ValueError(
                f"tiling: {kind} sees every picture whole; leave --tiling out, or use a family "
                "that cuts them (SmolVLM, InternVL)."
            )
        return {} if self.tiling in (None, "always") else {self.tiling: tiling}


_WHOLE = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v")
FAMILIES = {
    **dict.fromkeys((*_WHOLE, "mistral3", "kimi_k25", "video_llama_3"), Family()),
    **dict.fromkeys(("llava_next", "llava_onevision"), Family("always")),
    **dict.fromkeys(("idefics3", "smolvlm"), Family("do_image_splitting")),
    **dict.fromkeys(
        ("internvl", "ovis2", "aya_vision", "cohere2_vision"), Family("crop_to_patches")
    ),
    "gemma3": Family("do_pan_and_scan", sees="pictures"),
    "paligemma": Family(sees="prefix"),
}
"""By ``model_type``. A class of the LLaVA kind is a name."""


_LM_KINDS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
    "glm46v_text": "glm4",
}
"""Decoders that are an LM's with rotary positions of several axes."""


def lm_config(decoder: PretrainedConfig) -> PretrainedConfig:
    """Configuration of the LM that a student's decoder is: itself, or one of one rotary axis."""
    kind = _LM_KINDS.get(decoder.model_type)
    if kind is None:
        return decoder
    values = decoder.to_dict() | {"model_type": kind}
    rope = values["rope_parameters"]
    values["rope_parameters"] = {k: v for k, v in rope.items() if not k.startswith("mrope_")}
    return AutoConfig.for_model(**values)


def bare_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model without a weight, for those of its methods that read the configuration alone."""
    base = MODEL_MAPPING[type(config)]
    model = base.__new__(base)
    model.config = config
    return model


class HFVLM(Student):
    """A student around a ``...ForConditionalGeneration`` of transformers; ``blank`` holds the
    tensors of one picture, for batches that have none."""

    def __init__(self, vlm: PreTrainedModel, blank: Pictures) -> None:
        super().__init__()
        self.vlm = vlm
        LMHead.wrap(vlm.get_output_embeddings())
        keep_rotary_float32(vlm)
        self.image_token_id = vlm.config.image_token_id
        self.sees = FAMILIES[vlm.config.model_type].sees
        self._own_masks = self.sees == "pictures" or self.backbone.config.model_type == "gpt_oss"
        self._takes = set(signature(vlm.base_model.forward).parameters)
        accepted = signature(vlm.base_model.get_image_features).parameters
        self.blank = {name: value for name, value in blank.items() if name in accepted}
        self._blank_due = False
        self._packed: dict[str, Any] = {}
        self.backbone.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)

    @property
    def config(self) -> PretrainedConfig:
        return self.vlm.config

    @property
    def vision(self) -> nn.Module:
        return self.vlm.get_encoder("image")

    @property
    def projector(self) -> nn.ModuleList:
        """All between tower and decoder; towers of Qwen and GLM hold their mergers themselves."""
        vision, base = self.vision, self.vlm.base_model
        inside = [m for name, m in vision.named_children() if "merger" in name]
        beside = [m for m in base.children() if m not in (vision, self.backbone)]
        loose = nn.ParameterList(base.parameters(recurse=False))
        return nn.ModuleList([*inside, *beside, loose])

    @property
    def backbone(self) -> PreTrainedModel:
        return self.vlm.get_decoder()

    @property
    def lm_head(self) -> LMHead:
        return self.vlm.get_output_embeddings()

    @property
    def picture_token_ids(self) -> tuple[int, ...]:
        """Ovis2 has embeddings of its own around pictures, too."""
        indicators = getattr(self.config, "visual_indicator_token_ids", None) or ()
        return (self.image_token_id, *indicators)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        pictures: Pictures | None = None,
        attention_mask: Tensor | None = None,
        *,
        rotary: Tensor | None = None,
        answers: Tensor | None = None,
        **packed: Tensor | int,
    ) -> Tensor:
        if rotary is not None:  # documents are told apart by the first row: [4, batch, seq]
            position_ids = torch.cat([position_ids[None], rotary])
        if self._own_masks and attention_mask is None and position_ids is not None:
            attention_mask = self._masks(input_ids, position_ids)
        # Not handed down from here: some vision towers would take them for their own.
        self._packed = packed
        self._blank_due = self.training and not pictures
        output = self.vlm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **self._pictures(pictures),
            **self._types(input_ids, answers),
        )
        return output.last_hidden_state

    def tiles(self, pictures: Pictures) -> int:
        if not pictures:
            return 0
        if "pixel_attention_mask" in pictures:  # 0 where a picture has less tiles than others
            return int(pictures["pixel_attention_mask"].flatten(2).any(2).sum())
        if hasattr(self.config, "image_grid_pinpoints"):
            return sum(cut_tiles(self.config, pictures))
        if "image_sizes" in pictures:  # Pixtral's, padded to the largest
            return int((pictures["image_sizes"] // self.vision.config.patch_size).prod(1).sum())
        return len(pictures["pixel_values"])

    def _pictures(self, pictures: Pictures | None) -> Pictures:
        given, dtype = pictures or {}, self.backbone.dtype
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}

    def _types(self, input_ids: Tensor, answers: Tensor | None) -> dict[str, Tensor]:
        """What kind of token stands where, for those models that ask."""
        pictures = (input_ids == self.image_token_id).long()
        types = {"mm_token_type_ids": pictures} if "mm_token_type_ids" in self._takes else {}
        if self.sees:
            prefix = torch.zeros_like(input_ids) if answers is None else answers.long()
            types["token_type_ids"] = prefix if self.sees == "prefix" else pictures
        return types

    def _masks(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """Masks of packed rows by kind of layer, where the model's own do not keep documents apart.

        Gemma 3 looks pictures up at positions within their document, where a later document's are
        not; gpt-oss makes its masks without positions.
        """
        config, blocks = self.backbone.config, None
        shape = torch.empty(*input_ids.shape, 1, dtype=self.backbone.dtype, device=input_ids.device)
        if self.sees:
            pictures = input_ids == self.image_token_id
            first = pictures & ~nn.functional.pad(pictures, (1, -1))
            blocks = torch.where(pictures, first.cumsum(1) - 1, -1)
        how = (config, shape, None, None, position_ids)
        return {
            "full_attention": create_causal_mask(*how, block_sequence_ids=blocks),
            "sliding_attention": create_sliding_window_causal_mask(*how, block_sequence_ids=blocks),
        }

    def _enter_decoder(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Hand the documents' boundaries to the decoder, and embeddings that saw the tower."""
        kwargs = kwargs | self._packed
        if self._blank_due:
            self._blank_due = False
            kwargs["inputs_embeds"] = self._add_blank(kwargs["inputs_embeds"])
        return args, kwargs

    def _add_blank(self, embeds: Tensor) -> Tensor:
        """Add 0, by way of vision tower and projector: between embedding and decoder, and outside
        of both, because that is where a batch with pictures runs them, backward as well."""
        blank = {name: value.to(embeds.device) for name, value in self.blank.items()}
        seen = self.vlm.base_model.get_image_features(**self._pictures(blank), return_dict=True)
        # What is put among the embeddings, Qwen3-VL's deepstack and Ovis2's indicators too.
        inside = ("last_hidden_state", "hidden_states", "attentions")  # what the tower keeps
        tensors = _tensors([value for name, value in seen.items() if name not in inside])
        return embeds + sum((t * 0).sum() for t in tensors).to(embeds.dtype)

    def _generate(
        self, input_ids: Tensor, pictures: Pictures | None, mask: Tensor, options: dict[str, Any]
    ) -> Tensor:
        self._packed = {}
        whole = self.vlm.generate(
            input_ids=input_ids,
            attention_mask=mask,
            stopping_criteria=options.pop("stopping_criteria", None),
            generation_config=GenerationConfig(**options),
            **self._pictures(pictures),
            **self._types(input_ids, None),
        )
        return whole[:, input_ids.shape[1] :]

    def causal_lm(self) -> PreTrainedModel:
        """A ``...ForCausalLM`` of the decoder's kind around this student's decoder and head."""
        config = lm_config(self.backbone.config)
        with torch.device("meta"), partitioned_by(None):
            shell = AutoModelForCausalLM.from_config(config)
        if config is self.backbone.config:
            shell.model = self.backbone
        else:  # the same parameters in modules of that kind, which rotate along one axis
            state = self.backbone.state_dict(keep_vars=True)
            shell.model.load_state_dict(state, assign=True)
            shell.model.rotary_emb = type(shell.model.rotary_emb)(config)
        shell.lm_head = self.lm_head
        return shell.train(self.training)


def cut_tiles(config: PretrainedConfig, pictures: Pictures) -> list[int]:
    """Tiles of each picture of LLaVA-NeXT's kind; OneVision cuts one alone in a document."""
    sizes, together = pictures["image_sizes"].tolist(), pictures.get("batch_num_images")
    counts = [1] * len(sizes) if together is None else together.tolist()
    alone = [count == 1 for count in counts for _ in range(count)]
    side, grid = config.vision_config.image_size, config.image_grid_pinpoints
    return [
        image_size_to_num_patches(size, grid, side) if cut else 1
        for size, cut in zip(sizes, alone, strict=True)
    ]


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values or () for t in _tensors(value)]
