"""Where things lie: checkpoints (a folder, ``pkg://`` package data, the hub) and what is cached.

``pkg://ldistill.tiny/pair/student`` is the folder ``pair/student`` inside the package
``ldistill.tiny``. Anything that is not a folder on disk and not ``pkg://`` is taken as a hub id.
"""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

PACKAGE_SCHEME = "pkg://"


def default_cache() -> Path:
    """`$LDISTILL_CACHE`, or `ldistill` in the user's cache folder."""
    if configured := os.environ.get("LDISTILL_CACHE"):
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldistill"


def resolve(name: str | os.PathLike[str], weights: bool = True) -> Path:
    """Folder of a checkpoint, fetched from the hub when it is a hub id.

    Without ``weights``, its configuration, tokenizer and templates alone. Raises FileNotFoundError:
    neither a folder nor something the hub (or its local cache) has.
    """
    text = str(name)
    path = Path(text).expanduser()
    if text.startswith(PACKAGE_SCHEME):
        package, _, inner = text.removeprefix(PACKAGE_SCHEME).partition("/")
        try:
            path = Path(str(importlib.resources.files(package))) / inner
        except ModuleNotFoundError as error:
            raise FileNotFoundError(f"{text!r}: no package {package!r} is installed.") from error
    if path.is_dir():
        return path
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(f"checkpoint folder {text!r} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]  # the last for its licence
    patterns += ["*.safetensors"] if weights else []
    try:
        folder = Path(snapshot_download(text, allow_patterns=patterns))
        if weights and not any(folder.glob("*.safetensors")):  # such as lmsys/vicuna-7b-v1.5
            snapshot_download(text, allow_patterns=["pytorch_model*"])
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{text!r} is neither a folder here nor a model the hub gave us "
            f"({type(error).__name__}): check the name and the network (`ldistill doctor`), log in "
            "for a gated one (`hf auth login`), or give a local folder."
        ) from error
