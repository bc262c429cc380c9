"""Checkpoints of transformers' VLMs: read by transformers, written back by its names; and inputs.

What stands for a picture in the text, and its tensors, are made by the checkpoint's own processor,
so a prompt has the ids that transformers gives it; and as the text depends on a picture's size
alone, shards are counted with blank pictures of that size, by the same code. Training needs an end
mark behind every answer; where the template writes none (LLaVA's), the tokenizer's end-of-text
token is put there, as in LLaVA's own training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    ProcessorMixin,
)
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from ldistill.common.errors import refuse
from ldistill.common.locate import resolve
from ldistill.common.ranks import partitioned_by, partitioned_by_the_run
from ldistill.common.samples import BadImage, Pictures, Size, Turn
from ldistill.models.hf_vlm import FAMILIES, HFVLM, bare_model
from ldistill.models.lora import WeightUpdates, updated
from ldistill.models.processor import Processor, check_token
from ldistill.models.weights import read_model, refuse_misfit, stored

logger = logging.getLogger(__name__)

NAME, COPIED = f"transformers' {', '.join(FAMILIES)}", "*"
BLANK = (64, 64)  # pixels of the picture that stands for none
PREFIX = "vlm."  # of our parameter names before transformers'


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of one of these families."""
    return config.get("model_type") in FAMILIES


def load_student(folder: Path, *, partition: bool, dtype: torch.dtype) -> HFVLM:
    """As :func:`ldistill.models.formats.load_student`."""
    on_disk = stored(folder)
    with partitioned_by_the_run() if partition else partitioned_by(None):
        vlm, problems, unused = read_model(AutoModelForImageTextToText, folder, dtype=dtype)
    model = HFVLM(vlm, load_processor(folder).pictures([Image.new("RGB", BLANK)]))
    # What trains must have a place in the export; a tied pair is stored once. With ZeRO-3
    # transformers tells rank 0 alone of another shape, so every rank looks.
    names, vision = Revision(folder, {}), {id(p) for p in model.vision_parameters()}
    places: dict[str, list[int] | None] = {}
    for key, (_, shape) in on_disk.items():
        name, part = names.parameter(key)
        places[name] = None if part else shape
    found = {
        id(p)
        for n, p in model.named_parameters(remove_duplicate=False)
        if n in places and places[n] in (None, list(getattr(p, "ds_shape", p.shape)))
    }
    lost = [n for n, p in model.named_parameters() if id(p) not in found | vision]
    refuse_misfit(folder, problems + [f"no tensor for {n.removeprefix(PREFIX)}" for n in lost])
    if unused:
        kept = ", ".join(unused[:5])
        logger.warning("%s: tensors kept on export but not used: %s", folder, kept)
    return model


class Revision:
    """What training made of each tensor of a folder, see `formats.export_like`. transformers
    renames old names as it loads, and fuses some (experts of a layer into one tensor)."""

    def __init__(self, base: Path, updates: WeightUpdates) -> None:
        self._updates = updates
        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"), partitioned_by(None):
            self._model = AutoModelForImageTextToText.from_config(config)
        conversions = get_model_conversion_mapping(self._model)
        self._renamings = [c for c in conversions if isinstance(c, loading.WeightRenaming)]
        self._fusions = [c for c in conversions if isinstance(c, loading.WeightConverter)]
        self._state = self._model.state_dict()
        self._model._weight_conversions = self._fusions or None  # of which to take fused ones apart

    def parameter(self, key: str) -> tuple[str, bool]:
        """Our name of a tensor on disk, and whether it is only a part of that."""
        prefix = self._model.base_model_prefix
        how = (self._renamings, self._fusions, prefix, self._state)
        name, fusion = loading.rename_source_key(key, *how)
        return PREFIX + name, fusion is not None

    def __call__(self, key: str, tensor: Tensor) -> Tensor:
        name, part = self.parameter(key)
        update = self._updates.get(name)
        if update is not None and part:
            whole = {name.removeprefix(PREFIX): update}
            parts = loading.revert_weight_conversion(self._model, whole)
            update = parts[loading.apply_renamings(key, self._renamings)]
        return updated(tensor, update)


# ---- inputs ----

