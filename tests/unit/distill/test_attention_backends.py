"""The student's attention backends: one result, one mask, one choice."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from pairs import random_batch, small_config, spread, weights
from torch.nn import functional as F

from ldistill.distill.attention import attach, choose_attention
from ldistill.distill.distiller import Distiller, student_inputs
from ldistill.distill.teacher import Teacher
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.pair import load_pair
from ldistill.models.parts import train_only

CONFIG = small_config()
BATCH = random_batch(NanoVLM(CONFIG), [[40, 20], [64]])


def hidden(backend: str) -> torch.Tensor:
    torch.manual_seed(0)
    student = NanoVLM(CONFIG).eval()
    spread(student)
    attach(student.backbone, backend)
    with torch.no_grad():
        return student(**student_inputs(BATCH))


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)]
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
        student(**student_inputs(BATCH))
    assert len(kept) == CONFIG.lm_n_blocks
    assert len(masks) == 1


def reference_varlen(q, k, v, starts_q, starts_k, max_q, max_k, *, scale, window_size, **grouped):
    """What `torch.nn.attention.varlen.varlen_attn` computes on a GPU, document by document."""
    assert window_size == (-1, 0)
    assert starts_q.dtype == torch.int32
    assert torch.equal(starts_q, starts_k)
    assert max_q == max_k >= starts_q.diff().max()
    assert grouped == ({"enable_gqa": True} if q.shape[1] != k.shape[1] else {})
    out = torch.empty_like(q)
    for start, end in pairwise(starts_q.tolist()):
        parts = (t[start:end].transpose(0, 1) for t in (q, k, v))  # [heads, length, head_dim]
        attended = F.scaled_dot_product_attention(
            *parts, is_causal=True, scale=scale, enable_gqa=True
        )
        out[start:end] = attended.transpose(0, 1)
    return out


def test_varlen_takes_documents_by_their_boundaries(pair_root, monkeypatch):
    """The same loss and gradients as sdpa, and the shared K/V as it read them: views."""
    read = []

    def noted(q, k, v, *args, **kwargs):
        read.append((k.data_ptr(), v.data_ptr()))
        return reference_varlen(q, k, v, *args, **kwargs)

    monkeypatch.setattr("ldistill.distill.attention.varlen_attn", noted)
    results = []
    for backend in ("sdpa", "varlen"):
        pair = load_pair(str(pair_root / "student"), str(pair_root / "teacher"))
        train_only(pair.student)
        distiller = Distiller(pair.student, Teacher(pair.lm), weights(), attention=backend)
        batch = random_batch(pair.student, [[24, 31], [40]])
        supervision = distiller.supervise(batch)
        loss = distiller(batch, supervision, 30.0, True)["loss"]
        loss.backward()
        results.append([loss, *(p.grad for p in pair.student.backbone.parameters())])
        _, shared = distiller._student(batch, True)
    assert read[-len(shared.keys) :] == [
        (k.data_ptr(), v.data_ptr()) for k, v in zip(shared.keys, shared.values)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flash", "varlen", "dtype", "chosen"),
    [
        (True, True, torch.bfloat16, "flash_attention_2"),
        (False, True, torch.float16, "varlen"),
        (False, False, torch.bfloat16, "sdpa"),
        (True, True, torch.float32, "sdpa"),
    ],
)
def test_the_choice_is_a_variable_length_kernel_where_one_runs(
    monkeypatch, flash, varlen, dtype, chosen
):
    monkeypatch.setattr("ldistill.distill.attention.is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr("ldistill.distill.attention.varlen_available", lambda: varlen)
    assert choose_attention("auto", dtype) == chosen
    assert choose_attention("eager", dtype) == "eager"


def test_a_backend_that_does_not_run_here_is_refused():
    if torch.cuda.is_available():
        pytest.skip("they may run here")
    with pytest.raises(ValueError, match="pip install flash-attn"):
        choose_attention("flash_attention_2", torch.bfloat16)
    with pytest.raises(ValueError, match="varlen, which computes in bf16"):
        choose_attention("varlen", torch.bfloat16)
