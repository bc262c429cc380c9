"""Models that answer questions in batches: a nanoVLM student, a Hugging Face VLM, a bare LM.

Two things are asked of a model: the summed log-likelihood of a continuation, and a generated
answer. Both work on prompts padded at the left, continuations behind them padded at the right, so
that an answer does not depend on what else is in its batch.

    model = load_answerer("runs/lingudistill/student")      # in answerer_loading
    model.generate([Question("What is this?", (picture,))], max_new_tokens=16)
    model.log_likelihoods([(Question("2 + 2 =", chat=False), " 4")])     # [(-0.1, True)]
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from PIL.Image import Image

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A prompt with its pictures, which come before the text."""

    text: str
    pictures: tuple[Image, ...] = ()
    chat: bool = True
    """A user's turn in the model's chat template; False: plain text to be continued."""


class Answerer(ABC):
    """A model with its tokenizer, in eval mode on its device."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = next(model.parameters()).device
        pad = tokenizer.pad_token_id
        self.pad_id: int = tokenizer.eos_token_id or 0 if pad is None else pad
        self.answer_prefix = ""  # between the template's invitation and an answer

    # ---- what a kind of model has to say ----

    @abstractmethod
    def _prompts(self, questions: Sequence[Question]) -> Inputs:
        """``input_ids`` and ``attention_mask`` [batch, seq], left-padded, and the pictures."""

    @abstractmethod
    def _logits(self, inputs: Inputs, last: int) -> Tensor:
        """Logits of the last positions, [batch, last, vocabulary]."""

    @abstractmethod
    def _generate(self, inputs: Inputs, start: int, **options: Any) -> Tensor:
        """New token ids [batch, new]; `start` is how many ids of ``generate``'s are no news."""

    def _clean(self, text: str) -> str:
        """Text without what would be taken for a picture."""
        return text

    # ---- what it is asked ----

    @torch.inference_mode()
    def log_likelihoods(self, pairs: Sequence[tuple[Question, str]]) -> list[tuple[float, bool]]:
        """Of each continuation: summed log-likelihood, and whether greedy decoding gives it.

        Plain questions are split into tokens as lm-evaluation-harness does: context and
        continuation together, the context's trailing blanks with the continuation. In a chat the
        answer starts as the template writes it, whatever blank the continuation begins with.

        Raises:
            ValueError: a continuation without tokens.
        """
        split = [self._split(question, continuation) for question, continuation in pairs]
        inputs = self._prompts([question for question, _ in split])
        longest = max(len(ids) for _, ids in split)
        ids = torch.full((len(split), longest), self.pad_id, device=self.device)
        real = torch.zeros_like(ids)
        for row, (_, tokens) in enumerate(split):
            ids[row, : len(tokens)] = torch.tensor(tokens, device=self.device)
            real[row, : len(tokens)] = 1
        logits = self._logits(_append(inputs, ids, real), longest + 1)[:, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        totals = (picked.double() * real).sum(1)
        greedy = ((logits.argmax(-1) == ids) | (real == 0)).all(1)
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    @torch.inference_mode()
    def generate(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> list[str]:
        """Answers, each cut before the first of the stop strings; greedy unless told otherwise."""
        inputs = self._prompts([self._cleaned(question) for question in questions])
        stop = [text for text in stop if text]
        start = self._generated_from(inputs)
        options = {"do_sample": False, "max_new_tokens": max_new_tokens} | sampling
        if stop:
            criterion = _Stops(self.tokenizer, stop, start)
            options["stopping_criteria"] = StoppingCriteriaList([criterion])
        new = self._generate(inputs, start, pad_token_id=self.pad_id, **options)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [cut(text, stop).removeprefix(self.answer_prefix) for text in texts]

    # ---- tokens ----

    def _generated_from(self, inputs: Inputs) -> int:
        """Ids that ``generate`` gives back in front of the new ones."""
        return inputs["input_ids"].shape[1]

    def _cleaned(self, question: Question) -> Question:
        return replace(question, text=self._clean(question.text))

    def _split(self, question: Question, continuation: str) -> tuple[Question, list[int]]:
        question, continuation = self._cleaned(question), self._clean(continuation)
        if question.chat:
            answer = self.answer_prefix + continuation.removeprefix(" ")
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        else:
            context = question.text.rstrip()
            whole = question.text + continuation
            question = replace(question, text=context)
            ids = self._plain_ids(whole)[len(self._plain_ids(context)) :]
        if not ids:
            raise ValueError(f"the continuation {continuation!r} has no tokens of its own.")
        return question, ids

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _plain_prompt(self, question: Question) -> list[int]:
        """Ids of a plain prompt; one start token where there would be none."""
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        return self._plain_ids(question.text) or [first]

    def _chat_prompt(self, text: str) -> list[int]:
        """Ids of a rendered chat; the tokenizer's start token unless the template wrote it."""
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _pad(self, rows: Sequence[Sequence[int]]) -> Inputs:
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, longest - len(tokens) :] = torch.as_tensor(tokens)
            mask[row, longest - len(tokens) :] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}


