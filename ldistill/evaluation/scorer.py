"""The one scorer: a model of any kind, asked in batches.

Prompts are padded at the left, continuations behind them at the right, so that an answer does not
depend on what else is in its batch. A run's own evaluation (`items`), lmms-eval (`lmms_model`) and
``ldistill generate`` all ask through here.

    scorer = load_scorer("runs/lingudistill/student")
    scorer.generate([Question("What is this?", (picture,))], max_new_tokens=16)
    scorer.log_likelihoods([(Question("2 + 2 =", chat=False), " 4")])     # [(-0.1, True)]
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from jinja2 import TemplateError
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from ldistill.common.errors import refuse
from ldistill.common.locate import resolve
from ldistill.common.run_files import RECIPE
from ldistill.data.collate import merge, to_device
from ldistill.models.formats import load_processor, load_student
from ldistill.models.logits import LogitScaling
from ldistill.models.processor import Processor
from ldistill.models.weights import read_model, refuse_misfit

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A prompt with its pictures, which come before the text."""

    text: str
    pictures: tuple[Image, ...] = ()
    chat: bool = True  # a user's turn in the chat template; False: plain text to be continued


class Scorer:
    """A model with its tokenizer, in eval mode on its device.

    A kind of model has `_prompts`, of questions: ``input_ids`` and ``attention_mask`` [batch, seq],
    left-padded, and pictures; and `_logits`, of the last positions: [batch, last, vocabulary].
    """

    answer_prefix = ""  # what the template writes between the invitation and an answer
    echoes_prompt = True  # whether the model's ``generate`` gives the prompt back before new ids

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = next(model.parameters()).device
        pad = tokenizer.pad_token_id
        self.pad_id: int = tokenizer.eos_token_id or 0 if pad is None else pad
        self.ending: Inputs = {"pad_token_id": self.pad_id}  # options of ``generate``

    def _clean(self, text: str) -> str:
        """Text without what would be taken for a picture."""
        return text

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[tuple[Question, str]]) -> list[tuple[float, bool]]:
        """Of each continuation: summed log-likelihood, and whether greedy decoding gives it.

        Plain questions are split into tokens as lm-evaluation-harness does: context and
        continuation together, the context's trailing blanks with the continuation. In a chat the
        answer starts as the template writes it. ValueError: a continuation without tokens.
        """
        split = [self._split(question, continuation) for question, continuation in pairs]
        inputs = self._prompts([question for question, _ in split])
        answers = self._pad([tokens for _, tokens in split], left=False)
        ids, real = answers["input_ids"], answers["attention_mask"]  # [batch, longest]
        whole = {
            name: torch.cat([value, answers.get(name, torch.zeros_like(ids))], 1)
            for name, value in inputs.items()
            if torch.is_tensor(value) and value.shape == inputs["input_ids"].shape
        }
        # The last prompt position predicts the first id, and nothing follows the last one.
        logits = self._logits(inputs | whole, ids.shape[1] + 1)[:, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        totals = (picked.double() * real).sum(1)
        greedy = ((logits.argmax(-1) == ids) | (real == 0)).all(1)
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    @torch.no_grad()
    def generate(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> list[str]:
        """Answers, each cut before the first of the stop strings; greedy unless told otherwise."""
        inputs = self._prompts([replace(q, text=self._clean(q.text)) for q in questions])
        start = inputs["input_ids"].shape[1] if self.echoes_prompt else 0
        options = {"do_sample": False, "max_new_tokens": max_new_tokens} | self.ending | sampling
        if stop := [text for text in stop if text]:
            criterion = _Stops(self.tokenizer, stop, start)
            options["stopping_criteria"] = transformers.StoppingCriteriaList([criterion])
        new = self.model.generate(**inputs, **options)[:, start:]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [cut(text, stop).removeprefix(self.answer_prefix) for text in texts]

    def _split(self, question: Question, continuation: str) -> tuple[Question, list[int]]:
        text, continuation = self._clean(question.text), self._clean(continuation)
        if question.chat:
            answer = self.answer_prefix + continuation.removeprefix(" ")
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        else:
            whole, text = text + continuation, text.rstrip()
            ids = self._ids(whole)[len(self._ids(text)) :]
        if not ids:
            raise ValueError(f"the continuation {continuation!r} has no tokens of its own.")
        return replace(question, text=text), ids

    def _ids(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token  # unless a template wrote it there
        special = not (bos and text.startswith(bos))
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt; one start token where there would be none."""
        first = self.tokenizer.bos_token_id
        return self._ids(text) or [self.tokenizer.eos_token_id if first is None else first]

    def _pad(self, rows: Sequence[Sequence[int]], left: bool = True) -> Inputs:
        """int64 [rows, longest] and its mask."""
        ids = [torch.as_tensor(row, dtype=torch.int64, device=self.device) for row in rows]
        options = {"batch_first": True, "padding_side": "left" if left else "right"}
        mask = pad_sequence([torch.ones_like(row) for row in ids], **options)
        ids = pad_sequence(ids, **options, padding_value=self.pad_id)
        return {"input_ids": ids, "attention_mask": mask}


class StudentScorer(Scorer):
    """A student of any format with its processor."""

    echoes_prompt = False  # a student generates from embeddings

    def __init__(self, model: Any, processor: Processor) -> None:
        super().__init__(model, processor.tokenizer)
        self.processor, self.answer_prefix = processor, processor.answer_prefix
        self.ending["eos_token_id"] = processor.stop_token_ids

    def _clean(self, text: str) -> str:
        return self.processor.clean(text)

    def _prompts(self, questions: Sequence[Question]) -> Inputs:
        rows, pictures, self._rotary = [], [], []
        for question in questions:
            images = [picture.convert("RGB") for picture in question.pictures]
            pictures.append(self.processor.pictures(images))
            if question.chat:
                ids = self.processor.prompt((), question.text, [image.size for image in images])
            else:
                ids = np.asarray(self._prompt_ids(question.text), dtype=np.int32)
            rows.append(ids)
            self._rotary.append(self.processor.rotary(ids, pictures[-1]))
        return self._pad(rows) | to_device({"pictures": merge(pictures)}, self.device)

    def _logits(self, inputs: Inputs, last: int) -> Tensor:
        positions = _positions(inputs["attention_mask"])
        answers = torch.zeros_like(positions, dtype=torch.bool)
        answers[:, 1 - last :] = True  # `last` counts the prompt's last position
        options = inputs | {"position_ids": positions, "answers": answers}
        if self._rotary[0] is not None:
            axes = options["rotary"] = positions.repeat(len(self._rotary[0]), 1, 1)
            for row, prompt in enumerate(self._rotary):  # of the prompts, then counted on
                behind = prompt[:, -1:] + torch.arange(1, last)
                axes[:, row, 1 - last - prompt.shape[1] :] = torch.cat([prompt, behind], 1)
        product = self.model.lm_head(self.model(**options)[:, -last:])
        return LogitScaling.of(self.model.backbone.config)(product)


class LMScorer(Scorer):
    """A language model; `pictures`: what happens to a question's, ``error`` or ``drop``."""

    def __init__(self, model: Any, tokenizer: Any, pictures: str = "error") -> None:
        super().__init__(model, tokenizer)
        self.pictures = pictures
        self._accepts = set(inspect.signature(model.forward).parameters)
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        self._own_positions = "mrope_section" in rope  # 3-D positions: the model makes them itself

    def _render(self, question: Question) -> str:
        """The question in the chat template, up to where the answer starts."""
        if not self.tokenizer.chat_template:
            return question.text
        turn = [{"role": "user", "content": question.text}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def _prompts(self, questions: Sequence[Question]) -> Inputs:
        if self.pictures != "drop" and any(question.pictures for question in questions):
            raise ValueError(
                "a bare LM cannot see: choose tasks of text alone, or --drop-pictures."
            )
        texts = [self._render(q) if q.chat else q.text for q in questions]
        return self._pad([self._prompt_ids(text) for text in texts])

    def _logits(self, inputs: Inputs, last: int) -> Tensor:
        options: Inputs = {"use_cache": False}
        if "position_ids" in self._accepts and not self._own_positions:
            options["position_ids"] = _positions(inputs["attention_mask"])
        if "logits_to_keep" in self._accepts:
            options["logits_to_keep"] = last
        return self.model(**inputs, **options).logits[:, -last:]


class VLMScorer(LMScorer):
    """Any VLM of transformers with its own processor; `tiling` is SmolVLM's image splitting."""

    def __init__(self, model: Any, processor: Any, tiling: bool = False) -> None:
        super().__init__(model, processor.tokenizer)
        splits = hasattr(getattr(processor, "image_processor", None), "do_image_splitting")
        template = processor.chat_template or processor.tokenizer.chat_template
        cases = {
            f"tiling: {type(processor).__name__} has no image splitting.": tiling and not splits,
            "the processor has no chat template: name one (chat_template=FILE).": not template,
        }
        refuse(cases)
        self.processor = processor
        self._options: Inputs = {"do_image_splitting": tiling} if splits else {}
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token_id is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        self.image_token = image_token(processor)
        self.answer_prefix = self._blank_before_answers()

    def _clean(self, text: str) -> str:
        return text.replace(self.image_token, "") if self.image_token else text

    def _prompts(self, questions: Sequence[Question]) -> Inputs:
        """All of the questions with pictures, or none (a batch is never mixed)."""
        if not any(question.pictures for question in questions):
            return super()._prompts(questions)
        inputs = self.processor(
            text=[self._render(question) for question in questions],
            images=[[p.convert("RGB") for p in question.pictures] for question in questions],
            padding=True,
            return_tensors="pt",
            **self._options,
        )
        return {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if torch.is_tensor(value)
        }

    def _logits(self, inputs: Inputs, last: int) -> Tensor:
        """As the decoder's own class makes them of the head's product: not all VLM classes do."""
        products: list[Tensor] = []
        head = self.model.get_output_embeddings()
        with head.register_forward_hook(lambda *call: products.append(call[-1])):
            super()._logits(inputs, last)
        return LogitScaling.of(self.model.config.get_text_config())(products[0][:, -last:])

    def _blank_before_answers(self) -> str:
        """What the template writes before an answer beyond the invitation: ``Assistant: yes``."""
        told = {r: [{"type": "text", "text": r}] for r in ("user", "assistant")}
        turns = [{"role": r, "content": content} for r, content in told.items()]
        try:
            whole = self.processor.apply_chat_template(turns, tokenize=False)
        except (TemplateError, TypeError):  # a template that takes no such answers
            return ""
        before, invited = whole.rpartition("assistant")[0], self._render(Question("user"))
        blank = before.removeprefix(invited)
        return blank if before.startswith(invited) and not blank.strip() else ""

    def _render(self, question: Question) -> str:
        text = {"type": "text", "text": question.text}
        turn = {"role": "user", "content": [*({"type": "image"} for _ in question.pictures), text]}
        template = self.processor.apply_chat_template
        return template([turn], tokenize=False, add_generation_prompt=True)


def image_token(processor: Any) -> str | None:
    token = getattr(processor, "image_token", None)
    return getattr(token, "content", token)


class _Stops(transformers.StoppingCriteria):
    """Rows whose new text contains a stop string are done."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        # A token may be one byte of a character of four, so this many can hold any stop string.
        self.tail = 4 * max(map(len, stop)) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        new = input_ids[:, self.start :][:, -self.tail :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def cut(text: str, stop: Sequence[str]) -> str:
    return min((text.partition(end)[0] for end in stop), key=len, default=text)


def _positions(mask: Tensor) -> Tensor:
    """Positions that start at 0 behind the padding, [batch, seq]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def model_folder(name: str) -> Path:
    """Folder of a model, of a run its student; FileNotFoundError: neither here nor on the hub."""
    folder = resolve(name)
    places = (folder, folder / "student")
    return next((place for place in places if (place / "config.json").is_file()), folder)


def tiled_in_training(name: str) -> bool:
    """Whether the run that left this model cut its pictures into tiles; False without a run."""
    folder = model_folder(name).resolve().parent  # of a run, or of its checkpoint
    for recipe in (folder / RECIPE, folder.parent / RECIPE):
        if recipe.is_file():
            return bool((yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("tiling"))
    return False


def kind_of(folder: Path) -> str:
    """``nanovlm``, ``vlm`` or ``lm``; FileNotFoundError, ValueError: not a model, another kind."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a model folder.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if "vit_hidden_dim" in config:
        return "nanovlm"
    named = config.get("model_type")
    cls = type(transformers.AutoConfig.from_pretrained(folder)) if named else None
    for kind, auto in (("vlm", AutoModelForImageTextToText), ("lm", AutoModelForCausalLM)):
        if cls in auto._model_mapping:
            return kind
    raise ValueError(f"{folder} is of model_type {named!r}: neither a VLM nor an LM.")


def load_scorer(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    tokenizer: str | None = None,
    tiling: bool | None = None,
    pictures: str = "error",
    chat_template: str | None = None,
) -> Scorer:
    """A model of whichever kind its folder holds.

    Args:
        name: folder, ``pkg://`` or hub id; FileNotFoundError, ValueError: of no usable model.
        device: where it runs.
        dtype: ``auto`` (bfloat16 on a GPU, float32 on a CPU) or torch's name of a type.
        tokenizer: default the model's own.
        tiling: cut large pictures into tiles (nanoVLM, SmolVLM); None: as in training.
        pictures: LM alone: ``error`` or ``drop``.
        chat_template: file with a chat template, for a VLM or LM that has none.
    """
    folder, device = model_folder(name), torch.device(device)
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch_type = usual if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(torch_type, torch.dtype):
        raise ValueError(f"dtype must be auto or a torch type such as bfloat16, got {dtype!r}.")
    kind = kind_of(folder)
    tiling = tiled_in_training(name) if tiling is None else tiling
    if kind == "nanovlm":
        processor = load_processor(folder, tokenizer, tiling=tiling)
        return StudentScorer(load_student(folder, dtype=torch_type).to(device), processor)
    template = Path(chat_template).read_text(encoding="utf-8") if chat_template else None
    other = AutoTokenizer.from_pretrained(resolve(tokenizer)) if tokenizer else None
    if kind == "lm":
        tok = other or AutoTokenizer.from_pretrained(folder)
        tok.chat_template = template or tok.chat_template
        lm = _whole(AutoModelForCausalLM, folder, torch_type)
        return LMScorer(lm.to(device), tok, pictures)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.chat_template = template or processor.chat_template
    if other:
        own, token = processor.tokenizer, image_token(processor)
        if token and other.convert_tokens_to_ids(token) != own.convert_tokens_to_ids(token):
            raise ValueError(f"tokenizer {tokenizer!r} gives {token} another id than the model's.")
        other.chat_template = own.chat_template or other.chat_template
        processor.tokenizer = other
    vlm = _whole(AutoModelForImageTextToText, folder, torch_type)
    return VLMScorer(vlm.to(device), processor, tiling)


def _whole(auto: Any, folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model whose every weight comes from its folder: random ones would be scored as well."""
    model, problems, _ = read_model(auto, folder, dtype=dtype)
    refuse_misfit(folder, problems)
    return model
