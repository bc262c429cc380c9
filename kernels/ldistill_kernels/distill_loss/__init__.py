"""Head projection, cross-entropy and distillation divergence in one operation."""

from ldistill_kernels.distill_loss.api import DistillLoss, distill_loss

__all__ = ["DistillLoss", "distill_loss"]
