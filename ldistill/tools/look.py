"""``ldistill look``: what the teacher says beside the student, token by token, as a page.

The answer is given, so student and teacher judge the same tokens: that is what training compares.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from jinja2 import Environment
from torch import Tensor
from transformers.utils import logging

from ldistill.common.errors import refuse
from ldistill.common.run_files import RECIPE
from ldistill.common.samples import IGNORE, Turn
from ldistill.data.collate import Collate, LoadedDocument, LoadedPack, to_device
from ldistill.distill.distiller import Distiller
from ldistill.distill.teacher import Teacher
from ldistill.evaluation.scorer import model_folder
from ldistill.models.pair import Pair, load_pair
from ldistill.sources import SourceWeights
from ldistill_kernels import distill_loss

Guess = tuple[str, float]  # a token and its probability
_FAINT = 0.05  # nats that are coloured fully where nothing is above: rounding stays white
_UNLIKELY = 0.005  # guesses below are not shown


@dataclass(frozen=True)
class Token:
    """A token of the answer, and what was expected in its place, given all before it.

    kl:      of the student from the teacher at the temperature of the :class:`Look`, in nats: what
             training would lower here. None where the teacher does not know what went before.
    student: the student's most probable tokens, at temperature 1; ``teacher``: the LM's over the
             student's keys and values; ``blind``: the LM's by itself, which sees no picture.
    p_student, p_teacher, p_blind: probabilities of the token itself.
    """

    text: str
    kl: float | None
    student: list[Guess]
    teacher: list[Guess]
    blind: list[Guess]
    p_student: float
    p_teacher: float
    p_blind: float


# White to orange: a text of any darkness stays readable on it.
_HTML = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
{% macro colour(share) %}background:rgba(255,120,0,{{ "%.3f" % (0.75 * share) }}){% endmacro %}
{% macro shown(text) %}{{ text | replace("\\n", "⏎") }}{% endmacro %}
{% if title %}<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<body style="background:#fff"><h2 style="font-family:sans-serif">{{ title }}</h2>{% endif %}
<style>
.look{font:14px/1.5 sans-serif;color:#222;background:#fff;max-width:60em}
.look img{min-width:8em;max-width:24em;max-height:18em;border:1px solid #ddd}
.look .answer{font-size:1.25em;line-height:1.9}
.look .answer span{padding:.15em 0;border-bottom:1px solid #ccc;white-space:pre-wrap}
.look .scale i{padding:.1em .5em;font-style:normal}
.look .tokens{border-collapse:collapse}
.look th,.look td{text-align:left;padding:.2em .8em;border-bottom:1px solid #ddd;color:#222}
.look code{background:#f2f2f2;color:#222;padding:0 .2em;white-space:pre}
.look small{color:#666}
</style>
<div class="look">
{% for kind, own in pictures %}<img src="data:image/{{ kind }};base64,{{ own }}" alt="">{% endfor %}
<p><b>{{ look.prompt }}</b></p>
<p class="answer">
{%- for token in look.tokens %}
<span style="{{ colour((token.kl or 0) / most) }}" title="
{%- if token.kl is none %}unknown to the teacher{% else %}KL {{ "%.3f" % token.kl }}{% endif %}">
{{- shown(token.text) }}</span>
{%- endfor %}
</p>
<p class="scale">KL from teacher to student at τ = {{ "%g" % look.temperature }}:
<i style="{{ colour(0) }}">0</i> to <i style="{{ colour(1) }}">{{ "%.2g" % most }} nats</i>,
mean {{ "%.3f" % look.kl }}</p>
<table class="tokens">
<tr><th>token</th><th>KL</th><th>student</th><th>teacher, over the student's keys and values</th>
<th>the LM by itself, blind</th></tr>
{% for token in look.tokens %}
<tr><td><code>{{ shown(token.text) }}</code></td><td style="{{ colour((token.kl or 0) / most) }}">
{{ "–" if token.kl is none else "%.3f" % token.kl }}</td>
{% for who in ("student", "teacher", "blind") %}
<td>
{%- for text, p in token[who] if p >= least %}
{{ ", " if not loop.first }}<code>{{ shown(text) }}</code> {{ "%.0f" % (100 * p) }}%
{%- else %}–{% endfor %}
<br><small>this token {{ "%.1f" % (100 * token["p_" ~ who]) }}%</small></td>
{% endfor %}
</tr>
{% endfor %}
</table></div>{% if title %}</body></html>{% endif %}
""")


@dataclass(frozen=True)
class Look:
    """An answer, token by token; as HTML a heat map over it and a table."""

    prompt: str
    images: tuple[bytes, ...]
    temperature: float
    tokens: list[Token]

    @property
    def kl(self) -> float:
        """Mean over the answer, in nats."""
        known = [token.kl for token in self.tokens if token.kl is not None]
        return sum(known) / max(1, len(known))

    def page(self, title: str) -> str:
        """A page that opens from the disk and fetches nothing; without a title, its inside."""
        most = max([_FAINT, *(token.kl or 0 for token in self.tokens)])
        kinds = ["png" if image.startswith(b"\x89PNG") else "jpeg" for image in self.images]
        pictures = zip(kinds, (base64.b64encode(image).decode() for image in self.images))
        return _HTML.render(look=self, title=title, most=most, least=_UNLIKELY, pictures=pictures)

    def _repr_html_(self) -> str:
        return self.page("")

    def lines(self) -> Iterator[str]:
        """The KL of every token and what the teacher expected, for a terminal."""
        for token in self.tokens:
            kl = "     –" if token.kl is None else f"{token.kl:6.3f}"
            said = ", ".join(f"{text!r} {p:.0%}" for text, p in token.teacher if p >= _UNLIKELY)
            yield f"KL {kl}  {token.text!r:16} teacher: {said}"