KNOWN_SIZES = 4096  # documents' picture sizes whose text is remembered
# What these pictures become tells one way of cutting pictures from another.
SAMPLE_SIZES = ((640, 480), (96, 1000), (1300, 1301))

# As its processor writes a prompt: pictures, the start token, the question, a line feed.
_PALIGEMMA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% if loop.first %}<bos>{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'][0]['text'] }}<eos>{% endif %}{% endfor %}"
)
TEMPLATES = {"paligemma": _PALIGEMMA}  # of families whose checkpoints have none


@dataclass(frozen=True)
class PictureSettings:
    """What is chosen about pictures; all else is the checkpoint's processor's."""

    tiling: bool = False
    max_images: int = 1
    tokens_per_tile: int = 1
    """Shards count image tokens in these, for pictures of a family take no fixed number."""


class HFProcessor(Processor):
    """Tokenizer, chat template and pictures of a transformers VLM.

    Args:
        processor: the checkpoint's; its tokenizer is the one that is used.
        config: of the whole model.

    Raises:
        ValueError: as :class:`Processor`, or the template does not render pictures and answers.
    """

    _in_order = True  # whether the template leaves a picture amid a question where it is
    _invited = "", ""  # how it starts an answer, and how it invites one, where they differ

    def __init__(
        self, processor: ProcessorMixin, config: PretrainedConfig, images: PictureSettings
    ) -> None:
        self.processor, tokenizer = processor, processor.tokenizer
        tokenizer.chat_template = (
            processor.chat_template or tokenizer.chat_template or TEMPLATES.get(config.model_type)
        )
        chosen = FAMILIES[config.model_type].picture_options(config.model_type, images.tiling)
        self._options = processor._merge_kwargs(
            tokenizer_init_kwargs=tokenizer.init_kwargs,
            images_kwargs={"return_tensors": "pt", **chosen},
        )["images_kwargs"]
        self._placeholder = str(processor.image_token)  # what the template writes for a picture
        whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        self._inputs = set(signature(whole.forward).parameters)
        self._known: dict[tuple[Size, ...], list[str]] = {}
        self._rope_index = getattr(bare_model(config), "get_rope_index", None)
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        shown = self.picture_texts([SAMPLE_SIZES[0]])[0]
        added = tokenizer.get_added_vocab()
        literals = {self._placeholder, image_token} | {t for t in added if t in shown}
        super().__init__(tokenizer, images, image_token, literals)
        # The first is a blank in LLaVA's and SmolVLM's templates: ``ASSISTANT: answer``.
        self.answer_prefix, mark = self._around_answer()
        if not mark:
            self._end = mark = tokenizer.eos_token
        picture = {"type": "image", "shown": [self._placeholder]}
        asked = {"role": "user", "content": [_text("before"), picture, _text("after")]}
        before, _, after = self._render([asked]).partition(self._placeholder)
        self._in_order = "before" in before and "after" in after
        stops = [tokenizer.eos_token_id, tokenizer.get_vocab().get(mark)]
        self.stop_token_ids = list(dict.fromkeys(i for i in stops if i is not None))

    # text --------------------------------------------------------------------------------------

    def _around_answer(self) -> tuple[str, str]:
        """What the template writes before an answer, and behind it without the blanks there."""
        messages = self._messages([Turn("question", "answer")], [])
        plain, asked = self._render(messages[:1]), self._render(messages[:1], generation=True)
        before, found, mark = self._render(messages).rpartition("answer")
        if asked.startswith(plain) and before.startswith(plain) and not before.startswith(asked):
            self._invited = before.removeprefix(plain), asked.removeprefix(plain)
            before = asked
        cases = {
            "the chat template does not render user and assistant text given as a list of {type: "
            "text, text: ...}: it is not the template of a vision-language model": (
                not found or "question" not in asked or not before.startswith(asked)
            ),
            "neither chat template nor tokenizer ends an answer: no eos_token": (
                not mark.strip() and self.tokenizer.eos_token is None
            ),
        }
        refuse(cases)
        return before.removeprefix(asked), mark.strip()

    def _content(self, pieces: Sequence[str | int], shown: Sequence[str]) -> list[dict[str, Any]]:
        """A part's ``shown`` are the texts of its pictures. Where the template puts all pictures in
        front, those amid the text are written as the token itself."""
        parts = [
            _text(piece) if isinstance(piece, str) else {"type": "image", "shown": [shown[piece]]}
            for piece in pieces
        ]
        if self._in_order:
            return parts
        front = list(takewhile(lambda part: part["type"] == "image", parts))
        amid = parts[len(front) :]
        text = "".join(part.get("text", self._placeholder) for part in amid)
        return [*front, _text(text, [s for part in amid for s in part["shown"]])]

    def _render(self, messages: list[dict[str, Any]], generation: bool = False) -> str:
        text = super()._render(messages, generation).replace(*self._invited)
        if self._end and not generation:
            text = text.rstrip()  # what follows the end mark starts the next turn
        first, *rest = text.split(self._placeholder)
        shown = [s for m in messages for part in m["content"] for s in part["shown"]]
        if len(rest) != len(shown):
            raise ValueError(
                f"the chat template writes {self._placeholder} {len(rest)} times for {len(shown)} "
                "pictures: it is not the template of this family"
            )
        return first + "".join(p + after for p, after in zip(shown, rest, strict=True))

    def _begins(self, text: str) -> bool:
        """Whether the template wrote the tokenizer's start token (transformers' rule)."""
        start = self.tokenizer.bos_token
        return start is not None and text.startswith(start)

    # pictures ----------------------------------------------------------------------------------

    def _process(self, images: Sequence[Image.Image]) -> tuple[Any, list[str]]:
        """What transformers' processor makes of a document's pictures, and the text of each."""
        marks = [self._placeholder * len(images)]
        laid = self.processor.prepare_inputs_layout(images=list(images), text=marks)[0]
        try:
            return self.processor._process_images(laid, **self._options)
        except (ValueError, ZeroDivisionError) as error:  # too narrow, too small
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise BadImage("refused picture", f"{sizes}: {error}") from error

    def picture_texts(self, sizes: Sequence[Size]) -> list[str]:
        """As transformers' processor writes it."""
        key = tuple(map(tuple, sizes))
        if key and key not in self._known:
            if len(self._known) >= KNOWN_SIZES:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._process([Image.new("RGB", size) for size in key])[1]
        return self._known[key] if key else []

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Those tensors that the model's ``forward`` takes, by its names."""
        if not images:
            return {}
        made = {k: v for k, v in self._process(images)[0].items() if k in self._inputs}
        return {name: torch.as_tensor(value) for name, value in made.items()}

    def rotary(self, input_ids: np.ndarray, pictures: Pictures) -> Tensor | None:
        """By the model's own ``get_rope_index``; int64 [3, n]."""
        if self._rope_index is None:
            return None
        ids = torch.from_numpy(input_ids.astype(np.int64))[None]
        grids = {name: grid for name, grid in pictures.items() if name == "image_grid_thw"}
        types = (ids == self.image_token_id).int()
        return self._rope_index(ids, mm_token_type_ids=types, **grids)[0][:, 0]

    def _picture_parts(self) -> dict[str, object]:
        samples = [self.picture_texts([size]) for size in SAMPLE_SIZES]
        return {"pictures": [self._placeholder, self.images.tiling, samples]}


def _text(text: str, shown: Sequence[str] = ()) -> dict[str, Any]:
    return {"type": "text", "text": text, "shown": list(shown)}


def load_processor(
    folder: Path, tokenizer: str | None = None, *, tiling: bool = False, max_images: int = 1
) -> HFProcessor:
    """As :func:`ldistill.models.formats.load_processor`."""
    config = AutoConfig.from_pretrained(folder)
    source = resolve(tokenizer, weights=False) if tokenizer else folder
    try:
        processor = AutoProcessor.from_pretrained(folder)
        image_token = processor.tokenizer.convert_ids_to_tokens(config.image_token_id)
        if tokenizer:
            processor.tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"the processor of {str(folder)!r} cannot be loaded: {error}") from error
    if image_token is None:
        raise ValueError(
            f"the tokenizer of {str(folder)!r} has no token of id {config.image_token_id}, which "
            "its config.json calls the image token: copy both from one checkpoint."
        )
    check_token(processor.tokenizer, image_token, config.image_token_id, source)
    return HFProcessor(processor, config, PictureSettings(tiling, max_images))
