"""What a training step costs: labels alone, naive distillation, ours. Random weights, one process.

    ldistill bench step --pair nanovlm-460m --csv step.csv

A step is planning, forward, backward and AdamW on one packed batch of the paper's mix, the same for
all modes. Modes take turns, so that a drifting machine slows all of them; ratios are medians over
the rounds. A GPU's step is timed by the wall, a CPU's by the time its threads computed. Peak memory
is measured apart, each mode alone: on a GPU what the allocator held, on a CPU what a fresh process
grew by, libraries not counted.

Weights, gradients and optimizer states all have ``dtype``: a run with fp32 master weights holds
more in every mode, and the ratios only shrink.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ldistill.distill.distiller import Distiller
from ldistill.distill.naive import naive_counts, naive_loss
from ldistill.distill.objective import Objective
from ldistill.distill.teacher import Teacher
from ldistill.models.flops import count_step, peak_flops, seconds, step_flops, synchronise
from ldistill.models.named_pairs import student_config
from ldistill.models.pair import freeze_vision
from ldistill.models.shapes import pair_shape
from ldistill.tools.bench.batch import mix_weights, paper_batch
from ldistill.tools.bench.models import batch_shape, random_lm, random_student
from ldistill.tools.bench.options import COMPILED, DTYPES, StepOptions
from ldistill.tools.bench.profile import profile_step
from ldistill.tools.bench.report import StepResult
from ldistill.training.optimizer import parameter_groups


class StepBench:
    """Models, optimizer and batch of a measurement; ``step(mode)`` is one training step.

    Args:
        options: what to measure.
        modes: the teacher is only made where a mode wants it.
    """

    def __init__(self, options: StepOptions, modes: tuple[str, ...] | None = None) -> None:
        modes = modes or options.modes
        torch.manual_seed(0)
        self.options, self.device = options, torch.device(options.device)
        dtype, config = DTYPES[options.dtype], student_config(options.pair)
        self.shape = pair_shape(options.pair)
        student = random_student(config, self.device, dtype)
        freeze_vision(student)
        weights = mix_weights(options.mix, options.alpha, options.temperature)
        teacher = None
        if set(modes) - {"ce"}:
            teacher = Teacher(random_lm(config, self.device, dtype), options.kernels)
        self.labels_only = mix_weights(options.mix, 0.0, 1.0)
        self.weights = weights
        self.distiller = Distiller(
            student,
            teacher,
            weights if teacher else self.labels_only,
            Objective(kernels=options.kernels),
            attention=options.attention,
        )
        if options.checkpointing:
            self.distiller.activation_checkpointing_enable()
        self.compiled: dict[nn.Module, Any] = {}
        if options.compile:
            self.distiller.compile_blocks()
            layers = student.backbone.layers
            self.compiled = {layer: layer._compiled_call_impl for layer in layers}
        groups = parameter_groups(student, 1e-4, 1e-4, 0.0)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.host_batch = paper_batch(batch_shape(config), options.rows, options.length)
        self.move_batch()

    def move_batch(self) -> None:
        """The batch on the device."""
        self.batch = {name: value.to(self.device) for name, value in self.host_batch.items()}

    def plan(self, mode: str) -> Any:
        """Rows of the batch, on the host: labels alone know no teacher rows."""
        labels_only = mode.startswith("ce")
        self.distiller.weights = self.labels_only if labels_only else self.weights
        return self.distiller.plan(self.host_batch)

    def loss(self, mode: str) -> Tensor:
        """Forward of one mode; the same scalar for ``naive`` and ``ours``."""
        for layer, compiled in self.compiled.items():
            # torch has no public way back; setting a stance would undo flex_attention's own compile
            layer._compiled_call_impl = compiled if COMPILED in mode else None
        plan = self.plan(mode)
        rows, plan = len(plan.supervised), plan.to(self.device)
        if mode == "naive":
            return naive_loss(self.distiller, self.batch, plan, rows)
        return self.distiller(self.batch, plan, rows, mode.startswith("ours"))["loss"]

    def step(self, mode: str) -> None:
        """Forward, backward, AdamW."""
        self.loss(mode).backward()
        self.update()

    def update(self) -> None:
        """AdamW on the gradients there are."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed_step(self, mode: str) -> float:
        """Seconds of a step, by :func:`seconds`."""
        synchronise(self.device)
        start = seconds(self.device)
        self.step(mode)
        synchronise(self.device)
        return seconds(self.device) - start

    def flops(self, mode: str) -> float:
        """FLOPs of a step as this mode runs it; recomputed activations are not counted."""
        counts, shape = count_step(self.host_batch, self.plan(mode)), self.shape
        naive = mode == "naive"
        return step_flops(
            shape.decoder,
            naive_counts(counts) if naive else counts,
            vision_flops_per_tile=shape.vision_flops,
            projector_weights=shape.projector_weights,
            tokens_per_tile=shape.image_tokens,
            # The stock LM runs its k and v projections, which scope `full` leaves out.
            kv_scope="visual" if naive else "full",
        )

    def materialise_optimizer(self) -> None:
        """Make AdamW's states, so that the first step already peaks where all others do."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure_step(
    options: StepOptions, say: Callable[[str], None] = lambda text: None
) -> list[StepResult]:
    """Time and memory of every mode.

    Args:
        options: of :meth:`StepOptions.resolve`.
        say: is told what goes on.

    Raises:
        ValueError: a mode needs more memory than this machine has.
    """
    if options.attention == "auto":
        with _within_memory("choosing the attention"):
            options = dataclasses.replace(options, attention=fastest_attention(options, say))
    memory = {}
    if options.memory:
        for mode in options.modes:
            say(f"memory of {mode} ...")
            with _within_memory(f"the step of {mode}"):
                memory[mode] = peak_memory(options, mode)
    with _within_memory("timing all modes in one process"):
        bench = StepBench(options)
        rate, source = peak_flops(bench.device, DTYPES[options.dtype])
        say(f"MFU is counted against {rate / 1e12:.3g} TFLOP/s ({source}).")
        rounds = _timed_rounds(bench, say)
        return [_result(bench, mode, rounds, memory, rate) for mode in options.timed_modes]


@contextmanager
def _within_memory(what: str) -> Iterator[None]:
    """Say in a sentence that something does not fit, instead of PyTorch's page.

    Raises:
        ValueError: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, BrokenProcessPool) as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        reason = "out of memory" if gpu else "killed, probably for memory"
        raise ValueError(
            f"{what}: {reason}; try fewer --rows, --dtype bf16, --checkpointing or fewer --modes."
        ) from error