def look(
    pair: Pair,
    prompt: str,
    answer: str,
    images: Sequence[bytes] = (),
    *,
    temperature: float = 1.0,
    top: int = 3,
) -> Look:
    """Let student and teacher judge an answer, token by token; nothing is trained.

    Args:
        pair: of ``load_pair``, with its LM, on one device.
        prompt: any.
        answer: any; the end mark that the template puts behind it is judged, too.
        images: encoded pictures, shown before the question.
        temperature: τ of the KL.
        top: so many guesses of each.

    Raises:
        ValueError: no LM in the pair, nothing to judge, or more pictures than the processor takes.
        BadImage: a picture that cannot be used.
    """
    processor, student = pair.processor, pair.student
    count, most = len(images), processor.images.max_images
    cases = {
        "the pair was loaded without its LM: give load_pair a teacher.": pair.lm is None,
        f"{count} pictures, the processor takes {most}: load with max_images.": count > most,
    }
    refuse(cases)
    seen = [processor.load_image(image) for image in images]
    document = processor.encode([Turn(prompt, answer)], [image.size for image in seen])
    if not document.supervised:
        raise ValueError(f"the answer {answer!r} has no token to judge.")
    pictures = processor.pictures(seen)
    rotary = processor.rotary(document.input_ids, pictures)
    pack = LoadedPack([LoadedDocument(0, 0, document, pictures, rotary)])
    batch = Collate(processor.pad_token_id)([pack])

    weights, judged = SourceWeights(("look",), ("language",), (1.0,), (temperature,)), _Judged()
    distiller = Distiller(student, Teacher(pair.lm), weights, judged)
    supervision = distiller.supervise(batch)
    device, trained = student.lm_head.weight.device, student.training
    student.eval()
    with torch.no_grad():
        distiller(to_device(batch, device), supervision.to(device), 1.0, run_teacher=True)
        ids = torch.as_tensor(document.input_ids, dtype=torch.long)
        text = distiller.known(ids)  # what an LM without pictures can read
        alone = pair.lm(input_ids=ids[text][None].to(device), use_cache=False).logits[0]
    student.train(trained)

    def guess(logits: Tensor | None, label: int) -> tuple[list[Guess], float]:
        """The most probable tokens, and the probability of the label."""
        if logits is None:
            return [], 0.0
        p = logits.float().softmax(-1)
        values, ids = (part.tolist() for part in p.topk(min(top, len(p))))
        best = [(processor.tokenizer.decode([i]), value) for i, value in zip(ids, values)]
        return best, float(p[label]) if label < len(p) else 0.0

    read = text.cumsum(0) - 1  # place of a text token among the text tokens
    taught = {number: one for one, number in enumerate(supervision.targets.taught.tolist())}
    tokens = []
    for number, place in enumerate(np.flatnonzero(document.labels != IGNORE)):
        label, one = int(document.labels[place]), taught.get(number)
        of = [judged.student[number], None, None]
        if one is not None:
            of[1:] = judged.teacher[one], alone[read[place]]
        guesses, own = zip(*(guess(row, label) for row in of))
        kl = None if one is None else float(judged.kl[one])
        tokens.append(Token(processor.tokenizer.decode([label]), kl, *guesses, *own))
    return Look(prompt, tuple(images), temperature, tokens)


class _Judged:
    """Stands where the objective does: keeps what it was given, and the KL that it would add."""

    def __call__(self, student: Any, teacher: Any, targets: Any, **_: Any) -> Any:
        (h_s, w_s), (h_t, w_t) = student, teacher
        w_s, w_t = w_s.to(h_s.dtype), w_t.to(h_t.dtype)
        how = {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": targets.temperature}
        result = distill_loss(h_s, w_s, h_t, w_t, targets.label, kd_targets=targets.taught, **how)
        self.kl = result.kl.cpu()  # [taught]
        self.student, self.teacher = (h_s @ w_s.T), (h_t @ w_t.T)  # [targets or taught, vocabulary]
        return result.loss, result.loss[None, None]


def load_judges(student: str, teacher: str | None, **options: Any) -> tuple[Pair, str]:
    """Student and LM on the best device, and the LM's name; ``options`` are of ``load_pair``."""
    logging.disable_progress_bar()
    folder = model_folder(student)
    recipe = folder.parent / RECIPE
    if teacher is None and recipe.is_file():
        teacher = yaml.safe_load(recipe.read_text(encoding="utf-8"))["teacher"]
    elif teacher is None:
        raise ValueError(f"{student} is no run's folder: name the LM it was built on, --teacher.")
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    pair = load_pair(str(folder), teacher, dtype=dtype, **options)
    pair.student.to(device)
    pair.lm.to(device, dtype)
    return pair, teacher
