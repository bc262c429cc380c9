"""Whether an LM can read a student's keys: told from two configurations, before any weight is read.

It can, exactly, where its decoder computes from the same weights what the student's computes, and
where every layer is an attention over keys and values. Decoders of one ``model_type`` are compared
field by field; those of two (Qwen2-VL's and Qwen2's) are built small as well, given the same
weights and run: the outputs must be equal.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import AutoModel, PretrainedConfig

from ldistill.common.ranks import partitioned_by
from ldistill.models.flops import head_dim

Rope = Literal["lm", "student"]
# Rotary embeddings whose frequencies transformers chooses anew for positions beyond a length.
_ROPE_BY_LENGTH = ("dynamic", "longrope")
_KEYED = ("full_attention", "sliding_attention")
# Fields of a decoder's configuration that keys and logits do not depend on, or that are compared
# apart (vocabulary, rotary positions, windows that no row outgrows).
_FREE = {
    *("model_type", "architectures", "transformers_version", "_name_or_path", "problem_type"),
    *("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id"),
    *("dtype", "torch_dtype", "tie_word_embeddings", "use_cache", "return_dict", "pretraining_tp"),
    *("initializer_range", "attention_dropout", "embd_pdrop", "resid_pdrop"),
    *("output_hidden_states", "output_attentions", "output_router_logits", "is_encoder_decoder"),
    *("router_aux_loss_coef", "router_jitter_noise", "chunk_size_feed_forward"),
    *("max_position_embeddings", "original_max_position_embeddings", "max_window_layers"),
    *("sliding_window", "use_sliding_window", "use_bidirectional_attention", "head_dim"),
    *("rope_parameters", "rope_scaling", "rope_theta", "default_theta", "partial_rotary_factor"),
}


def check_pair(
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    base_vocab: int | None,
    max_length: int | None = None,
    teacher_rope: str = "lm",
) -> None:
    """Refuse a pair whose decoders differ in anything a shared key depends on.

    Args:
        student, teacher: configurations of the student's decoder and of the LM.
        base_vocab: vocabulary of the LM the student was built on; None where that is not known.
        max_length: longest row; a sliding window that no row outgrows is none, and frequencies that
            longer rows would change are fixed.
        teacher_rope: ``student`` lets the bases of the rotary frequencies differ.

    Raises:
        ValueError: naming each differing field and both values, or what is not supported and why.
    """
    problems = [
        f"the {who} {why}"
        for who, config in (("student's decoder", student), ("teacher", teacher))
        if (why := unsupported(config, max_length))
    ]
    problems += _differences(student, teacher, max_length, teacher_rope)
    if base_vocab not in (None, teacher.vocab_size):
        problems.append(f"base vocabulary: student {base_vocab}, teacher {teacher.vocab_size}")
    kinds = student.model_type, teacher.model_type
    if not problems and kinds[0] != kinds[1] and (why := _unequal_small(student, teacher)):
        problems = [f"model_type: student {kinds[0]}, teacher {kinds[1]}; {why}"]
    if problems:
        raise ValueError(
            "student and teacher do not fit; the teacher must be the very LM the student was "
            "built on:\n  " + "\n  ".join(problems)
        )


def unsupported(config: PretrainedConfig, max_length: int | None = None) -> str | None:
    """Why keys of such a decoder cannot be shared in rows so long; None: they can."""
    for rope in _ropes(config).values():
        kind = rope.get("rope_type")
        if kind not in _ROPE_BY_LENGTH or max_length is None:
            continue
        fixed = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_length > fixed:
            return (
                f"chooses its rotary frequencies by the length of a batch (rope_type {kind!r}), of "
                f"which the teacher runs a part; up to {fixed} they are fixed: give --max_length "
                f"{fixed} or less."
            )
    kinds = [k for k in getattr(config, "layer_types", None) or () if k not in _KEYED]
    if "chunked_attention" in kinds:
        return "attends in chunks, and scales queries by their place in the whole sequence."
    if kinds:
        return (
            f"has {kinds[0]} layers: they carry positions on in a state or a convolution, so there "
            "are no keys and values that a teacher could read. Use a student whose layers attend."
        )
    if getattr(config, "cross_attention_layers", None):
        return "sees pictures through cross-attention layers, at no position whose keys are shared."
    for field in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        if getattr(config, field, None):
            return f"has {field} {getattr(config, field)}, which its LM's keys would depend on."
    return None


def _differences(
    student: PretrainedConfig, teacher: PretrainedConfig, max_length: int | None, teacher_rope: str
) -> list[str]:
    mine, its = (_comparable(config, max_length) for config in (student, teacher))
    borrowed = ("rope_theta",) if teacher_rope == "student" else ()
    return [
        f"{name}: student {value}, teacher {its[name]}"
        + (_ROPE_ADVICE if name.endswith("rope_theta") else "")
        for name, value in mine.items()
        if name in its and value != its[name] and not name.endswith(borrowed)
    ]


_ROPE_ADVICE = (
    " (where the student's was raised after it was built on this LM: --teacher_rope student "
    "rotates the teacher's queries at the student's)"
)


def _comparable(config: PretrainedConfig, max_length: int | None) -> dict[str, Any]:
    """What of a configuration keys and logits depend on, by name."""
    values = config.to_dict()
    declared = type(config)().to_dict()  # not what else a file may hold
    found = {name: values[name] for name in declared if name not in _FREE and name in values}
    window = getattr(config, "sliding_window", None)
    outgrown = window is not None and (max_length is None or window < max_length)
    found |= {"head_dim": head_dim(config), "sliding_window": window if outgrown else None}
    for kind, rope in _ropes(config).items():
        at = f"{kind} " if kind else ""
        if rope.get("rope_type") == "dynamic":  # in rows that are let pass: InternVL3 on Qwen2.5
            rope = {name: rope[name] for name in rope if name not in ("rope_type", "factor")}
        found[f"{at}rope_type"] = rope.pop("rope_type", "default")
        found[f"{at}rope_theta"] = float(rope.pop("rope_theta", 0))
        whole = ("partial_rotary_factor", 1.0)  # which some configurations say and others leave out
        found[f"{at}rope scaling"] = {k: v for k, v in rope.items() if (k, v) != whole}
    return found


def _ropes(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary parameters by kind of layer, ``""`` where all share them; without those of axes."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = {kind: r for kind, r in rope.items() if isinstance(r, Mapping)}
    return {
        kind: {k: v for k, v in r.items() if k != "type" and not k.startswith("mrope_")}
        for kind, r in (nested or {"": rope}).items()
    }


def borrow_rope(student: PretrainedConfig, teacher: PretrainedConfig) -> str:
    """Give an LM's configuration the student's rotary base; what changed, in words."""
    changed = []
    for kind, rope in _ropes(student).items():
        its = teacher.rope_parameters[kind] if kind else teacher.rope_parameters
        if (base := rope.get("rope_theta")) != its.get("rope_theta"):
            changed.append(f"{base:g} instead of its own {its.get('rope_theta'):g}")
            its["rope_theta"] = base
    return ", ".join(changed)


# ---- decoders of two kinds: equal weights, equal outputs? ----


_SIZES = {
    "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "qk_head_dim": 24,
    "v_head_dim": 16,
}  # fmt: skip


def small_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Those of `_SIZES` that decoders of this kind have, besides what all have."""
    values = config.to_dict()
    found = {name: size for name, size in _SIZES.items() if values.get(name) is not None}
    # Of DeepSeek's heads a part rotates.
    return found | ({"head_dim": 8} if "qk_rope_head_dim" in found else {})


