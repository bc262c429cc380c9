"""The student's attention backends: one result, one mask, one choice."""

from __future__ import annotations

import pytest
import torch
from pairs import random_batch, small_config, spread

from ldistill.distill.attention import attach, choose_attention
from ldistill.models.nanovlm import NanoVLM

CONFIG = small_config()
BATCH = random_batch(NanoVLM(CONFIG), [[40, 20], [64]])


def hidden(backend: str) -> torch.Tensor:
    torch.manual_seed(0)
    student = NanoVLM(CONFIG).eval()
    spread(student)
    attach(student.backbone, backend)
    with torch.no_grad():
        return student(BATCH["input_ids"], BATCH["position_ids"], BATCH["pixel_values"])


@pytest.mark.parametrize(
    "backend", ["eager", "auto", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
def test_backends_agree_on_packed_rows(backend):
    expected = hidden("sdpa")
    assert expected.std() > 0.1
    torch.testing.assert_close(hidden(backend), expected, rtol=1e-4, atol=1e-5)


def test_all_layers_share_one_mask():
    """Autograd keeps the block-diagonal mask once, not once a layer."""
    student = NanoVLM(CONFIG).train()
    attach(student.backbone, "sdpa")
    masks: set[int] = set()
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (64, 64) and tensor.ndim == 4:
            masks.add(tensor.untyped_storage().data_ptr())
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student(BATCH["input_ids"], BATCH["position_ids"], BATCH["pixel_values"])
    assert len(kept) == CONFIG.lm_n_blocks
    assert len(masks) == 1


def test_the_choice_is_flash_where_it_is_installed(monkeypatch):
    assert choose_attention("eager") == "eager"
    for there, chosen in ((True, "flash_attention_2"), (False, "sdpa")):
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda x=there: x)
        assert choose_attention("auto") == chosen
