"""What a training step costs: labels alone, naive distillation, ours. Random weights, one process.

A step is choosing the targets, forward, backward and AdamW on one packed batch of the paper's mix,
the same for all modes. Modes take turns, so that a drifting machine slows all of them; ratios are
medians over the rounds. Peak memory is measured apart, each mode alone: on a GPU what the allocator
held, on a CPU what a fresh process grew by, libraries not counted.

Where the time goes is told by one more step of every mode that waits for the device at every
border: its parts tell proportions, the rounds time. *Data* is choosing the targets and moving the
batch: `ldistill bench data` measures reading and decoding.

Weights, gradients and optimizer states all have ``dtype``: a run with fp32 master weights holds
more in every mode, and the ratios only shrink.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_utils import local_torch_dtype

from ldistill.common.device import peak_flops, seconds, synchronise
from ldistill.common.errors import refuse
from ldistill.data.collate import to_device
from ldistill.distill.attention import choose_attention
from ldistill.distill.distiller import Distiller
from ldistill.distill.objective import Objective
from ldistill.distill.teacher import Teacher
from ldistill.models.flops import count_step
from ldistill.models.hf_vlm import HFVLM
from ldistill.models.named_pairs import teacher_config
from ldistill.models.nanovlm import NanoVLM
from ldistill.models.nanovlm_config import NanoVLMConfig
from ldistill.models.parts import train_only
from ldistill.models.towers import one_picture
from ldistill.recipe import DEFAULT_RECIPE, load_recipe
from ldistill.tools.bench.batch import mix_weights, paper_batch
from ldistill.tools.bench.naive import naive_counts, naive_loss
from ldistill.tools.bench.report import PARTS, Row, device_name, median
from ldistill.tools.pairs import MAIN_RECIPE, pair_config, pair_shape, recipe_of
from ldistill.training.optimizer import Rates, parameter_groups

MODES = ("ce", "naive", "ours")
COMPILED = " compiled"  # what the name of a mode with compiled decoder blocks ends in
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = 10_000_000  # weights of a student whose whole recipe's batch a CPU runs in seconds
Say = Callable[[str], None]
Times = dict[str, float]  # by mode


@dataclass
class StepOptions:
    """A measurement; what is None comes from the pair's recipe and this machine.

    Raises ValueError: unknown pair, or a device or attention that this machine has not.
    """

    pair: str | None = None
    rows: int | None = None
    length: int | None = None
    steps: int = 10
    warmup: int = 2
    device: str | None = None
    dtype: str | None = None
    kernels: str = "auto"
    attention: str = "sdpa"
    mix: str = "paper"
    modes: tuple[str, ...] = MODES
    memory: bool = True
    compile: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        self.pair = self.pair or DEFAULT_RECIPE
        recipe = load_recipe(recipe_of(self.pair) or MAIN_RECIPE)
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        cases = {
            "device is cuda, but torch sees no GPU: see `ldistill doctor`.": (
                self.device == "cuda" and not torch.cuda.is_available()
            ),
            "PyTorch has no backward for flex_attention on a CPU: choose sdpa.": (
                self.device == "cpu" and self.attention == "flex_attention"
            ),
        }
        refuse(cases)
        self.dtype = self.dtype or ("bf16" if self.device == "cuda" else "fp32")
        self.length = self.length or recipe["max_length"]
        self.modes = tuple(mode for mode in MODES if mode in self.modes)
        if self.rows is None:
            whole = self.device == "cuda" or pair_shape(self.pair).student_weights < SMALL
            self.rows = recipe["per_device_train_batch_size"] if whole else 1

    def __str__(self) -> str:
        return (
            f"{self.pair}: {self.rows} rows of {self.length} tokens, {self.dtype} on "
            f"{device_name(self.device)}, attention {self.attention}, mix {self.mix}, "
            f"{self.steps} steps after {self.warmup}"
        )

    @property
    def timed_modes(self) -> tuple[str, ...]:
        """Modes, and those of them that are timed with compiled decoder blocks, too."""
        compiled = (mode + COMPILED for mode in self.modes if mode != "naive" and self.compile)
        return (*self.modes, *compiled)


class StepBench:
    """Models with random weights, optimizer and batch of a measurement."""

    def __init__(self, options: StepOptions) -> None:
        torch.manual_seed(0)
        self.options, self.device = options, torch.device(options.device)
        self.shape, config = pair_shape(options.pair), pair_config(options.pair)
        recipe = load_recipe(recipe_of(options.pair) or MAIN_RECIPE)
        self.weights = mix_weights(options.mix, recipe["alpha"], recipe["temperature"])
        self.labels_only = mix_weights(options.mix, 0.0, 1.0)
        teacher = None
        # weights are drawn where they run, so that the CPU never holds a copy
        with self.device, local_torch_dtype(DTYPES[options.dtype]):
            if isinstance(config, NanoVLMConfig):
                student = NanoVLM(config)
            else:
                vlm = AutoModelForImageTextToText.from_config(config)
                student = HFVLM(vlm, one_picture(config))
            if options.modes != ("ce",):
                lm = AutoModelForCausalLM.from_config(teacher_config(config))
                teacher = Teacher(lm, options.kernels)
        train_only(student)
        self.distiller = Distiller(
            student,
            teacher,
            self.weights if teacher else self.labels_only,
            Objective(kernels=options.kernels),
            attention=choose_attention(options.attention, DTYPES[options.dtype], options.device),
            device=options.device,
        )
        if options.checkpointing:
            self.distiller.activation_checkpointing_enable()
        if options.compile:
            self.distiller.compile_blocks()
        self.compiled = {layer: layer._compiled_call_impl for layer in student.backbone.layers}
        groups = parameter_groups(student, Rates(0.0, 1e-4, 1e-4), 0.0)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.host_batch = paper_batch(config, options.rows, options.length)
        self.batch = to_device(self.host_batch, self.device)

    def targets(self, mode: str) -> Any:
        """Targets and queries of the batch, on the host; labels alone have no queries."""
        self.distiller.weights = self.labels_only if mode.startswith("ce") else self.weights
        return self.distiller.supervise(self.host_batch)

    def loss(self, mode: str) -> Tensor:
        """Forward of one mode; the same scalar for ``naive`` and ``ours``."""
        for layer, compiled in self.compiled.items():
            # torch has no public way back; setting a stance would undo flex_attention's own compile
            layer._compiled_call_impl = compiled if COMPILED in mode else None
        plan = self.targets(mode)
        count, plan = len(plan.targets), plan.to(self.device)
        if mode == "naive":
            return naive_loss(self.distiller, self.batch, plan, count)
        return self.distiller(self.batch, plan, count, mode.startswith("ours"))["loss"]

    def step(self, mode: str) -> None:
        self.loss(mode).backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def clock(self) -> float:
        """:func:`seconds` when the device has done what it was given."""
        synchronise(self.device)
        return seconds(self.device)

    def timed_step(self, mode: str) -> float:
        start = self.clock()
        self.step(mode)
        return self.clock() - start

    def flops(self, mode: str) -> float:
        """FLOPs of a step as this mode runs it; recomputed activations are not counted."""
        counts = count_step(self.distiller.student, self.host_batch, self.targets(mode))
        # The shape counts pictures, with all tiles of each; every document here has one.
        counts = replace(counts, tiles=len(self.host_batch["doc_length"]))
        if mode == "naive":
            # the stock LM runs its k and v projections, which scope `full` leaves out
            return self.shape.step_flops(naive_counts(counts), kv_scope="visual")
        return self.shape.step_flops(counts)


def measure_step(options: StepOptions, say: Say = lambda text: None) -> list[Row]:
    """Time and memory of every mode; ``say`` is told what goes on.

    Raises ValueError: a mode needs more memory than this machine has.
    """
    if options.attention == "auto":
        with _within_memory("choosing the attention"):
            options = replace(options, attention=fastest_attention(options, say))
    memory = {}
    for mode in options.modes if options.memory else ():
        say(f"memory of {mode} ...")
        with _within_memory(f"the step of {mode}"):
            memory[mode] = peak_memory(replace(options, modes=(mode,)))
    with _within_memory("timing all modes in one process"):
        bench = StepBench(options)
        rate, source = peak_flops(bench.device, DTYPES[options.dtype])
        say(f"MFU is counted against {rate / 1e12:.3g} TFLOP/s ({source}).")
        rounds = _timed_rounds(bench, say)
        return [_row(bench, mode, rounds, memory, rate) for mode in options.timed_modes]


@contextmanager
def _within_memory(what: str) -> Iterator[None]:
    """Say in a sentence that something does not fit, instead of PyTorch's page; then tidy up."""
    try:
        yield
    except (torch.OutOfMemoryError, BrokenProcessPool) as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        reason = "out of memory" if gpu else "killed, probably for memory"
        raise ValueError(
            f"{what}: {reason}; try fewer --rows, --dtype bf16, --checkpointing or fewer --modes."
        ) from error
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def fastest_attention(options: StepOptions, say: Say) -> str:
    """The backend with the shortest forward and backward of the student on this very batch."""
    if options.device == "cpu":
        say("attention: sdpa (nothing else runs here).")
        return "sdpa"
    fast = choose_attention("auto", DTYPES[options.dtype], options.device)
    bench, times = StepBench(replace(options, attention="sdpa", modes=("ce",))), {}
    for backend in dict.fromkeys(["sdpa", "flex_attention", fast]):  # eager never wins
        bench.distiller.use_attention(backend)
        bench.loss("ce").backward()  # flex_attention compiles here
        times[backend] = min(bench.timed_step("ce") for _ in range(3))
    best = min(times, key=times.__getitem__)
    shown = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items())
    say(f"attention: {best}, the fastest of {shown} a step.")
    return best


