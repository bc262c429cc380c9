"""The documents behind logged samples: their pictures, what stands in them, their categories.

lmms-eval's logs hold neither documents nor pictures. They are taken from the task's data set as the
results file names it, from local files or the data sets cache; nothing is ever downloaded. A
document is only used when a text of it stands in the sample's prompt, so that a data set that was
filtered or shuffled before evaluation cannot pass for the one that was evaluated.

The text in a picture comes from, in this order: a text column of the data (InfographicVQA has
``ocr``), the `tesseract` program where it is installed, the answers to other questions about the
same picture.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ldistill.evaluation.compare.failure_modes import PictureText, accepted_answers
from ldistill.evaluation.compare.results import Sample, TaskResult

TEXT_COLUMNS = ("ocr", "ocr_text", "ocr_tokens", "picture_text", "words")
_PICTURE_IDS = (("image_url",), ("ucsf_document_id", "ucsf_document_page_no"), ("image_id",))
_QUESTION_COLUMNS = ("question", "query", "prompt", "context")
_LOADER_KEYS = ("data_files", "data_dir", "revision", "cache_dir")
_LONGEST_SIDE = 640


@dataclass
class TaskData:
    """The documents of one task, or the reason why they are not at hand.

    Args:
        documents: indexed by ``doc_id``; None when they could not be loaded.
        reason: why not, as a clause.
        folder: where picture files are looked for that the data names by relative path.
        read: whether to read pictures with tesseract where the data holds no text.
    """

    documents: Sequence[Mapping[str, Any]] | None
    reason: str = ""
    folder: Path = Path()
    read: bool = True
    _read: dict[str, str] = field(default_factory=dict)

    def document(self, sample: Sample) -> Mapping[str, Any] | None:
        """The document of a sample, checked against its prompt."""
        if self.documents is None or not 0 <= sample.doc_id < len(self.documents):
            return None
        document = self.documents[sample.doc_id]
        return document if _asked(document, sample.question) else None

    def pictures(self, sample: Sample) -> list[bytes]:
        """Encoded pictures of a sample's document; empty without any."""
        document = self.document(sample)
        return [] if document is None else list(_pictures(document, self.folder))

    def text(self, sample: Sample, samples: Mapping[int, Sample]) -> PictureText:
        """What is known of the text in a sample's picture.

        Args:
            sample: whose picture.
            samples: all of the task, for what was asked about the same picture.
        """
        document = self.document(sample)
        if document is None:
            return PictureText()
        for column in TEXT_COLUMNS:
            texts = tuple(_texts(document.get(column)))
            if texts:
                return PictureText(texts, "the picture's text (by its data set)", whole=True)
        read = self._tesseract(sample)
        if read:
            return PictureText((read,), "the picture's text (as tesseract reads it)", whole=True)
        others = tuple(self._other_answers(sample, samples))
        return PictureText(others, "the answer to another question about this picture")

    def _tesseract(self, sample: Sample) -> str:
        if not self.read or not shutil.which("tesseract"):
            return ""
        texts = []
        for picture in self.pictures(sample):
            key = hashlib.sha1(picture).hexdigest()
            if key not in self._read:
                self._read[key] = read_text(picture)
            texts.append(self._read[key])
        return "\n".join(filter(None, texts))

    def _other_answers(self, sample: Sample, samples: Mapping[int, Sample]) -> Iterator[str]:
        key = self._keys.get(sample.doc_id)
        for doc_id in self._same_picture.get(key, ()) if key else ():
            if doc_id != sample.doc_id and doc_id in samples:
                yield from accepted_answers(samples[doc_id].target)

    @cached_property
    def _keys(self) -> dict[int, str]:
        """Document → what identifies its picture."""
        keys = {}
        for doc_id in range(len(self.documents or ())):
            key = _picture_key(self.documents[doc_id], self.folder)
            if key:
                keys[doc_id] = key
        return keys

    @cached_property
    def _same_picture(self) -> dict[str, list[int]]:
        same: dict[str, list[int]] = {}
        for doc_id, key in self._keys.items():
            same.setdefault(key, []).append(doc_id)
        return same