class StudentAnswerer(Answerer):
    """A nanoVLM folder, ours or stock."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor.tokenizer)
        self.processor = processor

    def _clean(self, text: str) -> str:
        return self.processor.clean(text)

    def _prompts(self, questions: Sequence[Question]) -> Inputs:
        rows, tiles = [], []
        for question in questions:
            grids = []
            for picture in question.pictures:
                tile, grid = self.processor.tiles(picture.convert("RGB"))
                tiles.append(tile)
                grids.append(grid)
            if question.chat:
                rows.append(self.processor.prompt((), question.text, grids).tolist())
            else:
                rows.append(self._plain_prompt(question))
        pixels = torch.cat(tiles).to(self.device) if tiles else None
        return self._pad(rows) | {"pixel_values": pixels}

    def _logits(self, inputs: Inputs, last: int) -> Tensor:
        positions = _positions(inputs["attention_mask"])
        return self.model.lm_head(self.model(position_ids=positions, **inputs)[:, -last:])

    def _generated_from(self, inputs: Inputs) -> int:
        return 0  # it starts from embeddings, so only new ids come back

    def _generate(self, inputs: Inputs, start: int, **options: Any) -> Tensor:
        return self.model.generate(**inputs, eos_token_id=self.tokenizer.eos_token_id, **options)


class TransformersAnswerer(Answerer):
    """What bare LMs and Hugging Face VLMs share: their forward and their ``generate``."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._accepts = set(inspect.signature(model.forward).parameters)
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        self._own_positions = "mrope_section" in rope  # 3-D positions: the model makes them itself

    def _logits(self, inputs: Inputs, last: int) -> Tensor:
        options: Inputs = {"use_cache": False}
        if "position_ids" in self._accepts and not self._own_positions:
            options["position_ids"] = _positions(inputs["attention_mask"])
        if "logits_to_keep" in self._accepts:
            options["logits_to_keep"] = last
        return self.model(**inputs, **options).logits[:, -last:]

    def _generate(self, inputs: Inputs, start: int, **options: Any) -> Tensor:
        return self.model.generate(**inputs, **options)[:, start:]


