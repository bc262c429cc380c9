"""Which of transformers' loaders partition a model's weights over the ranks while they load it.

While the configuration of a ZeRO-3 run is alive, every ``from_pretrained`` and ``from_config`` is
partitioned: right for a large student, wrong for whatever one rank loads alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def partitioned_by(config: dict[str, Any] | None) -> Iterator[None]:
    """Partition what is loaded within by a DeepSpeed configuration, or (None) keep it whole."""
    from transformers.integrations import deepspeed as integration

    outer = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    kept = integration.HfDeepSpeedConfig(config) if config is not None else None
    try:
        yield
    finally:
        del kept
        integration._hf_deepspeed_config_weak_ref = outer


@contextmanager
def partitioned_by_the_run() -> Iterator[None]:
    """Partition what is loaded within as the run's own configuration says (whole below stage 3)."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        import deepspeed

        # Partitioning counts the ranks by DeepSpeed's own communication, which starts later else.
        deepspeed.init_distributed()
    yield