def _timed_rounds(bench: StepBench, say: Say) -> list[Times]:
    """Seconds of every mode, round by round; the order turns, so that no mode always goes first."""
    modes, options, rounds = bench.options.timed_modes, bench.options, []
    for number in range(options.warmup + options.steps):
        turn = number % len(modes)
        times = {mode: bench.timed_step(mode) for mode in modes[turn:] + modes[:turn]}
        if sum(times.values()) > 2:
            kind = "warm-up" if number < options.warmup else "round"
            say(f"{kind}: " + ", ".join(f"{mode} {times[mode] * 1e3:.0f} ms" for mode in modes))
        rounds.append(times)
    return rounds[options.warmup :]


def _row(bench: StepBench, mode: str, rounds: list[Times], memory: Times, rate: float) -> Row:
    """What one mode costs: time in ms, memory in MiB; ``compile_gain`` is the time of the same mode
    with eager blocks over this one's."""
    options, plan, plain = bench.options, bench.targets(mode), mode.removesuffix(COMPILED)
    settings = ("dtype", "rows", "length", "mix", "kernels", "attention", "checkpointing", "steps")
    times = [times[mode] for times in rounds]
    middle, peak, base = median(times), memory.get(mode), memory.get("ce")
    parameters = [] if plain == "ce" else bench.distiller.teacher.lm.parameters()
    teacher = sum(p.nbytes for p in parameters) / 2**20

    def ratio(one: str, other: str) -> float | None:
        return median(t[one] / t[other] for t in rounds if one in t and other in t)

    return {
        "pair": options.pair,
        "mode": mode,
        "device": device_name(options.device),
        **{name: getattr(options, name) for name in settings},
        "ms": middle * 1e3,
        "ms_min": min(times) * 1e3,
        "ms_max": max(times) * 1e3,
        "tokens_per_s": int(bench.host_batch["doc_length"].sum()) / middle,
        "mfu": bench.flops(mode) / middle / rate,
        "time_vs_ce": ratio(mode, mode.replace(plain, "ce")),  # compiled is held against compiled
        "peak_memory_mib": peak,
        "memory_vs_ce": peak and base and peak / base,
        "memory_less_teacher_vs_ce": peak and base and (peak - teacher) / base,
        "teacher_mib": teacher,
        "supervised_rows": len(plan.targets),
        "teacher_rows": options.rows * options.length if mode == "naive" else len(plan.queries),
        "compile_gain": ratio(plain, mode) if plain != mode else None,
        **{f"{part}_ms": ms for part, ms in profile_step(bench, mode).items()},
    }