def reduced(config: PretrainedConfig, vocab: int = 320) -> PretrainedConfig:
    """The same kind of decoder, small: what it computes stays, how much of it shrinks."""
    values = config.to_dict()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    small: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 4 if kv_heads == heads else min(kv_heads, 2), "vocab_size": vocab,
        "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    small |= small_sizes(config)
    small |= {"sliding_window": 8} if values.get("sliding_window") is not None else {}
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if kinds := values.get(name):
            first = kinds[:4] if len(set(kinds[:4])) == len(set(kinds)) else [*kinds[:3], kinds[-1]]
            small[name] = (first * 4)[:4]
    rope = copy.deepcopy(values.get("rope_parameters") or {})
    if section := rope.get("mrope_section"):
        half = int(16 * rope.get("partial_rotary_factor", 1)) // 2
        behind = [part * half // sum(section) for part in section[1:]]
        rope["mrope_section"] = [half - sum(behind), *behind]
    return type(config).from_dict(values | small | {"rope_parameters": rope})


def _unequal_small(student: PretrainedConfig, teacher: PretrainedConfig) -> str:
    """Why two decoders of different kinds are not one; empty if they are."""
    with torch.random.fork_rng(devices=[]), partitioned_by(None), torch.no_grad():
        torch.manual_seed(0)
        small = [reduced(config) for config in (student, teacher)]
        mine, its = (AutoModel.from_config(c, dtype=torch.float32).eval() for c in small)
        state, wanted = mine.state_dict(), its.state_dict()
        shapes = ({(k, v.shape) for k, v in tensors.items()} for tensors in (state, wanted))
        if other := sorted({key for key, _ in set.symmetric_difference(*shapes)}):
            return f"their tensors differ: {', '.join(other[:3])}"
        for parameter in mine.parameters():
            parameter.normal_(0, 0.12)
        its.load_state_dict(mine.state_dict())
        ids = torch.arange(3, 27)[None]
        apart = (mine(ids).last_hidden_state - its(ids).last_hidden_state).abs().max().item()
    return f"with equal weights their outputs differ by {apart:.1e}" if apart > 1e-4 else ""
