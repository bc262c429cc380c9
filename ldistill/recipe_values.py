"""What a recipe and a DeepSpeed file say, held against what their fields can be.

Texts are left to the command line's parser, which reads ``1e-4`` as a number and names what it
cannot read.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

LISTS = ("sources", "distil")
"""Fields that a YAML list may say as well: names, which the command line has between commas."""
_KINDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list[str]: "a list of texts",
}


def settle_values(values: dict[str, Any], groups: tuple[type, ...], recipe: str) -> dict[str, Any]:
    """The values of a recipe in the types of the dataclasses' fields.

    Raises:
        ValueError: empty, or of another type; the field is named.
    """
    settled = dict(values)
    for hints in map(get_type_hints, groups):
        for name in hints.keys() & values.keys():
            try:
                settled[name] = _settled(name, values[name], hints[name])
            except ValueError as error:
                raise ValueError(f"recipe {recipe!r}: {error}") from None
    return settled


def _settled(name: str, value: Any, hint: Any) -> Any:
    kinds = (hint,) if hint in _KINDS else get_args(hint)
    [kind] = [k for k in kinds if k is not NoneType]
    if value is None:
        if NoneType in kinds:
            return None
        raise ValueError(f"{name} is empty: give it {_KINDS[kind]}, or leave it out.")
    texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
    if kind == list[str] and isinstance(value, str):
        return [value]
    if name in LISTS and texts:
        return ",".join(value)
    fits = texts if kind == list[str] else isinstance(value, (kind, str))
    if kind is float:
        fits |= isinstance(value, int)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {value!r}.")
    return value


def check_deepspeed(config: str | dict[str, Any] | None) -> None:
    """Refuse a DeepSpeed configuration that cannot be read or would replace this program's rates.

    Raises:
        ValueError: no JSON, or with sections of its own for optimizer and schedule.
    """
    where = "of the recipe"
    if isinstance(config, str):
        if config.startswith("{"):  # written out, as transformers takes it too
            where, config = "on the command line", _parsed("on the command line", config)
        elif Path(config).is_file():
            where, config = config, _parsed(config, Path(config).read_text(encoding="utf-8"))
        else:
            return  # transformers says so
    own = [name for name in ("optimizer", "scheduler") if name in (config or {})]
    if own:
        raise ValueError(
            f"the DeepSpeed configuration {where} has its own {' and '.join(own)}, which would "
            "train projector and decoder at one rate: take it out, and say the same with --optim, "
            "--projector_lr, --decoder_lr and --lr_scheduler_type."
        )


def _parsed(where: str, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"the DeepSpeed configuration {where} is not valid JSON: {error}."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"the DeepSpeed configuration {where} must be a JSON object.")
    return config
