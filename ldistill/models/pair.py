"""A student and the LM it was built on: load both, check that they fit, say what does not.

What does not fit is told from configurations and tokenizers, before any weight is on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ldistill.common.locate import resolve
from ldistill.models.formats import export_like, format_of
from ldistill.models.lora import weight_updates
from ldistill.models.processor import Processor
from ldistill.models.student import Student
from ldistill.models.weights import load_lm

logger = logging.getLogger(__name__)

# Decoders whose LM, run over the student's keys and values, gives the student's own logits: equal
# weights, equal logits (the identity that tests hold for each of them).
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")
# Rotary embeddings whose frequencies transformers chooses anew by the longest position of a batch.
_ROPE_BY_LENGTH = ("dynamic", "longrope")
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
        """Write the student with trained parameters in it, in the format it came in.

        Args:
            trained: whole tensors, of :func:`ldistill.models.weights.gather_trained`.
            folder: where to write.
        """
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
    **image_settings: Any,
) -> Pair:
    """Load a pair from folders or hub ids and check that its decoders fit.

    Args:
        student: checkpoint of a nanoVLM, LLaVA or SmolVLM (see ``ldistill.models.formats``).
        teacher: the LM it was built on; None loads none (a run on labels alone).
        tokenizer: tokenizer to use; default the student's own.
        zero_init: DeepSpeed configuration that partitions the LM while it loads.
        partition: let a living ZeRO-3 configuration partition the student while it loads.
        dtype: of the student's weights in memory.
        max_length: longest row, for decoders with a sliding window; None: all their positions.
        image_settings: ``tiling``: cut large pictures into tiles.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        ValueError: an unsupported model, decoders or tokenizers that differ (every differing field
            is named), or a checkpoint with missing or unknown keys.
    """
    student_folder = resolve(student)
    format_ = format_of(student_folder)
    teacher_folder = resolve(teacher) if teacher is not None else None
    config = _lm_config(teacher_folder) if teacher_folder else None
    processor = format_.load_processor(student_folder, tokenizer, **image_settings)
    model = format_.load(student_folder, partition=partition, dtype=dtype)
    if teacher_folder is None:
        return Pair(model, processor, None, student_folder, None)
    check_pair(model.backbone.config, config, model.base_vocab_size, max_length)
    check_tokenizers(processor.tokenizer, teacher_folder, config.vocab_size)
    lm = load_lm(teacher_folder, zero_init)
    return Pair(model, processor, lm, student_folder, teacher_folder)


def _lm_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    values = PretrainedConfig.get_config_dict(folder)[0] if path.is_file() else {}
    kind, problem = values.get("model_type"), None
    if not path.is_file():
        problem = "holds no config.json"
    elif "vision_config" in values:
        problem = f"is a {kind!r} model, which sees"
    elif not kind:
        problem = "has no model_type in its config.json"
    if problem:
        raise ValueError(
            f"teacher {str(folder)!r} {problem}: the teacher is the language model the student was "
            "built on, in transformers' format (are --student and --teacher swapped?)."
        )
    return AutoConfig.from_pretrained(folder)


# ---- can the teacher read the student's keys? ----


# What must be equal for a teacher query to read a student key: name → getter on the decoder config.
_FIELDS: dict[str, Any] = {
    "model_type": lambda c: c.model_type,
    "num_hidden_layers": lambda c: c.num_hidden_layers,
    "hidden_size": lambda c: c.hidden_size,
    "num_attention_heads": lambda c: c.num_attention_heads,
    "num_key_value_heads": lambda c: c.num_key_value_heads,
    "head_dim": lambda c: getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
    "rope_type": lambda c: _rope(c).get("rope_type", "default"),
    "rope_theta": lambda c: float(_rope(c).get("rope_theta", 0)),
    "rope scaling": lambda c: {
        k: v for k, v in _rope(c).items() if k not in ("rope_type", "rope_theta")
    },
    "rms_norm_eps": lambda c: getattr(c, "rms_norm_eps", None),
    "attention_bias": lambda c: bool(getattr(c, "attention_bias", False)),
    "layers with RoPE": lambda c: getattr(c, "no_rope_layers", None),
}


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def check_pair(
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    base_vocab: int | None,
    max_length: int | None = None,
) -> None:
    """Refuse a pair whose decoders differ in anything a shared key depends on.

    Args:
        student: the student decoder's configuration.
        teacher: the LM's configuration.
        base_vocab: vocabulary of the LM the student was built on; None where that is not known:
            then the teacher's must fit into the student's.
        max_length: longest row; None: as long as the decoder's positions go.

    Raises:
        ValueError: naming each differing field and both values, or what is not supported and why.
    """
    problems = [f"the {who} {why}" for who, why in (
        ("student's decoder", _unsupported(student, max_length)),
        ("teacher", _unsupported(teacher, max_length)),
    ) if why]  # fmt: skip
    found = [(name, get(student), get(teacher)) for name, get in _FIELDS.items()]
    problems += [f"{name}: student {s}, teacher {t}" for name, s, t in found if s != t]
    mine, its = student.vocab_size, teacher.vocab_size
    if base_vocab is not None and base_vocab != its:
        problems.append(f"base vocabulary: student {base_vocab}, teacher {its}")
    if base_vocab is None and its > mine:
        problems.append(
            f"vocabulary: student {mine}, teacher {its} (must be no larger than the student's)"
        )
    if problems:
        raise ValueError(
            "student and teacher do not fit; the teacher must be the very LM the student was "
            "built on:\n  " + "\n  ".join(problems)
        )


def _unsupported(config: PretrainedConfig, max_length: int | None) -> str | None:
    """Why keys of such a decoder cannot be shared; None: they can."""
    if (kind := _rope(config).get("rope_type")) in _ROPE_BY_LENGTH:
        return (
            f"chooses its rotary frequencies by the length of a batch (rope_type {kind!r}): the "
            "teacher, which runs on a part of the positions, would query the student's keys with "
            "other frequencies than they were rotated with. Use a pair with fixed ones."
        )
    if config.model_type not in DECODERS:
        return (
            f"is a {config.model_type!r} model; supported decoders are {', '.join(DECODERS)}: for "
            "these equal weights are known to give equal logits."
        )
    longest = max_length or config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest:
        return (
            f"attends through a sliding window of {window} tokens, but rows have up to {longest}: "
            "the teacher reads all keys and values of a document, which its window would hide. Use "
            f"--max_length {window} or less, or a decoder without sliding_window."
        )
    return None


def check_tokenizers(
    tokenizer: PreTrainedTokenizerBase, teacher_folder: Path, teacher_vocab: int
) -> None:
    """Refuse a teacher whose tokenizer gives other meanings to the ids it shares.

    Special tokens may have other names (a chat model renames what its base reserved); ordinary
    ones must agree, id by id. A teacher folder without tokenizer files cannot be checked: a
    warning says so.

    Args:
        tokenizer: the student's.
        teacher_folder: the LM's.
        teacher_vocab: ids from here on are the student's own.

    Raises:
        ValueError: with the number of ids that differ and the first of them.
    """
    if not any((teacher_folder / name).is_file() for name in _TOKENIZER_FILES):
        logger.warning("%s holds no tokenizer: not compared with the student's.", teacher_folder)
        return
    mine, special = _ordinary(tokenizer)
    other, theirs = _teacher_tokens(teacher_folder)
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


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[int, str], set[int]]:
    """Tokens by id, and the ids of special and added ones."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return {index: token for token, index in tokenizer.get_vocab().items()}, special


def _teacher_tokens(folder: Path) -> tuple[dict[int, str], set[int]]:
    """As :func:`_ordinary`; a SentencePiece file alone (Vicuna's) is read as it is.

    transformers would convert it, for which sentencepiece's protobuf classes must fit the installed
    protobuf: they often do not.
    """
    file = folder / "tokenizer.model"
    try:
        if not file.is_file() or (folder / "tokenizer.json").is_file():
            return _ordinary(AutoTokenizer.from_pretrained(folder))
        model = SentencePieceProcessor(model_file=str(file))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"the tokenizer of teacher {str(folder)!r} cannot be read ({error}): copy it again."
        ) from error
    ids = range(model.get_piece_size())
    special = {i for i in ids if model.is_control(i) or model.is_unknown(i)}
    return {i: model.id_to_piece(i) for i in ids}, special
