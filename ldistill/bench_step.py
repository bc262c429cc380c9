"""What a training step costs: labels alone, naive distillation, ours. Random weights, one process.

    ldistill bench step --pair nanovlm-460m --csv step.csv

A step is planning, forward, backward and AdamW on one packed batch of the paper's mix, the same for
all modes. Modes take turns, so that a drifting machine slows all of them; ratios are medians over
the rounds. Peak memory is measured apart, each mode alone: on a GPU what the allocator held, on a
CPU what a fresh process grew by, libraries not counted.

Weights, gradients and optimizer states all have ``dtype``: a run with fp32 master weights holds
more in every mode, and the ratios only shrink.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ldistill.bench_batch import mix_weights, paper_batch
from ldistill.bench_naive import naive_counts, naive_loss
from ldistill.bench_options import DTYPES, StepOptions, pair_config
from ldistill.bench_report import StepResult
from ldistill.distiller import Distiller
from ldistill.flops import count_step, peak_flops, student_flops, synchronise
from ldistill.objective import Objective
from ldistill.pair import freeze_vision, parameter_groups
from ldistill.students.nanovlm import NanoVLM, decoder_config
from ldistill.students.nanovlm_config import NanoVLMConfig
from ldistill.teacher import Teacher


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
        dtype, config = DTYPES[options.dtype], pair_config(options.pair)
        student = NanoVLM(config).to(device=self.device, dtype=dtype)
        freeze_vision(student)
        weights = mix_weights(options.mix, options.alpha, options.temperature)
        teacher = None
        if set(modes) - {"ce"}:
            teacher = Teacher(random_lm(config), options.kernels)
            teacher.place(self.device, dtype)
        self.labels_only = mix_weights(options.mix, 0.0, 1.0)
        self.weights = weights
        self.distiller = Distiller(
            student,
            teacher,
            weights if teacher else self.labels_only,
            Objective(kernels=options.kernels),
            attention=options.attention,
        )
        groups = parameter_groups(student, 1e-4, 1e-4, 0.0)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.host_batch = paper_batch(config, options.rows, options.length)
        self.batch = {name: value.to(self.device) for name, value in self.host_batch.items()}

    def plan(self, mode: str) -> Any:
        """Rows of the batch, on the host: labels alone know no teacher rows."""
        self.distiller.weights = self.labels_only if mode == "ce" else self.weights
        return self.distiller.plan(self.host_batch)

    def loss(self, mode: str) -> Tensor:
        """Forward of one mode; the same scalar for ``naive`` and ``ours``."""
        plan = self.plan(mode)
        rows, plan = len(plan.supervised), plan.to(self.device)
        if mode == "naive":
            return naive_loss(self.distiller, self.batch, plan, rows)
        return self.distiller(self.batch, plan, rows, mode == "ours")["loss"]

    def step(self, mode: str) -> None:
        """Forward, backward, AdamW."""
        self.loss(mode).backward()
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
        """FLOPs of a step as this mode runs it."""
        student, counts = self.distiller.student, count_step(self.host_batch, self.plan(mode))
        # The stock LM runs its k and v projections, which scope `full` leaves out.
        scope = "visual" if mode == "naive" else "full"
        return student_flops(student, naive_counts(counts) if mode == "naive" else counts, scope)

    def materialise_optimizer(self) -> None:
        """Make AdamW's states, so that the first step already peaks where all others do."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def seconds(device: torch.device) -> float:
    """Clock of a measurement: a GPU's is the wall; a CPU's is the time this process computed.

    Others on the same machine take turns with it, which the wall would count; the CPU time of all
    threads, divided by their number, is what the wall shows on an idle machine.
    """
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    return time.perf_counter()


def random_lm(config: NanoVLMConfig) -> LlamaForCausalLM:
    """A teacher of the student decoder's shape over the base vocabulary."""
    shape = decoder_config(config)
    shape.vocab_size = config.lm_base_vocab_size
    return LlamaForCausalLM(shape)


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
    memory = {}
    if options.memory:
        for mode in options.modes:
            say(f"memory of {mode} ...")
            memory[mode] = peak_memory(options, mode)
    bench = StepBench(options)
    rate, source = peak_flops(bench.device, DTYPES[options.dtype])
    say(f"MFU is counted against {rate / 1e12:.3g} TFLOP/s ({source}).")
    rounds = _timed_rounds(bench, say)
    return [_result(bench, mode, rounds, memory, rate) for mode in options.modes]


def _timed_rounds(bench: StepBench, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Seconds of every mode, round by round; the order turns, so that no mode always goes first."""
    modes, options = bench.options.modes, bench.options
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
    versus = [t[mode] / t["ce"] for t in rounds if "ce" in t]
    teacher = _weights_mib(bench.distiller.teacher.lm) if mode != "ce" else 0.0
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
        options=bench.options,
    )


def _weights_mib(lm: LlamaForCausalLM) -> float:
    return sum(p.numel() * p.element_size() for p in lm.parameters()) / 2**20


# ---- memory ----


def peak_memory(options: StepOptions, mode: str) -> float:
    """MiB at the peak of a step of one mode alone."""
    if options.device == "cuda":
        return _peak_on_gpu(options, mode)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        try:
            return fresh.submit(_growth_of_process, options, mode).result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"the step of {mode} was killed, probably for memory: try fewer --rows, "
                "--dtype bf16, or --modes without it."
            ) from error


def _peak_on_gpu(options: StepOptions, mode: str) -> float:
    bench = StepBench(options, (mode,))
    bench.step(mode)
    torch.cuda.reset_peak_memory_stats(bench.device)
    bench.step(mode)
    synchronise(bench.device)
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**20
    del bench
    gc.collect()
    torch.cuda.empty_cache()
    return peak


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
