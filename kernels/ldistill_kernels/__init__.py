"""GPU kernels of LinguDistill, each with a plain PyTorch reference that runs anywhere.

    from ldistill_kernels import distill_loss, shared_kv_attention

One operation is one folder: `api.py` (checks, dispatch), `reference.py` (plain PyTorch) and the
Triton files. Triton is imported when a kernel first runs, so this package imports without it.
"""

from ldistill_kernels.distill_loss import DistillLoss, distill_loss
from ldistill_kernels.shared_kv_attention import plan_tiles, shared_kv_attention

__all__ = ["DistillLoss", "distill_loss", "plan_tiles", "shared_kv_attention"]
