"""The documents behind logged samples: their pictures, what stands in them, their categories.

lmms-eval's logs hold neither. They are taken from the task's data set as the results file names it,
from local files or the data sets cache; nothing is ever downloaded. A document only counts where a
text of it stands in the sample's prompt: the data may have been filtered or shuffled before.

The text in a picture comes from a text column of the data (InfographicVQA has ``ocr``), else from
the `tesseract` program, else from the answers to other questions about the same picture.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from ldistill.evaluation.compare.failure_modes import PictureText, accepted_answers
from ldistill.evaluation.compare.results import Sample, TaskResult

TEXT_COLUMNS = ("ocr", "ocr_text", "ocr_tokens", "picture_text", "words")
_PICTURE_IDS = (("image_url",), ("ucsf_document_id", "ucsf_document_page_no"), ("image_id",))
_QUESTION_COLUMNS = ("question", "query", "prompt", "context")
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_LOADER_KEYS = ("data_files", "data_dir", "revision", "cache_dir")


@dataclass
class TaskData:
    """The documents of one task, or the reason why they are not at hand."""

    documents: Sequence[Mapping[str, Any]] | None  # by `doc_id`; None: they could not be loaded
    reason: str = ""  # why not, as a clause
    read: bool = False  # whether tesseract reads pictures where the data holds no text
    folder: Path = Path()  # of pictures that it names by their files
    _read: dict[str, str] = field(default_factory=dict, repr=False)  # by the picture's hash

    def document(self, sample: Sample) -> Mapping[str, Any] | None:
        """The document of a sample, whose question (or any text) must stand in its prompt."""
        if self.documents is None or not 0 <= sample.doc_id < len(self.documents):
            return None
        document = self.documents[sample.doc_id]
        texts = {key: value.strip() for key, value in document.items() if isinstance(value, str)}
        questions = [texts[column] for column in _QUESTION_COLUMNS if texts.get(column)]
        known = (text for text in questions or texts.values() if len(text) >= 2)
        return document if any(text in sample.question for text in known) else None

    def pictures(self, sample: Sample) -> list[bytes]:
        document = self.document(sample)
        return [] if document is None else list(_pictures(document, self.folder))

    def text(self, sample: Sample, samples: Mapping[int, Sample]) -> PictureText:
        """What is known of the text in a sample's picture, also by the task's other ``samples``."""
        document = self.document(sample)
        if document is None:
            return PictureText()
        for column in TEXT_COLUMNS:
            if texts := tuple(_texts(document.get(column))):
                return PictureText(texts, "the picture's text (by its data set)", whole=True)
        seen = self.pictures(sample) if self.read and shutil.which("tesseract") else []
        if read := "\n".join(filter(None, map(self._tesseract, seen))):
            return PictureText((read,), "the picture's text (as tesseract reads it)", whole=True)
        others = (i for i in self._same_picture.get(sample.doc_id, ()) if i in samples)
        answers = (accepted_answers(samples[i].target) for i in others if i != sample.doc_id)
        known = tuple(answer for accepted in answers for answer in accepted)
        return PictureText(known, "the answer to another question about this picture")

    def _tesseract(self, picture: bytes) -> str:
        key = hashlib.sha1(picture).hexdigest()
        if key not in self._read:
            self._read[key] = read_text(picture)
        return self._read[key]

    @cached_property
    def _same_picture(self) -> dict[int, list[int]]:
        """Document → all documents of its picture, which is known by its id or its bytes."""
        same: dict[str, list[int]] = defaultdict(list)
        for doc_id, document in enumerate(self.documents or ()):
            ids = ([document.get(column) for column in columns] for columns in _PICTURE_IDS)
            whole = (own for own in ids if all(value not in (None, "") for value in own))
            key = next(("\n".join(map(str, own)) for own in whole), None)
            if key is None and (picture := next(_pictures(document, self.folder), None)):
                key = hashlib.sha1(picture).hexdigest()
            if key:
                same[key].append(doc_id)
        return {doc_id: documents for documents in same.values() for doc_id in documents}


def load_task_data(result: TaskResult, *, read: bool = True) -> TaskData:
    """The documents that a result's configuration names, if this machine has them."""
    import datasets
    import huggingface_hub.constants as hub

    config = result.config
    path, name = config.get("dataset_path"), config.get("dataset_name")
    split = config.get("test_split") or config.get("validation_split")
    if not path or not split:
        return TaskData(None, "the results file names no data set")
    kwargs = config.get("dataset_kwargs") or {}
    options = {key: kwargs[key] for key in _LOADER_KEYS if key in kwargs}
    # No look at the hub: data of a benchmark can be hundreds of gigabytes.
    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    datasets.utils.logging.disable_progress_bar()
    try:
        if kwargs.get("load_from_disk"):
            documents = datasets.load_from_disk(path)[split]
        else:
            documents = datasets.load_dataset(path, name, split=split, **options)
        for column, feature in documents.features.items():
            if isinstance(feature, datasets.Image):
                documents = documents.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # whatever a loader raises, the comparison goes on without pictures
        line = (str(error).splitlines() or [""])[0]
        where = f"data set {path}{f' ({name})' if name else ''}, split {split},"
        return TaskData(None, f"{where} is not on this machine ({line})")
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
    files = kwargs.get("data_files")  # pictures lie beside the first
    while isinstance(files, (Mapping, list)):
        files = next(iter(files.values() if isinstance(files, Mapping) else files), None)
    folder = Path(files).parent if isinstance(files, str) else Path()
    return TaskData(documents, read=read, folder=folder)


def _pictures(document: Mapping[str, Any], folder: Path) -> Iterator[bytes]:
    """Encoded pictures of its fields: bytes, files, data URIs."""
    fields = (value if isinstance(value, list) else [value] for value in document.values())
    for value in chain.from_iterable(fields):
        if isinstance(value, Image.Image):  # of a list of pictures
            encoded = io.BytesIO()
            value.save(encoded, "PNG")
            yield encoded.getvalue()
        elif isinstance(value, Mapping) and value.get("bytes"):
            yield value["bytes"]
        elif isinstance(value, str) and value.startswith("data:image/"):
            yield base64.b64decode(value.partition(",")[2])
        else:
            name = value.get("path") if isinstance(value, Mapping) else value
            named = isinstance(name, str) and name.lower().endswith(_ENDINGS)
            if named and (folder / name).is_file():
                yield (folder / name).read_bytes()


def _texts(value: Any) -> Iterator[str]:
    """Text of a text column: a string, a list of words, or OCR output as (a string of) JSON."""
    if isinstance(value, str):
        parsed = _json(value)
        if parsed is not None:
            yield from _texts(parsed)
        elif value.strip():
            yield value
    elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        as_json = [text for v in value if _json(v) is not None for text in _texts(v)]
        yield from as_json or [" ".join(value)]
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts, value))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if isinstance(part, (Mapping, list)) or key.lower() in ("text", "word", "words"):
                yield from _texts(part)


def _json(text: str) -> Any:
    """The list or object that a text is as JSON; None of other text."""
    try:
        return json.loads(text) if text.lstrip()[:1] in ("[", "{") else None
    except json.JSONDecodeError:
        return None


def read_text(picture: bytes) -> str:
    """What tesseract reads in a picture within a minute; empty when it fails."""
    command = ["tesseract", "stdin", "stdout"]
    try:
        done = subprocess.run(command, input=picture, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def inline_picture(picture: bytes) -> str | None:
    """A picture as a JPEG data URI, sides at most 640; None if it cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    image.thumbnail((640, 640))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
