"""A student and the LM it was built on: load both, and say what of them does not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ldistill.common.errors import refuse
from ldistill.common.locate import resolve
from ldistill.models.fit import borrow_rope, check_pair
from ldistill.models.formats import export_like, format_of, load_processor, load_student
from ldistill.models.lora import weight_updates
from ldistill.models.processor import Processor
from ldistill.models.student import Student
from ldistill.models.weights import load_lm

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass
class Pair:
    """A student with its processor and, where the recipe distils, its teacher's LM."""

    student: Student
    processor: Processor
    lm: PreTrainedModel | None
    student_folder: Path
    teacher_folder: Path | None

    def export(self, trained: Mapping[str, Tensor], folder: Path) -> None:
        """Write the student, in the format it came in, with trained parameters in it: those of
        :func:`ldistill.models.weights.gather_trained`."""
        export_like(self.student_folder, weight_updates(self.student, trained), folder)


def load_pair(
    student: str,
    teacher: str | None,
    *,
    tokenizer: str | None = None,
    zero_init: dict[str, Any] | None = None,
    partition: bool = False,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    teacher_rope: str = "lm",
    **image_settings: Any,
) -> Pair:
    """Load a pair from folders or hub ids and check that its decoders fit.

    Args:
        student: checkpoint of a family that `ldistill models` lists.
        teacher: the LM it was built on; None loads none (a run on labels alone).
        tokenizer: tokenizer to use; default the student's own.
        zero_init: DeepSpeed configuration that partitions the LM while it loads.
        partition: let a living ZeRO-3 configuration partition the student while it loads.
        dtype: of the student's weights in memory.
        max_length: longest row: a sliding window that none outgrows may differ.
        teacher_rope: ``student`` rotates the teacher's queries at the student's base.
        image_settings: ``tiling``: cut large pictures into tiles.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        ValueError: an unsupported model, decoders or tokenizers that differ (every differing field
            is named), or a checkpoint with missing or unknown keys.
    """
    student_folder = resolve(student)
    format_of(student_folder)  # what cannot train is refused before its LM is fetched
    teacher_folder = resolve(teacher) if teacher is not None else None
    config = _lm_config(teacher_folder) if teacher_folder else None
    processor = load_processor(student_folder, tokenizer, **image_settings)
    model = load_student(student_folder, partition=partition, dtype=dtype)
    if teacher_folder is None:
        return Pair(model, processor, None, student_folder, None)
    decoder = model.backbone.config
    check_pair(decoder, config, model.base_vocab_size, max_length, teacher_rope)
    if teacher_rope == "student" and (changed := borrow_rope(decoder, config)):
        logger.warning("teacher_rope student: the teacher's rotary base is %s.", changed)
    window = getattr(config, "sliding_window", None)
    if model.sees == "prefix" and window and max_length and window < max_length:
        raise ValueError(
            f"this student reads a prompt both ways, beyond its window of {window} tokens as well, "
            f"where its LM does not see: give --max_length {window} or less."
        )
    check_tokenizers(
        processor.tokenizer, teacher_folder, min(config.vocab_size, decoder.vocab_size)
    )
    lm = load_lm(teacher_folder, zero_init, config)
    return Pair(model, processor, lm, student_folder, teacher_folder)


def _lm_config(folder: Path) -> PretrainedConfig:
    found = (folder / "config.json").is_file()
    values = PretrainedConfig.get_config_dict(folder)[0] if found else {}
    kind = values.get("model_type")
    problems = {
        "holds no config.json": not found,
        f"is a {kind!r} model, which sees": "vision_config" in values,
        "has no model_type in its config.json": not kind,
    }
    advice = "the teacher is the language model the student was built on, in transformers' format"
    begin, end = f"teacher {str(folder)!r} ", f": {advice} (are --student and --teacher swapped?)."
    refuse({f"{begin}{problem}{end}": holds for problem, holds in problems.items()})
    return AutoConfig.from_pretrained(folder)


def check_tokenizers(tokenizer: Tokenizer, teacher_folder: Path, teacher_vocab: int) -> None:
    """Refuse a teacher whose tokenizer gives other meanings to the ids below ``teacher_vocab``.

    Special tokens may have other names (a chat model renames what its base reserved); ordinary
    ones must agree, id by id. A teacher folder without tokenizer files cannot be checked: a
    warning says so. Raises ValueError with the number of ids that differ and the first of them.
    """
    if not any((teacher_folder / name).is_file() for name in _TOKENIZER_FILES):
        logger.warning("%s holds no tokenizer: not compared with the student's.", teacher_folder)
        return
    (mine, special), (other, theirs) = _tokens(tokenizer), _teacher_tokens(teacher_folder)
    special |= theirs
    shared = [i for i in range(teacher_vocab) if (i in mine or i in other) and i not in special]
    differing = [i for i in shared if mine.get(i) != other.get(i)]
    if differing:
        shown = "; ".join(
            f"id {i}: student {mine.get(i)!r}, teacher {other.get(i)!r}" for i in differing[:3]
        )
        raise ValueError(
            f"student and teacher have different tokenizers: {len(differing)} of {len(shared)} ids "
            f"below {teacher_vocab} differ ({shown}). The teacher must be the LM the student was "
            "built on; a --tokenizer, if given, must be the student's own."
        )


def _tokens(tokenizer: Tokenizer) -> tuple[dict[int, str], set[int]]:
    """Tokens by id, and the ids of special and added ones."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return {index: token for token, index in tokenizer.get_vocab().items()}, special


def _teacher_tokens(folder: Path) -> tuple[dict[int, str], set[int]]:
    """As :func:`_tokens`; a SentencePiece file alone (Vicuna's) is read as it is.

    transformers would convert it, for which sentencepiece's protobuf classes must fit the installed
    protobuf: they often do not.
    """
    file = folder / "tokenizer.model"
    try:
        if not file.is_file() or (folder / "tokenizer.json").is_file():
            return _tokens(AutoTokenizer.from_pretrained(folder))
        model = SentencePieceProcessor(model_file=str(file))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"the tokenizer of teacher {str(folder)!r} cannot be read ({error}): copy it again."
        ) from error
    ids = range(model.get_piece_size())
    special = {i for i in ids if model.is_control(i) or model.is_unknown(i)}
    return {i: model.id_to_piece(i) for i in ids}, special
