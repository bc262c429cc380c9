"""The table of families, from the zoo that they are checked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ldistill.common.errors import did_you_mean
from ldistill.models.zoo import FAMILIES, Family
from ldistill.tools.table import Table

REFUSED = {
    "Qwen3.5, Qwen3-Next": "linear attention: a state carries positions on, there are no keys",
    "LFM2-VL": "short convolutions mix positions beside the attention",
    "Llama 3.2 Vision (Mllama)": "pictures come in through cross-attention that its LM lacks",
    "Llama 4": "attends in chunks and scales queries by their place in the whole sequence",
    "Gemma 3n, Gemma 4 with per-layer inputs": "layers read other layers' keys or the token ids",
    "rotary types `dynamic`, `longrope` in rows longer than the LM's own": (
        "frequencies are chosen by the length of a batch"
    ),
}
"""Kinds of students that do not fit, and why."""


def asked_for(names: Sequence[str] | None) -> list[str]:
    """Families by name; all of them without.

    Raises:
        ValueError: no such family.
    """
    for name in names or ():
        if name not in FAMILIES:
            raise ValueError(
                f"no family {name!r}.{did_you_mean(name, FAMILIES)} `ldistill models` lists them."
            )
    return list(names or FAMILIES)


def families_table(families: Mapping[str, Family]) -> Table:
    """A line a family: its classes, what is chosen for it, and what is checked."""
    rows = [
        (
            name,
            family.called,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family.kind, "nanoVLM's own"),
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.lm],
            "full, prompt" if family.kind == "paligemma" else "all",
            _needs(family),
        )
        for name, family in families.items()
    ]
    columns = ("name", "family", "student", "LM", "kv_scope", "needs")
    return Table("", columns, rows, left=range(len(columns)))


def _needs(family: Family) -> str:
    """What is particular about its attention, for those who choose a backend."""
    capped = family.lm == "gemma2"
    found = {
        "windows": "sliding_window" in family.text and family.text["sliding_window"],
        "soft cap": capped,
        "sinks": family.lm == "gpt_oss",
        "pictures both ways": family.kind in ("gemma3", "paligemma"),
        "narrow values": family.lm == "deepseek_v3",
        "logit scale": family.lm in ("granite", "cohere2"),
    }
    return ", ".join(name for name, here in found.items() if here)


def refused_table() -> Table:
    """What does not fit, and why."""
    return Table("", ("does not fit", "because"), list(REFUSED.items()), left=(0, 1))