def load_task_data(result: TaskResult, *, read: bool = True) -> TaskData:
    """The documents a result was made from, if this machine has them.

    Args:
        result: of any variant; its configuration names the data set.
        read: see `TaskData`.
    """
    config = result.config
    path, split = config.get("dataset_path"), _split(config)
    if not path or not split:
        return TaskData(None, "the results file names no data set", read=read)
    name = config.get("dataset_name")
    where = f"data set {path}{f' ({name})' if name else ''}, split {split},"
    kwargs = config.get("dataset_kwargs") or {}
    try:
        with _offline():
            documents = _load(path, name, split, kwargs)
    except Exception as error:  # whatever a loader raises, the comparison goes on without pictures
        line = (str(error).splitlines() or [""])[0]
        return TaskData(None, f"{where} is not on this machine ({line})", read=read)
    return TaskData(documents, folder=_data_folder(kwargs), read=read)


def _split(config: Mapping[str, Any]) -> str | None:
    return config.get("test_split") or config.get("validation_split")


def _load(path: str, name: str | None, split: str, kwargs: Mapping[str, Any]) -> Any:
    import datasets

    if kwargs.get("load_from_disk"):
        loaded = datasets.load_from_disk(path)[split]
    else:
        options = {key: kwargs[key] for key in _LOADER_KEYS if key in kwargs}
        loaded = datasets.load_dataset(path, name, split=split, **options)
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
    return loaded


@contextmanager
def _offline() -> Iterator[None]:
    """No look at the hub: data of a benchmark can be hundreds of gigabytes."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def _data_folder(kwargs: Mapping[str, Any]) -> Path:
    """Folder of the first local data file."""
    files = kwargs.get("data_files")
    while isinstance(files, (Mapping, list)):
        files = next(iter(files.values() if isinstance(files, Mapping) else files), None)
    return Path(files).parent if isinstance(files, str) else Path()


def _asked(document: Mapping[str, Any], prompt: str) -> bool:
    """Whether the document's question, or lacking one any text of it, stands in the prompt."""
    texts = {key: value.strip() for key, value in document.items() if isinstance(value, str)}
    questions = [texts[column] for column in _QUESTION_COLUMNS if texts.get(column)]
    return any(text in prompt for text in questions or texts.values() if len(text) >= 2)


def _pictures(document: Mapping[str, Any], folder: Path) -> Iterator[bytes]:
    for value in document.values():
        for part in value if isinstance(value, list) else [value]:
            picture = _picture(part, folder)
            if picture is not None:
                yield picture


def _picture(value: Any, folder: Path) -> bytes | None:
    """Encoded picture of a field: bytes, a data URI, a file, or None if it is no picture."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        return value.get("bytes") or _file(value.get("path"), folder)
    if isinstance(value, Image.Image):
        encoded = io.BytesIO()
        value.save(encoded, "PNG")
        return encoded.getvalue()
    if isinstance(value, str):
        if value.startswith("data:image/"):
            return base64.b64decode(value.partition(",")[2])
        if value.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            return _file(value, folder)
    return None


def _file(name: str | None, folder: Path) -> bytes | None:
    path = folder / name if name else None
    return path.read_bytes() if path is not None and path.is_file() else None


def _picture_key(document: Mapping[str, Any], folder: Path) -> str | None:
    for columns in _PICTURE_IDS:
        if all(document.get(column) not in (None, "") for column in columns):
            return "\n".join(str(document[column]) for column in columns)
    picture = next(_pictures(document, folder), None)
    return None if picture is None else hashlib.sha1(picture).hexdigest()


def _texts(value: Any) -> Iterator[str]:
    """Text of a text column: a string, a list of words, or OCR output as (a string of) JSON."""
    if isinstance(value, str) and value.strip():
        if value.lstrip()[0] in "[{":
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                yield value
                return
            yield from _texts(value)
        else:
            yield value
    elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        texts = list(value)
        as_json = [t for v in texts if v.lstrip()[:1] in ("[", "{") for t in _texts(v)]
        yield from as_json or [" ".join(texts)]
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if isinstance(part, (Mapping, list)) or key.lower() in ("text", "word", "words"):
                yield from _texts(part)


def read_text(picture: bytes, seconds: float = 60) -> str:
    """What tesseract reads in a picture; empty when it fails."""
    command = ["tesseract", "stdin", "stdout"]
    try:
        done = subprocess.run(command, input=picture, capture_output=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def inline_picture(picture: bytes, longest: int = _LONGEST_SIDE) -> str | None:
    """A picture as a JPEG data URI, sides at most ``longest``; None if it cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    image.thumbnail((longest, longest))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
