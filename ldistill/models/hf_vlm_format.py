"""Checkpoints of transformers' VLMs: read by transformers, written back file by file; and inputs.

An export is a copy of the folder in which only trained tensors differ: same safetensors files and
index, same keys and dtypes, configuration, tokenizer and templates byte for byte. Tensors go
through one at a time, so that a 13B export needs the memory of one shard.

What stands for a picture in the text, and its tensors, are made by the checkpoint's own processor,
so a prompt has the ids that transformers gives it; and as the text depends on a picture's size
alone, shards are counted with blank pictures of that size, by the same code. Training needs an end
mark behind every answer; where the template writes none (LLaVA's), the tokenizer's end-of-text
token is put there, as in LLaVA's own training.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
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

from ldistill.common.locate import resolve
from ldistill.common.ranks import partitioned_by, partitioned_by_the_run
from ldistill.common.samples import BadImage, Pictures, Size, Turn
from ldistill.models.hf_vlm import FAMILIES, HFVLM, bare_model
from ldistill.models.lora import LowRank, updated
from ldistill.models.processor import Processor, check_token
from ldistill.models.weights import open_weights, read_model, refuse_misfit, weight_files

logger = logging.getLogger(__name__)

BLANK = (64, 64)  # pixels of the picture that stands for none
PREFIX = "vlm."  # of our parameter names before transformers'


def load_hf_vlm(
    name: str | Path, *, partition: bool = False, dtype: torch.dtype = torch.float32
) -> HFVLM:
    """As :func:`ldistill.models.formats.load_student`."""
    folder = resolve(name)
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        with open_weights(folder / file) as opened:
            for key in opened.keys():  # noqa: SIM118
                shapes[key] = opened.get_slice(key).get_shape()
    with partitioned_by_the_run() if partition else partitioned_by(None):
        vlm, problems, unused = read_model(AutoModelForImageTextToText, folder, dtype=dtype)
    model = HFVLM(vlm, load_processor(folder).pictures([Image.new("RGB", BLANK)]))
    # What trains must have a place in the export; a tied pair is stored once. With ZeRO-3
    # transformers tells rank 0 alone of another shape, so every rank looks.
    names, vision = DiskNames(folder), {id(p) for p in model.vision_parameters()}
    stored: dict[str, list[int] | None] = {}
    for key, shape in shapes.items():
        name, part = names.parameter(key)
        stored[name] = None if part else shape
    found = {
        id(p)
        for n, p in model.named_parameters(remove_duplicate=False)
        if n in stored and stored[n] in (None, list(getattr(p, "ds_shape", p.shape)))
    }
    lost = [n for n, p in model.named_parameters() if id(p) not in found | vision]
    refuse_misfit(folder, problems + [f"no tensor for {n.removeprefix(PREFIX)}" for n in lost])
    if unused:
        kept = ", ".join(unused[:5])
        logger.warning("%s: tensors kept on export but not used: %s", folder, kept)
    return model


def export_like(base: Path, updates: Mapping[str, Tensor | LowRank], folder: Path) -> None:
    """As :func:`ldistill.models.formats.export_like`, file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weight_files(base)
    for path in base.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            shutil.copyfile(path, folder / path.name)
    names = DiskNames(base)
    for name in weights:
        with safe_open(base / name, framework="pt") as file:
            tensors = {
                key: updated(file.get_tensor(key), names.update_of(key, updates))
                for key in file.keys()  # noqa: SIM118
            }
            metadata = dict(file.metadata() or {})
        whole = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        save_file(whole, folder / name, metadata=metadata or None)


