"""Attention of one model's queries over another model's keys and values, read where they lie."""

from ldistill_kernels.shared_kv_attention.api import shared_kv_attention
from ldistill_kernels.shared_kv_attention.tiles import plan_tiles

__all__ = ["plan_tiles", "shared_kv_attention"]
