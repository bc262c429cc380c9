"""The student's attention backends: one result, one mask, one choice."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from pairs import random_batch, small_config, spread, weights
from torch.nn import functional as F

from ldistill.distill import attention
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
    ("flash", "varlen", "dtype", "device", "chosen"),
    [
        (True, True, torch.bfloat16, "cuda", "flash_attention_2"),
        (True, False, torch.bfloat16, "cuda", "sdpa"),  # a GPU that flash-attn does not know
        (False, True, torch.float16, "cuda", "varlen"),
        (False, False, torch.bfloat16, "cuda", "sdpa"),
        (True, True, torch.float32, "cuda", "sdpa"),
        (True, True, torch.bfloat16, "cpu", "sdpa"),
    ],
)
def test_the_choice_is_a_variable_length_kernel_where_one_runs(
    monkeypatch, flash, varlen, dtype, device, chosen
):
    monkeypatch.setattr("ldistill.distill.attention.is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr("ldistill.distill.attention.has_fast_bf16", lambda: varlen)
    assert choose_attention("auto", dtype, device) == chosen
    assert choose_attention("eager", dtype, device) == "eager"


def test_a_backend_that_does_not_run_here_is_refused():
    with pytest.raises(ValueError, match="pip install flash-attn"):
        choose_attention("flash_attention_2", torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="varlen, which computes in bf16"):
        choose_attention("varlen", torch.bfloat16, "cpu")


@pytest.mark.parametrize("backend", ["varlen", "flash_attention_2"])
def test_narrow_values_are_widened_for_a_kernel_of_one_width(monkeypatch, backend):
    def flash(q, k, v, mask, query_length, is_causal, softmax_scale, **kwargs):
        parts = (t.transpose(1, 2) for t in (q, k, v))
        options = {"is_causal": is_causal, "scale": softmax_scale}
        return F.scaled_dot_product_attention(*parts, **options).transpose(1, 2)

    def of_one_width(attend):
        def kernel(q, k, v, *args, **kwargs):
            assert q.shape[-1] == k.shape[-1] == v.shape[-1]
            return attend(q, k, v, *args, **kwargs)

        return kernel

    monkeypatch.setattr(attention, "varlen_attn", of_one_width(reference_varlen))
    monkeypatch.setattr(attention, "_flash_attention_forward", of_one_width(flash))
    q, k, v = torch.randn(1, 4, 9, 24), torch.randn(1, 4, 9, 24), torch.randn(1, 4, 9, 16)
    documents = {}
    if backend == "varlen":
        documents = {"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32), "max_length_q": 9}
    attend, _ = attention._ATTENTIONS[backend]
    found, _ = attend(None, q, k, v, None, scaling=0.3, **documents)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))