def fastest_attention(options: StepOptions, say: Callable[[str], None]) -> str:
    """The backend with the shortest forward and backward of the student on this very batch."""
    candidates = available_attention(options.device, DTYPES[options.dtype])
    if len(candidates) == 1:
        say(f"attention: {candidates[0]} (nothing else runs here).")
        return candidates[0]
    bench = StepBench(dataclasses.replace(options, attention=candidates[0]), ("ce",))
    times = {}
    for backend in candidates:
        bench.distiller.use_attention(backend)
        bench.loss("ce").backward()  # flex_attention compiles here
        times[backend] = min(bench.timed_step("ce") for _ in range(3))
    best = min(times, key=times.__getitem__)
    shown = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items())
    say(f"attention: {best}, the fastest of {shown} a step.")
    del bench
    _free(options.device)
    return best


def available_attention(device: str, dtype: torch.dtype) -> list[str]:
    """Backends that can train the packed student here; ``eager`` never wins and is left out."""
    from transformers.utils import is_flash_attn_2_available

    found = ["sdpa"]
    if device == "cuda":
        found.append("flex_attention")
        if is_flash_attn_2_available() and dtype != torch.float32:
            found.append("flash_attention_2")
    return found


def _timed_rounds(bench: StepBench, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Seconds of every mode, round by round; the order turns, so that no mode always goes first."""
    modes, options = bench.options.timed_modes, bench.options
    rounds = []
    for number in range(options.warmup + options.steps):
        turn = number % len(modes)
        times = {mode: bench.timed_step(mode) for mode in modes[turn:] + modes[:turn]}
        kind = "warm-up" if number < options.warmup else "round"
        shown = ", ".join(f"{mode} {times[mode] * 1e3:.0f} ms" for mode in modes)
        if sum(times.values()) > 2:
            say(f"{kind}: {shown}")
        if number >= options.warmup:
            rounds.append(times)
    return rounds


def _result(
    bench: StepBench,
    mode: str,
    rounds: list[dict[str, float]],
    memory: dict[str, float],
    rate: float,
) -> StepResult:
    times = [times[mode] for times in rounds]
    middle = statistics.median(times)
    plain = mode.removesuffix(COMPILED)
    # compiled is held against compiled
    base_mode = "ce" + mode.removeprefix(plain)
    versus = [t[mode] / t[base_mode] for t in rounds if base_mode in t]
    gain = [t[plain] / t[mode] for t in rounds if plain != mode]
    teacher = _weights_mib(bench.distiller.teacher.lm) if plain != "ce" else 0.0
    peak, base = memory.get(mode), memory.get("ce")
    plan = bench.plan(mode)
    return StepResult(
        mode=mode,
        ms=middle * 1e3,
        ms_min=min(times) * 1e3,
        ms_max=max(times) * 1e3,
        tokens_per_s=int(bench.host_batch["doc_length"].sum()) / middle,
        mfu=bench.flops(mode) / middle / rate,
        time_vs_ce=statistics.median(versus) if versus else None,
        peak_memory_mib=peak,
        memory_vs_ce=peak / base if peak and base else None,
        memory_less_teacher_vs_ce=(peak - teacher) / base if peak and base else None,
        teacher_mib=teacher,
        supervised_rows=len(plan.supervised),
        teacher_rows=bench.options.rows * bench.options.length
        if mode == "naive"
        else len(plan.teacher),
        compile_gain=statistics.median(gain) if gain else None,
        parts=profile_step(bench, mode, lambda: _settled_seconds(bench.device)),
        options=bench.options,
    )


def _settled_seconds(device: torch.device) -> float:
    synchronise(device)
    return seconds(device)


def _weights_mib(lm: LlamaForCausalLM) -> float:
    return sum(p.numel() * p.element_size() for p in lm.parameters()) / 2**20


# ---- memory ----


def peak_memory(options: StepOptions, mode: str) -> float:
    """MiB at the peak of a step of one mode alone."""
    if options.device == "cuda":
        return _peak_on_gpu(options, mode)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_growth_of_process, options, mode).result()


def _peak_on_gpu(options: StepOptions, mode: str) -> float:
    bench = StepBench(options, (mode,))
    bench.step(mode)
    torch.cuda.reset_peak_memory_stats(bench.device)
    bench.step(mode)
    synchronise(bench.device)
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**20
    del bench
    _free(options.device)
    return peak


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _growth_of_process(options: StepOptions, mode: str) -> float:
    """Runs in a process of its own, because a resident set's peak never goes down."""
    before = _status_mib("VmRSS")
    bench = StepBench(options, (mode,))
    bench.materialise_optimizer()
    bench.step(mode)
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    """A memory field of this process as Linux tells it."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
