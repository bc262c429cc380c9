"""What `ldistill bench step` measures: a pair's shapes and the settings of its recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldistill.distill.attention import BACKENDS
from ldistill.models.named_pairs import RECIPES
from ldistill.recipe import load_recipe
from ldistill.tools.bench.batch import MIXES

MODES = ("ce", "naive", "ours")
COMPILED = " compiled"  # what the name of a mode with compiled decoder blocks ends in
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepOptions:
    """A resolved measurement; :meth:`resolve` fills the defaults in."""

    pair: str
    rows: int
    length: int
    alpha: float
    temperature: float
    steps: int
    warmup: int
    device: str
    dtype: str
    kernels: str
    attention: str
    mix: str
    modes: tuple[str, ...]
    memory: bool
    compile: bool = False
    checkpointing: bool = False

    @property
    def timed_modes(self) -> tuple[str, ...]:
        """Modes, and those of them that are timed with compiled decoder blocks, too."""
        if not self.compile:
            return self.modes
        return self.modes + tuple(mode + COMPILED for mode in self.modes if mode != "naive")

    @classmethod
    def resolve(
        cls,
        *,
        pair: str = "tiny",
        rows: int | None = None,
        length: int | None = None,
        steps: int = 10,
        warmup: int = 2,
        device: str | None = None,
        dtype: str | None = None,
        kernels: str = "auto",
        attention: str = "sdpa",
        mix: str = "paper",
        modes: tuple[str, ...] = MODES,
        memory: bool = True,
        compile: bool = False,
        checkpointing: bool = False,
    ) -> StepOptions:
        """Defaults from the pair's recipe and from this machine.

        Raises:
            ValueError: unknown pair, dtype, mix, mode, attention or device.
        """
        _check_choices(pair, dtype, mix, modes, rows, attention)
        device = _check_device(device)
        if device == "cpu" and attention == "flex_attention":
            raise ValueError("PyTorch has no backward for flex_attention on a CPU: choose sdpa.")
        # row length, rows, α and τ are those of the pair's recipe
        recipe = load_recipe(RECIPES[pair])
        if rows is None:
            small = device == "cuda" or pair == "tiny"
            rows = recipe["per_device_train_batch_size"] if small else 1
        return cls(
            pair=pair,
            rows=rows,
            length=length or recipe["max_length"],
            alpha=recipe["alpha"],
            temperature=recipe["temperature"],
            steps=steps,
            warmup=warmup,
            device=device,
            dtype=dtype or ("bf16" if device == "cuda" else "fp32"),
            kernels=kernels,
            attention=attention,
            mix=mix,
            modes=tuple(mode for mode in MODES if mode in modes),
            memory=memory,
            compile=compile,
            checkpointing=checkpointing,
        )


def _check_choices(
    pair: str,
    dtype: str | None,
    mix: str,
    modes: tuple[str, ...],
    rows: int | None,
    attention: str,
) -> None:
    for name, value, known in (
        ("pair", pair, RECIPES),
        ("dtype", dtype or "fp32", DTYPES),
        ("mix", mix, MIXES),
        ("attention", attention, BACKENDS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"modes must be among {', '.join(MODES)}, got {unknown[0]!r}.")
    if not modes:
        raise ValueError(f"no mode to measure: give some of {', '.join(MODES)}.")
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}.")


def _check_device(device: str | None) -> str:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU: see `ldistill doctor`.")
    return device
