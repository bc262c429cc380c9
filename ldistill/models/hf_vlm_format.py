"""Checkpoints of transformers' VLMs: read by transformers, written back file by file.

An export is a copy of the folder in which only trained tensors differ: same safetensors files and
index, same keys and dtypes, configuration, tokenizer and templates byte for byte. Tensors go
through one at a time, so that a 13B export needs the memory of one shard.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
    revert_weight_conversion,
)

from ldistill.common.locate import resolve
from ldistill.common.partition import partitioned_by, partitioned_by_the_run
from ldistill.models.hf_vlm import HFVLM
from ldistill.models.hf_vlm_processor import load_processor
from ldistill.models.lora import LowRank, updated
from ldistill.models.weights import open_weights, read_model, refuse_misfit, weight_files

logger = logging.getLogger(__name__)

BLANK = (64, 64)  # pixels of the picture that stands for none
PREFIX = "vlm."  # of our parameter names before transformers'


def load_hf_vlm(
    name: str | Path, *, partition: bool = False, dtype: torch.dtype = torch.float32
) -> HFVLM:
    """As :func:`ldistill.models.formats.load_student`."""
    folder = resolve(name)
    for name in weight_files(folder):
        with open_weights(folder / name):  # there and whole, before any of them is read
            pass
    with partitioned_by_the_run() if partition else partitioned_by(None):
        vlm, problems, unused = read_model(AutoModelForImageTextToText, folder, dtype=dtype)
    model = HFVLM(vlm, load_processor(folder).pictures([Image.new("RGB", BLANK)]))
    refuse_misfit(folder, problems)
    if unused:
        kept = ", ".join(unused[:5])
        logger.warning("%s: tensors kept on export but not used: %s", folder, kept)
    return model


def export_like(base: Path, updates: Mapping[str, Tensor | LowRank], folder: Path) -> None:
    """As :func:`ldistill.models.formats.export_like`, file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weight_files(base)
    for path in base.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            shutil.copyfile(path, folder / path.name)
    names = DiskNames(base)
    for name in weights:
        with safe_open(base / name, framework="pt") as file:
            tensors = {
                key: updated(file.get_tensor(key), names.update_of(key, updates))
                for key in file.keys()  # noqa: SIM118
            }
            metadata = dict(file.metadata() or {})
        whole = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        save_file(whole, folder / name, metadata=metadata or None)


class DiskNames:
    """What a checkpoint's tensors are called in memory: transformers renames old names as it loads,
    and fuses some (experts of a layer into one tensor)."""

    def __init__(self, folder: Path) -> None:
        with torch.device("meta"), partitioned_by(None):
            self._model = AutoModelForImageTextToText.from_config(
                AutoConfig.from_pretrained(folder)
            )
        conversions = get_model_conversion_mapping(self._model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._fusions = [c for c in conversions if isinstance(c, WeightConverter)]
        self._state = self._model.state_dict()
        self._model._weight_conversions = self._fusions or None  # of which to take fused ones apart

    def parameter(self, key: str) -> tuple[str, bool]:
        """Our name of a tensor on disk, and whether it is only a part of that."""
        prefix = self._model.base_model_prefix
        name, fusion = rename_source_key(key, self._renamings, self._fusions, prefix, self._state)
        return PREFIX + name, fusion is not None

    def update_of(
        self, key: str, updates: Mapping[str, Tensor | LowRank]
    ) -> Tensor | LowRank | None:
        """What training made of a tensor on disk; None: nothing."""
        name, part = self.parameter(key)
        update = updates.get(name)
        if update is None or not part:
            return update
        parts = revert_weight_conversion(self._model, {name.removeprefix(PREFIX): update})
        return parts[apply_renamings(key, self._renamings)]
