"""Reading weights: every one from the checkpoint's folder, or an error that says what to do.

transformers itself fills what a checkpoint lacks with random values, warns and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: copy or download it again.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:  # no subclass of a useful one
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again.") from error


def read_model(
    auto: Any, folder: Path, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A model by one of transformers' auto classes, to be used once its problems are refused.

    Args:
        auto: such as ``AutoModelForCausalLM``.
        folder: with ``config.json`` and weights.
        options: of ``from_pretrained``.

    Returns:
        The model; a line for each weight that the folder does not give it; names of tensors in
        the folder that it has no place for.

    Raises:
        ValueError: files that cannot be read, or that transformers itself refuses.
    """
    # What does not fit is reported by our own sentences: transformers' name no tensor.
    ours = {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "local_files_only": True,
    }
    try:
        model, info = auto.from_pretrained(folder, **ours, **options)
    except (RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise ValueError(
            f"the weights in {folder} cannot be loaded: they are damaged, or not those of its "
            f"config.json ({error}). Copy or download them again."
        ) from error
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"shape of {name}: {list(got)} in the file, {list(want)} by the configuration"
        for name, got, want in sorted(info["mismatched_keys"])
    ]
    return model, problems, sorted(info["unexpected_keys"])


def refuse_misfit(folder: Path, problems: Sequence[str]) -> None:
    """Raise ValueError with all problems of a checkpoint, if there are any."""
    if problems:
        raise ValueError(
            f"{folder} does not fit its own config.json ({len(problems)} problems):\n  "
            + "\n  ".join(problems)
        )
