"""lmms-eval's view of our models: ``--model ldistill_nanovlm`` and ``--model ldistill_hf``.

    lmms-eval --model ldistill_nanovlm --model_args pretrained=runs/x/student --tasks hellaswag ...

It is a *simple* model, the only kind that reaches multiple-choice tasks.
Requests with pictures, and all generation, are user turns in the model's chat template;
log-likelihoods without a picture are of plain text, so that ``acc`` and ``acc_norm`` mean what they
mean in lm-evaluation-harness. Tasks made of `items` say which of the two they want. An exception
ends the run and names the document: an answer is never made up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image
from tqdm import tqdm

from ldistill.evaluation.items import CHAT
from ldistill.evaluation.scorer import Question, load_scorer

# What lmms-eval and its tasks put into generation_kwargs besides what transformers understands.
_LIMITS = ("max_new_tokens", "max_gen_toks", "max_tokens")
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
_IGNORED = ("until", "image_aspect_ratio", "max_length", *_LIMITS)
_told: set[str] = set()


def manifests() -> list[ModelManifest]:
    """The model under both of its names, for the entry-point group ``lmms_eval.models``."""
    path, names = f"{__name__}.ScoredModel", ("ldistill_nanovlm", "ldistill_hf")
    return [ModelManifest(model_id=name, simple_class_path=path) for name in names]


class _Request(NamedTuple):
    """One of lmms-eval's requests."""

    text: str
    ask: Any  # continuation (str or function of the document), or generation options
    to_visual: Callable[[Any], Any]
    doc_id: int
    task: str
    split: str

    @property
    def where(self) -> str:
        return f"task {self.task}, document {self.doc_id}"


class ScoredModel(lmms):
    """A scorer behind lmms-eval's interface.

    Args:
        pretrained, options: see ``load_scorer``.
        batch_size: requests per forward; answers do not depend on it.
        device: default the GPU of this process's rank, else the CPU.
        max_new_tokens: where a task sets no limit.
        max_batch_size: lmms-eval passes it; no use without ``auto``.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = 128,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}.")
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or own)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.scorer = load_scorer(str(pretrained), device=self.device, **options)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(summed negative log-likelihood, is greedy) of each continuation; the smallest counts."""

        def answer(requests: Sequence[_Request], questions: list[Question]) -> list:
            asks = (r.ask(self._document(r)) if callable(r.ask) else r.ask for r in requests)
            scores = self.scorer.log_likelihoods(list(zip(questions, asks, strict=True)))
            # lmms-eval's evaluator turns a bare tuple into its text.
            return [GenerationResult(text=(-total, greedy)) for total, greedy in scores]

        return self._run(requests, answer, "log-likelihoods", chat=False)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers (unless the task samples), cut at the task's stop strings."""

        def answer(requests: Sequence[_Request], questions: list[Question]) -> list:
            limit, stop, sampling = read_options(requests[0].ask or {}, self.max_new_tokens)
            return self.scorer.generate(questions, limit, stop, **sampling)

        return self._run(requests, answer, "answers", chat=True)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise ValueError("ldistill's models answer one question at a time: no multi-round tasks.")

    def clean(self) -> None:
        del self.scorer
        super().clean()

    def _run(
        self, instances: Sequence[Instance], answer: Callable, what: str, chat: bool
    ) -> list[Any]:
        """Answers in the requests' order, asked batch by batch, the longest prompts first."""
        requests = [_Request(*instance.args) for instance in instances]

        def options(index: int) -> str:
            ask = requests[index].ask
            return repr(sorted(ask.items())) if isinstance(ask, dict) else ""

        answers: dict[int, Any] = {}
        order = sorted(range(len(requests)), key=lambda i: (options(i), -len(requests[i].text), i))
        same = (list(indices) for _, indices in groupby(order, key=options))
        size = self.batch_size
        batches = (own[i : i + size] for own in same for i in range(0, len(own), size))
        with tqdm(total=len(requests), desc=what, disable=self.rank != 0) as bar:
            for indices in batches:
                for part, questions in self._questions(requests, indices, chat):
                    batch = [requests[index] for index in part]
                    try:
                        answers |= zip(part, answer(batch, questions), strict=True)
                    except Exception as error:
                        where = " to ".join(dict.fromkeys((batch[0].where, batch[-1].where)))
                        where = f"batch from {where}" if len(batch) > 1 else where
                        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
                bar.update(len(indices))
        return [answers[index] for index in range(len(requests))]

    def _questions(
        self, requests: Sequence[_Request], indices: Sequence[int], chat: bool
    ) -> Iterator[tuple[list[int], list[Question]]]:
        """A batch with its pictures loaded: first what has none, then what has some."""
        loaded: dict[tuple[str, int], tuple[Image.Image, ...]] = {}
        parts: dict[bool, tuple[list[int], list[Question]]] = {False: ([], []), True: ([], [])}
        for index in indices:
            request = requests[index]
            key, document = (request.task, request.doc_id), self._document(request)
            if key not in loaded:  # an empty picture column gives None
                loaded[key] = tuple(v for v in request.to_visual(document) or () if v is not None)
            pictures = loaded[key]
            if other := {type(p).__name__ for p in pictures if not isinstance(p, Image.Image)}:
                what = f"no picture ({', '.join(other)}): these models take no video or audio"
                raise ValueError(f"{request.where} shows something that is {what}.")
            part, questions = parts[bool(pictures)]
            part.append(index)
            in_chat = document.get(CHAT, chat or bool(pictures))
            questions.append(Question(request.text, pictures, in_chat))
        return (part for part in parts.values() if part[0])

    def _document(self, request: _Request) -> dict[str, Any]:
        return self.task_dict[request.task][request.split][request.doc_id]


def read_options(
    options: dict[str, Any], max_new_tokens: int
) -> tuple[int, list[str], dict[str, Any]]:
    """Limit, stop strings and sampling options of a task's ``generation_kwargs``."""
    limit = next((int(options[name]) for name in _LIMITS if options.get(name)), max_new_tokens)
    until = options.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    sampling = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    if not sampling.get("do_sample") or not sampling.get("temperature", 1):
        sampling = {k: v for k, v in sampling.items() if k in ("num_beams", "repetition_penalty")}
    for name in sorted(options.keys() - {*_SAMPLING, *_IGNORED, *_told}):
        _told.add(name)
        logger.warning(f"generation option {name}={options[name]!r} is not used.")
    return limit, stop, sampling
