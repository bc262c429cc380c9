"""Attention of one model's queries over another model's keys and values, read where they lie."""

from ldistill_kernels.shared_kv_attention.api import shared_kv_attention

__all__ = ["shared_kv_attention"]