class LMAnswerer(TransformersAnswerer):
    """A language model: the teacher, as the ceiling of the text-only tasks.

    `pictures` says what happens to a question that has some: ``error`` or ``drop``.
    """

    def __init__(self, model: Any, tokenizer: Any, pictures: str = "error") -> None:
        super().__init__(model, tokenizer)
        if pictures not in ("error", "drop"):
            raise ValueError(f"pictures must be error or drop, got {pictures!r}.")
        self.pictures = pictures

    def _prompts(self, questions: Sequence[Question]) -> Inputs:
        if self.pictures == "error" and any(question.pictures for question in questions):
            raise ValueError(
                "the question has a picture, and a bare language model cannot see: evaluate it on "
                "text-only tasks, or leave the pictures out with pictures=drop (--drop-pictures)."
            )
        return self._pad([self._ids(question) for question in questions])

    def _ids(self, question: Question) -> list[int]:
        if not question.chat or not self.tokenizer.chat_template:
            return self._plain_prompt(question)
        turn = [{"role": "user", "content": question.text}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self._chat_prompt(text)


class VLMAnswerer(TransformersAnswerer):
    """A Hugging Face VLM with its processor: LLaVA, SmolVLM/Idefics3 and their kind.

    `tiling` is SmolVLM's image splitting: on in its processor unless told otherwise, off in
    training unless the run says so.
    """

    def __init__(self, model: Any, processor: Any, tiling: bool = False) -> None:
        super().__init__(model, processor.tokenizer)
        images = getattr(processor, "image_processor", None)
        splits = hasattr(images, "do_image_splitting")
        if tiling and not splits:
            raise ValueError(
                f"tiling: {type(processor).__name__} has no image splitting to turn on; leave it "
                "out, or evaluate a nanoVLM or a SmolVLM."
            )
        self._options: Inputs = {"do_image_splitting": tiling} if splits else {}
        if not (processor.chat_template or processor.tokenizer.chat_template):
            raise ValueError(
                "the processor has no chat template: name a file with one (chat_template=FILE)."
            )
        self.processor = processor
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token_id is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        token = getattr(processor, "image_token", None)
        self.image_token: str | None = getattr(token, "content", token)
        self.answer_prefix = self._blank_before_answers()

    def _clean(self, text: str) -> str:
        return text.replace(self.image_token, "") if self.image_token else text

    def _prompts(self, questions: Sequence[Question]) -> Inputs:
        """All of the questions with pictures, or none (a batch is never mixed)."""
        if not any(question.pictures for question in questions):
            return self._pad([self._text_ids(question) for question in questions])
        inputs = self.processor(
            text=[self._render(question) for question in questions],
            images=[[p.convert("RGB") for p in question.pictures] for question in questions],
            padding=True,
            return_tensors="pt",
            **self._options,
        )
        floats = {k: v for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
        return {k: v.to(self.device) for k, v in inputs.items() if torch.is_tensor(v)} | {
            k: v.to(self.device, self.model.dtype) for k, v in floats.items()
        }

    def _blank_before_answers(self) -> str:
        """What the template writes before an answer beyond the invitation: ``Assistant: yes``."""
        turns = [
            {"role": role, "content": [{"type": "text", "text": role}]}
            for role in ("user", "assistant")
        ]
        try:
            whole = self.processor.apply_chat_template(turns, tokenize=False)
        except (TemplateError, TypeError):  # a template that takes no such answers
            return ""
        before, invited = whole.rpartition("assistant")[0], self._render(Question("user"))
        blank = before.removeprefix(invited)
        return blank if before.startswith(invited) and not blank.strip() else ""

    def _text_ids(self, question: Question) -> list[int]:
        if not question.chat:
            return self._plain_prompt(question)
        return self._chat_prompt(self._render(question))

    def _render(self, question: Question) -> str:
        content: list[dict[str, str]] = [{"type": "image"} for _ in question.pictures]
        content.append({"type": "text", "text": question.text})
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )


class _Stops(StoppingCriteria):
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
    """Text before the first stop string in it."""
    ends = [place for place in (text.find(s) for s in stop) if place >= 0]
    return text[: min(ends)] if ends else text


def _positions(mask: Tensor) -> Tensor:
    """Positions that start at 0 behind the padding, [batch, seq]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _append(inputs: Inputs, ids: Tensor, real: Tensor) -> Inputs:
    """Inputs with continuations behind the prompts; other tensors of that shape get zeros."""
    shape = inputs["input_ids"].shape
    longer = {
        name: torch.cat([value, value.new_zeros(ids.shape)], 1)
        for name, value in inputs.items()
        if torch.is_tensor(value) and value.shape == shape
    }
    longer["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], real], 1)
    return inputs | longer
