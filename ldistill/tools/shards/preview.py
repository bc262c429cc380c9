"""The first samples of each source as the model will see them: one HTML page that opens from disk.

preview(inputs, processor, 3, Path("shards/dry_run.html"))

Every sample goes the whole way of a build and of the loader: what is read, dropped, stored,
decoded, resized and tokenised here is what a run trains on. Tokens that are learnt have a colour.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldistill.common.documents import IGNORE, Document
from ldistill.common.samples import Sample
from ldistill.data.archive import sample_key, unpack_sample
from ldistill.data.build.build_types import SourceInput
from ldistill.data.build.workers import prepare

if TYPE_CHECKING:
    import torch

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
.tokens { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens span { background: #8882; border-radius: 3px; margin-right: 1px }
.tokens .learnt { background: #2a78 } .tokens .image { background: #48f6 }
img { height: 9em; margin: 0 .3em .3em 0; border: 1px solid #8888 } .drop { color: #b40 }
"""


def preview(inputs: Iterable[SourceInput], processor: Any, count: int, page: Path) -> None:
    """Write the page: the first `count` samples of each source, and what is dropped before them."""
    body = []
    for entry in inputs:
        body.append(f"<h1>{html.escape(entry.source)} ({entry.category})</h1>")
        kept = 0
        for row, value in entry.rows(0):
            result = prepare(row, entry.convert(row, value), entry.source, processor)
            for drop in result.drops:
                what = "turn dropped" if drop.unit == "turn" else "dropped"
                text = f"record {drop.id}: {what}, {drop.reason}. {drop.detail}"
                body.append(f'<p class="drop">{html.escape(text)}</p>')
            if result.block:
                key = sample_key(entry.source, row)
                body.append(_sample(unpack_sample(result.block, "", key), processor))
                kept += 1
            if kept == count:
                break
    page.parent.mkdir(parents=True, exist_ok=True)
    title = f"<title>dry run</title><style>{STYLE}</style>"
    legend = '<p class="tokens"><span class="learnt">learnt</span> <span>read</span></p>'
    page.write_text(f'<!doctype html><meta charset="utf-8">{title}{legend}{"".join(body)}')


def _sample(sample: Sample, processor: Any) -> str:
    images = [processor.load_image(data) for data in sample.images]
    document = processor.encode(sample.turns, [i.size for i in images], sample.system)
    shown = images
    if images and (pixels := processor.pictures(images)["pixel_values"]).ndim > 3:
        shown = [_stretched(tile) for tile in pixels.flatten(0, -4)]
    pictures = "".join(map(_picture, shown))  # of patches in a row, the picture itself
    counts = f"{len(document.input_ids)} tokens, {document.supervised} of them learnt"
    tokens = _tokens(document, processor)
    return f'<h3>{html.escape(sample.id)}: {counts}</h3>{pictures}<p class="tokens">{tokens}</p>'


def _tokens(document: Document, processor: Any) -> str:
    learnt = np.concatenate([[False], document.labels[:-1] != IGNORE])
    places = zip(document.input_ids.tolist(), learnt.tolist(), strict=True)
    shown = []
    for (token, is_learnt), run in groupby(places):
        times, text = len(list(run)), processor.tokenizer.decode([token])
        name = "image" if token == processor.image_token_id else "learnt" if is_learnt else "read"
        if name == "image":
            text, times = f"{text} × {times} ", 1
        shown += [f'<span class="{name}">{html.escape(text)}</span>'] * times
    return "".join(shown)


def _stretched(tile: torch.Tensor) -> Image.Image:
    """One tile [3, S, S]; what a processor normalised is stretched back."""
    low, high = min(0.0, float(tile.min())), max(1.0, float(tile.max()))
    pixels = ((tile - low) * (255 / (high - low))).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def _picture(image: Image.Image) -> str:
    """As an image of the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