# ---- memory ----


def peak_memory(options: StepOptions) -> float:
    """MiB at the peak of a step of the only mode."""
    if options.device == "cpu":
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            return fresh.submit(_growth_of_process, options).result()
    bench, [mode] = StepBench(options), options.modes
    bench.step(mode)
    torch.cuda.reset_peak_memory_stats(bench.device)
    bench.step(mode)
    synchronise(bench.device)
    return torch.cuda.max_memory_allocated(bench.device) / 2**20


def _growth_of_process(options: StepOptions) -> float:
    """Runs in a process of its own, because a resident set's peak never goes down."""
    before = psutil.Process().memory_info().rss / 2**20
    bench, [mode] = StepBench(options), options.modes
    # AdamW makes its states now, so that the first step already peaks where all others do.
    for parameter in (p for group in bench.optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    bench.update()
    bench.step(mode)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024 - before


# ---- where the time goes ----


def profile_step(bench: StepBench, mode: str) -> dict[str, float]:
    """Milliseconds of every part of one step; a part within another counts for itself alone."""
    spent, running, last = dict.fromkeys(PARTS, 0.0), [], bench.clock()

    def lap() -> None:
        nonlocal last
        now = bench.clock()
        if running:
            spent[running[-1]] += 1e3 * (now - last)
        last = now

    @contextmanager
    def part(name: str) -> Iterator[None]:
        lap()
        running.append(name)
        yield
        lap()
        running.pop()

    student, teacher = bench.distiller.student, bench.distiller.teacher
    methods = [(bench, "targets", "data"), (student, "forward", "student")]
    methods.append((student.vision, "forward", "vision"))
    if teacher is not None:  # ours, and the naive one
        methods += [(teacher, "hidden", "teacher"), (teacher.lm, "forward", "teacher")]
    with ExitStack() as watched:
        for owner, method, name in methods:
            timed = part(name)(getattr(owner, method))  # of the same signature
            watched.enter_context(mock.patch.object(owner, method, timed))
        with part("data"):
            bench.batch = to_device(bench.host_batch, bench.device)
        with part("loss"):
            loss = bench.loss(mode)
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            bench.update()
    return spent