class DiskNames:
    """What a checkpoint's tensors are called in memory: transformers renames old names as it loads,
    and fuses some (experts of a layer into one tensor)."""

    def __init__(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
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

    def update_of(
        self, key: str, updates: Mapping[str, Tensor | LowRank]
    ) -> Tensor | LowRank | None:
        """What training made of a tensor on disk; None: nothing."""
        name, part = self.parameter(key)
        update = updates.get(name)
        if update is None or not part:
            return update
        parts = loading.revert_weight_conversion(self._model, {name.removeprefix(PREFIX): update})
        return parts[loading.apply_renamings(key, self._renamings)]


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
TEMPLATES = {"paligemma": _PALIGEMMA}
"""Chat templates of families whose checkpoints have none."""


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
        images: what is chosen about pictures.

    Raises:
        ValueError: as :class:`Processor`, or the template does not render pictures and answers.
    """

    def __init__(
        self, processor: ProcessorMixin, config: PretrainedConfig, images: PictureSettings
    ) -> None:
        self.processor, tokenizer = processor, processor.tokenizer
        family = FAMILIES[config.model_type]
        tokenizer.chat_template = (
            processor.chat_template or tokenizer.chat_template or TEMPLATES.get(config.model_type)
        )
        chosen = family.picture_options(config.model_type, images.tiling)
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
        self._end = ""  # put behind answers where the template puts nothing
        self._invited = "", ""  # how it starts an answer, and how it invites one, where they differ
        # The first is a blank in LLaVA's and SmolVLM's templates: ``ASSISTANT: answer``.
        self.answer_prefix, mark = self._around_answer()
        if not mark:
            self._end = mark = tokenizer.eos_token
        self._in_order = self._keeps_order()
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
        problem = None
        if not found or "question" not in asked or not before.startswith(asked):
            problem = (
                "the chat template does not render user and assistant text given as a list of "
                "{type: text, text: ...}: it is not the template of a vision-language model"
            )
        elif not mark.strip() and self.tokenizer.eos_token is None:
            problem = "neither chat template nor tokenizer ends an answer: no eos_token"
        if problem:
            raise ValueError(problem)
        return before.removeprefix(asked), mark.strip()

    def _keeps_order(self) -> bool:
        """Whether the template leaves a picture amid a question where it is."""
        picture = {"type": "image", "shown": [self._placeholder]}
        asked = {"role": "user", "content": [_text("before"), picture, _text("after")]}
        before, _, after = self._render([asked]).partition(self._placeholder)
        return "before" in before and "after" in after

    def _messages(
        self, turns: Sequence[Turn], shown: Sequence[str], system: str = ""
    ) -> list[dict[str, Any]]:
        """A part's ``shown`` are the texts of its pictures."""
        messages = []
        if system:
            messages.append({"role": "system", "content": [_text(self.plain(system))]})
        for turn, pieces in zip(turns, self._pieces(turns, len(shown)), strict=True):
            parts = [
                _text(piece)
                if isinstance(piece, str)
                else {"type": "image", "shown": [shown[piece]]}
                for piece in pieces
            ]
            front = sum(part["type"] == "image" for part in parts)
            if parts[:front] != [part for part in parts if part["type"] == "image"]:
                parts = parts if self._in_order else self._as_tokens(parts)
            messages.append({"role": "user", "content": parts})
            answer = self.plain(turn.assistant) + self._end
            messages.append({"role": "assistant", "content": [_text(answer)]})
        return messages

    def _as_tokens(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pictures amid the text as the token itself: this template puts all others in front."""
        front = []
        while parts[0]["type"] == "image":
            front, parts = [*front, parts[0]], parts[1:]
        text = "".join(part.get("text", self._placeholder) for part in parts)
        return [*front, _text(text, [s for part in parts for s in part["shown"]])]

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

    def _tokenise(self, text: str, **options: Any) -> Any:
        """With the tokenizer's start token, unless the template wrote it (transformers' rule)."""
        start = self.tokenizer.bos_token
        written = start is not None and text.startswith(start)
        return self.tokenizer(text, add_special_tokens=not written, verbose=False, **options)

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
    name: str | Path, tokenizer: str | None = None, *, tiling: bool = False, max_images: int = 1
) -> HFProcessor:
    """As :func:`ldistill.models.formats.load_processor`."""
    folder = resolve(name, weights=False)
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
