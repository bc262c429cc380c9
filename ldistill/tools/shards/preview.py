"""The first samples of each source as the model will see them: one HTML page that opens from disk.

Every sample goes the whole way of a build and of the loader: what is read, dropped, stored,
decoded, resized and tokenised here is what a run trains on. Tokens that are learnt have a colour.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image
from torch import Tensor

from ldistill.common.samples import IGNORE, Document, Sample
from ldistill.data.archive import sample_key, unpack_sample
from ldistill.data.build.build_types import SourceInput
from ldistill.data.build.workers import prepare

_PAGE = Environment(autoescape=True).from_string("""\
<!doctype html><meta charset="utf-8"><title>dry run</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
.tokens { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens span { background: #8882; border-radius: 3px; margin-right: 1px }
.tokens .learnt { background: #2a78 } .tokens .image { background: #48f6 }
img { height: 9em; margin: 0 .3em .3em 0; border: 1px solid #8888 } .drop { color: #b40 }
</style>
<p class="tokens"><span class="learnt">learnt</span> <span>read</span></p>
{% for title, parts in sources %}<h1>{{ title }}</h1>
{% for part in parts %}{% if part is string %}<p class="drop">{{ part }}</p>
{% else %}<h3>{{ part.title }}</h3>
{% for picture in part.pictures %}<img src="data:image/png;base64,{{ picture }}">{% endfor %}
<p class="tokens">{% for kind, text in part.tokens -%}
<span class="{{ kind }}">{{ text }}</span>{% endfor %}</p>
{% endif %}{% endfor %}{% endfor %}""")


def preview(inputs: Iterable[SourceInput], processor: Any, count: int, page: Path) -> None:
    """Write the page: the first `count` samples of each source, and what is dropped before them."""
    sources = [(f"{e.source} ({e.category})", [*_shown(e, processor, count)]) for e in inputs]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_PAGE.render(sources=sources), encoding="utf-8")


def _shown(entry: SourceInput, processor: Any, count: int) -> Iterator[str | dict[str, Any]]:
    for row, value in entry.rows(0):
        result = prepare(row, entry.convert(row, value), entry.source, processor)
        for drop in result.drops:
            what = "turn dropped" if drop.unit == "turn" else "dropped"
            yield f"record {drop.id}: {what}, {drop.reason}. {drop.detail}"
        if result.block:
            sample = unpack_sample(result.block, "", sample_key(entry.source, row))
            yield _sample(sample, processor)
            count -= 1
        if not count:
            return


def _sample(sample: Sample, processor: Any) -> dict[str, Any]:
    images = [processor.load_image(data) for data in sample.images]
    document = processor.encode(sample.turns, [i.size for i in images], sample.system)
    shown = images  # of patches in a row, the picture itself
    if images and (pixels := processor.pictures(images)["pixel_values"]).ndim > 3:
        shown = [_stretched(tile) for tile in pixels.flatten(0, -4)]
    counts = f"{len(document.input_ids)} tokens, {document.supervised} of them learnt"
    pictures, tokens = map(_png, shown), _tokens(document, processor)
    return {"title": f"{sample.id}: {counts}", "pictures": pictures, "tokens": tokens}


def _tokens(document: Document, processor: Any) -> Iterator[tuple[str, str]]:
    """(image, learnt or read; text) of every token, those of a picture together."""
    learnt = [False, *(document.labels[:-1] != IGNORE).tolist()]
    for (token, is_learnt), run in groupby(zip(document.input_ids.tolist(), learnt)):
        times, text = len([*run]), processor.tokenizer.decode([token])
        if token == processor.image_token_id:
            yield "image", f"{text} × {times} "
        else:
            yield from [("learnt" if is_learnt else "read", text)] * times


def _stretched(tile: Tensor) -> Image.Image:
    """One tile [3, S, S]; what a processor normalised is stretched back."""
    low, high = min(0.0, float(tile.min())), max(1.0, float(tile.max()))
    pixels = ((tile - low) * (255 / (high - low))).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
