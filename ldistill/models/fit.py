"""Can a teacher read a student's keys? Decoders, windows, vocabularies, tokenizers are compared.

Everything here is told from configurations and tokenizers, before any weight is read on a GPU.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Decoders whose attention hands rotated keys to transformers' attention interface, and whose query
# is q_proj (with its bias, if it has one) and one rotation: what the teacher computes.
DECODERS = ("llama", "mistral", "qwen2")
# Rotary embeddings whose frequencies transformers chooses anew by the longest position of a batch.
_ROPE_BY_LENGTH = ("dynamic", "longrope")

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
    _check_kind("student's decoder", student, max_length)
    _check_kind("teacher", teacher, max_length)
    rows = [(name, get(student), get(teacher)) for name, get in _FIELDS.items()]
    differing = [f"{name}: student {s}, teacher {t}" for name, s, t in rows if s != t]
    if base_vocab is not None and base_vocab != teacher.vocab_size:
        differing.append(f"base vocabulary: student {base_vocab}, teacher {teacher.vocab_size}")
    if base_vocab is None and teacher.vocab_size > student.vocab_size:
        differing.append(
            f"vocabulary: student {student.vocab_size}, teacher {teacher.vocab_size} (must be no "
            "larger than the student's)"
        )
    if differing:
        raise ValueError(
            "student and teacher do not fit; the teacher must be the very LM the student was "
            "built on:\n  " + "\n  ".join(differing)
        )


def _check_kind(who: str, config: PretrainedConfig, max_length: int | None) -> None:
    if "mrope_section" in _rope(config):
        raise ValueError(
            f"the {who} rotates along several axes (mrope_section {_rope(config)['mrope_section']}"
            "): a query with one position cannot read its keys. Use a pair with one-axis RoPE."
        )
    kind = _rope(config).get("rope_type")
    if kind in _ROPE_BY_LENGTH:
        raise ValueError(
            f"the {who} chooses its rotary frequencies by the length of a batch (rope_type "
            f"{kind!r}): the teacher, which runs on a part of the rows, would query the student's "
            "keys with other frequencies than they were rotated with. Use a pair with fixed ones."
        )
    if config.model_type not in DECODERS:
        raise ValueError(
            f"the {who} is a {config.model_type!r} model; supported decoders are of the Llama kind "
            f"({', '.join(DECODERS)}): their keys are rotated once and read by q_proj alone."
        )
    window = getattr(config, "sliding_window", None)
    longest = max_length or config.max_position_embeddings
    if window is not None and window < longest:
        raise ValueError(
            f"the {who} attends through a sliding window of {window} tokens, but rows have up to "
            f"{longest}: the teacher reads the whole memory of a document, which its window would "
            f"hide. Use --max_length {window} or less, or a decoder without sliding_window."
        )


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
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((teacher_folder / name).is_file() for name in files):
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
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return _sentencepiece_tokens(folder / "tokenizer.model")
    try:
        return _ordinary(AutoTokenizer.from_pretrained(folder))
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"the tokenizer of teacher {str(folder)!r} cannot be loaded: {error}"
        ) from error


def _sentencepiece_tokens(path: Path) -> tuple[dict[int, str], set[int]]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(f"{path} needs: pip install sentencepiece.") from error
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again.") from error
    ids = range(model.get_piece_size())
    special = {i for i in ids if model.is_control(i) or model.is_unknown(i)}
    return {i: model.id_to_piece(i) for i in ids}, special
