"""One run, from a resolved recipe to an exported, evaluated student.

Everything that can be wrong is found before the first step; rank 0 prepares, evaluates and writes,
the others wait for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

from ldistill.checkpoint import resuming, universal
from ldistill.checkpoint.saver import Saver
from ldistill.common import run_files
from ldistill.common.device import peak_flops
from ldistill.common.ranks import everywhere, from_first, is_first, say
from ldistill.data.held_out import held_out, parse_share
from ldistill.data.index import ShardIndex
from ldistill.data.loader import make_loader
from ldistill.data.order import Order
from ldistill.data.remote.read_ahead import settle_reads
from ldistill.data.store import Reading
from ldistill.distill.attention import choose_attention
from ldistill.distill.distiller import Distiller
from ldistill.distill.objective import Objective
from ldistill.distill.teacher import Teacher, choose_engine, zero3_config
from ldistill.models.lora import add_lora
from ldistill.models.pair import Pair, load_pair
from ldistill.models.parts import train_only
from ldistill.recipe import Recipe, compute_dtype, zero_stage
from ldistill.sources import ALL, SourceWeights, known_sources, parse_extra, resolve_sources
from ldistill.training import export, run_folder
from ldistill.training.callbacks import SampleLog, ShortProgress, WriteMetrics, keep_wandb_run
from ldistill.training.card import origins
from ldistill.training.launch import announce_compiling, check_clocks, check_launcher
from ldistill.training.metrics import Meter
from ldistill.training.optimizer import Rates
from ldistill.training.result import evaluate_student, export_result, report, save_last
from ldistill.training.stopping import StopRequest
from ldistill.training.trainer import DistillTrainer, Parts
from ldistill.training.validation import best_of, evaluator_of, open_validation


def run(recipe: Recipe) -> Path:
    """Train, export and evaluate; returns the run's folder.

    Raises:
        Stopped: asked to stop before the last step; the run can go on from its checkpoint.
        ValueError, OSError: something to put right, found before the first step where it can be.
        FloatingPointError: the loss or the weights are not finite.
    """
    torch.manual_seed(recipe.training.seed)
    if recipe.training.deepspeed:
        announce_compiling()
    check_launcher(recipe.training.n_gpu)  # asking for it starts torch.distributed, too
    check_clocks()
    for note in recipe.notes:
        say(note)
    folder, resume, begun = _claim_folder(recipe)
    with _released_on_failure(folder, begun):
        repo, args = None, recipe.training
        if args.push_to_hub:
            args.push_to_hub = False  # with which the Trainer would upload its own checkpoints
            asked = args.hub_model_id or folder.resolve().name
            repo = from_first(lambda: export.make_repo(asked, args.hub_private_repo))
        trainer, before = _set_up(recipe, folder, resume)
        parts = trainer.parts
        if left := parts.start.step < args.max_steps:
            with parts.stop.listening(folder), closing(parts.progress):
                trainer.train(resume_from_checkpoint=resume and str(parts.start.checkpoint))
                parts.stop.raise_if_stopped(trainer.state, folder)
    if not left:
        say(f"{resume} is the last step: nothing is left to train.")
    last, step = resume, parts.start.step
    if left:
        last, step = save_last(trainer, folder), trainer.state.global_step
    export_result(last, folder, parts.best, step)
    after = evaluate_student(recipe, folder / run_files.STUDENT, "after training")
    from_first(lambda: report(recipe, folder, before, after))
    if repo is not None:
        say(f"on the hub: {from_first(lambda: export.push(folder, repo))}")
    return folder


# ---- before the first step ----


@contextmanager
def _released_on_failure(folder: Path, begun: str | None) -> Iterator[None]:
    """Leave the folder of a run that begins as it was, for the corrected command, if it fails."""
    try:
        yield
    except BaseException:
        if begun and is_first():
            run_folder.release(folder, begun)
        raise


def _claim_folder(recipe: Recipe) -> tuple[Path, Path | None, str | None]:
    """Settle and claim the output folder; every rank gets the same one.

    Returns the folder, the checkpoint to go on from, and the id of the run if one begins here.
    """
    args, overwrite = recipe.training, recipe.run.overwrite
    asked = args.resume_from_checkpoint
    if "output_dir" not in recipe.given:
        args.output_dir = from_first(lambda: str(_own_folder(recipe)))
    folder = Path(args.output_dir)
    if overwrite and resuming.wants_newest(asked):
        asked = None  # the run whose checkpoint it would be goes
    resume = resuming.find_checkpoint(asked, folder)
    restart = resume is None and resuming.wants_newest(asked)

    def claim() -> tuple[bool, str | None]:
        begins = run_folder.claim(folder, recipe.as_dict(), resume, overwrite, restart)
        return begins, run_files.run_id(folder)

    begins, run_id = from_first(claim)
    begun = run_id if begins else None
    with _released_on_failure(folder, begun):
        everywhere(lambda: run_folder.check_shared(folder, run_id))
        if resume is not None and resume.parent.resolve() == folder.resolve():
            from_first(lambda: resuming.give_up_later(folder, resume))
        if is_first():
            keep_wandb_run(folder, args.report_to)
    return folder, resume, begun


def _own_folder(recipe: Recipe) -> Path:
    """Where none was given: the checkpoint's, the recipe's newest to go on with, or a new one."""
    name, asked = recipe.run.recipe or "run", recipe.training.resume_from_checkpoint
    if resuming.wants_newest(asked):
        newest = None if recipe.run.overwrite else run_folder.newest_folder(name)
        if newest is not None:
            say(f"no --output_dir was given: {newest} holds the newest run of {name}.")
            return newest
    elif asked and str(asked).lower() != "false":
        return Path(asked).parent
    return run_folder.default_folder(name)


def _set_up(
    recipe: Recipe, folder: Path, resume: Path | None
) -> tuple[DistillTrainer, dict[str, float] | None]:
    """The trainer of a claimed folder, and the student's scores before training."""
    _prepare(recipe)
    data = everywhere(lambda: open_data(recipe))
    pair = open_pair(recipe, data.weights)
    data.index.check(pair.processor)
    if data.index.store.remote:
        say(settle_reads(data.index, data.order, recipe.training.world_size))
    args, options = recipe.training, recipe.pair
    if args.max_steps <= 0:  # the Trainer counts steps, since the stream of packs has no end
        packs = len(data.order.epoch(0)) * args.num_train_epochs
        args.max_steps = math.ceil(packs / recipe.run.global_batch_size)
        say(f"num_train_epochs {args.num_train_epochs:g}: {args.max_steps} steps.")
    _check_disk(recipe, pair, folder)
    if is_first():
        summary = data.order.summary()
        say(f"data: {summary}")
        for name, value in {
            run_files.ORDER: dataclasses.asdict(summary),
            run_files.ORIGINS: origins(pair, options.student, options.teacher, data.index),
        }.items():
            (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
    before = evaluate_student(recipe, pair.student_folder, "before training")
    return build_trainer(recipe, pair, data, folder, resume), before


def _prepare(recipe: Recipe) -> None:
    """Call the recipe's ``prepare`` function on rank 0; its result has ``shards`` and ``items``."""
    ready = recipe.data.shards and (recipe.run.eval_items or not recipe.run.evaluate)
    if recipe.data.prepare is None or ready:
        return
    module_name, _, function = recipe.data.prepare.partition(":")
    try:
        prepare = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"prepare must be package.module:function, got {recipe.data.prepare!r} ({error})."
        ) from error
    say("preparing the recipe's data (made once, then found in the cache)")
    made = from_first(prepare)
    recipe.data.shards = recipe.data.shards or str(made.shards)
    recipe.run.eval_items = recipe.run.eval_items or str(made.items)


@dataclasses.dataclass
class Data:
    """Shards, their order, the weights of their sources; what is held out to validate on."""

    index: ShardIndex
    order: Order
    weights: SourceWeights
    held: tuple[ShardIndex, Order] | None = None


def open_data(recipe: Recipe) -> Data:
    """What a recipe says. Raises ValueError or FileNotFoundError: no shards, unknown sources,
    nothing within the limit."""
    options = recipe.data
    if options.shards is None:
        raise ValueError(
            "no shards: make some with `ldistill shards build` and name them with --shards."
        )
    reading = Reading(options.shard_cache, options.shard_cache_gb, options.shard_reads)
    declared_here = parse_extra(options.extra_sources)
    everything = ShardIndex.load(options.shards, reading=reading, also=declared_here)
    declared = zip(everything.sources, everything.categories, strict=True)
    extra = {n: c for n, c in declared if n not in known_sources()} | declared_here
    found = names = everything.sources
    if options.sources != ALL:
        names = resolve_sources(options.sources, extra)
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{options.shards} has no finished shards of {', '.join(missing)} (--sources "
            f"{options.sources}); it has {', '.join(found)}. Train on what is there with --sources "
            f"{ALL}, or build the others with `ldistill shards build`."
        )
    index = ShardIndex.load(options.shards, names, reading)
    args, held, chosen = recipe.training, None, None
    order_of = partial(
        Order, limit=options.max_length, over_long=options.on_long, packing=options.packing
    )
    if options.validation:
        mask = held_out(index, parse_share(options.validation))
        other, chosen = ShardIndex.load(options.shards, names, reading), ~mask
        held = other, order_of(other, chosen=mask)
    elif options.eval_shards:
        other = _open_eval_shards(options.eval_shards, names, reading)
        held = other, order_of(other)
    order = order_of(
        index,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle_window=options.shuffle_window,
        mix=options.mix,
        chosen=chosen,
    )
    weights = SourceWeights.build(
        index.sources,
        distil=recipe.distil.distil,
        alpha=recipe.distil.alpha,
        temperature=recipe.distil.temperature,
        extra=extra,
    )
    for opened in (index, *(held or ())[:1]):
        opened.check_files()
    return Data(index, order, weights, held)


def _open_eval_shards(shards: str, names: list[str], reading: Reading) -> ShardIndex:
    """The run's sources among those of `--eval_shards`."""
    found = ShardIndex.load(shards, reading=reading, also=names).sources
    common = [name for name in names if name in found]
    if not common:
        raise ValueError(
            f"--eval_shards {shards} has {', '.join(found)}, none of the run's sources "
            f"({', '.join(names)})."
        )
    if left := sorted(set(found) - set(common)):
        say(f"validation leaves out {', '.join(left)}: this run does not train on them.")
    return ShardIndex.load(shards, common, reading)


def open_pair(recipe: Recipe, weights: SourceWeights) -> Pair:
    """Student, processor and, where the recipe distils, its teacher's LM."""
    options, args = recipe.pair, recipe.training
    engine = choose_engine(options.teacher_engine, zero_stage(recipe))
    dtype = compute_dtype(recipe)
    zero_init = zero3_config(dtype, options.teacher_offload) if engine == "zero3" else None
    teacher = options.teacher if weights.distils else None
    say(f"loading {options.student}" + (f" and its teacher, {teacher}" if teacher else ""))
    pair = load_pair(
        options.student,
        teacher,
        tokenizer=options.tokenizer,
        zero_init=zero_init,
        partition=True,
        dtype=dtype if zero_stage(recipe) >= 0 else torch.float32,  # autocast wants float32
        max_length=recipe.data.max_length,
        teacher_rope=options.teacher_rope,
        tiling=recipe.data.tiling,
    )
    train_only(pair.student, recipe.run.train)
    if options.lora_rank:
        add_lora(pair.student, options.lora_rank, options.lora_alpha, args.seed)
    return pair


def make_teacher(recipe: Recipe, pair: Pair) -> Teacher | None:
    """The pair's LM as a teacher on the recipe's engine; None where nothing distils."""
    if pair.lm is None:
        return None
    options, dtype = recipe.pair, compute_dtype(recipe)
    teacher = Teacher(pair.lm, options.kernels)
    engine = choose_engine(options.teacher_engine, zero_stage(recipe))
    if engine == "replicated":
        teacher.lm.to(recipe.training.device, dtype)
    else:
        teacher.shard(engine, dtype, options.teacher_offload)
    return teacher


def build_trainer(
    recipe: Recipe, pair: Pair, data: Data, folder: Path, resume: Path | None
) -> DistillTrainer:
    """Distiller and trainer of a recipe."""
    args, distil, options = recipe.training, recipe.distil, recipe.data
    dtype, rows = compute_dtype(recipe), args.per_device_train_batch_size
    distiller = Distiller(
        pair.student,
        make_teacher(recipe, pair),
        data.weights,
        Objective(distil.combine, distil.t_squared, distil.kl, recipe.pair.kernels, distil.gate),
        kv_scope=distil.kv_scope,
        kv_grad=distil.kv_grad,
        attention=choose_attention(recipe.pair.attention, dtype, args.device.type),
        device=args.device.type,
    )
    if recipe.pair.compile_blocks:
        distiller.compile_blocks(**recipe.compile_options)
    # A step takes all of its passes at once: while it computes, those of the next one are loaded.
    passes, workers = args.gradient_accumulation_steps, max(1, args.dataloader_num_workers)
    load = partial(
        make_loader,
        processor=pair.processor,
        limit=options.max_length,
        rank=args.process_index,
        world_size=args.world_size,
        packing=options.packing,
        on_bad_sample=options.on_bad_sample,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor or 1 + math.ceil(passes / workers),
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
    )
    validation = open_validation(recipe, data.held, data.weights, load)
    layout = universal.layout(args.deepspeed_plugin, args.world_size, dtype)
    about = resuming.describe(run_files.run_id(folder), pair, data.index, data.order, layout)
    start = resuming.fit(resume, about, folder, args.deepspeed_plugin)
    say(f"attention of the student: {distiller.attention}.")
    rate, source = peak_flops(args.device, dtype)
    say(f"MFU is counted against {rate / 1e12:.3g} TFLOP/s ({source}).")
    metrics = WriteMetrics(folder / run_files.METRICS, start.step)
    samples = SampleLog(folder, data.index, start.step) if recipe.run.log_samples else None
    best = best_of(recipe, folder / run_files.METRICS, validation)
    logs = [writer.file for writer in (metrics, samples) if writer is not None]
    stop, own = StopRequest(recipe.run.stop_file), recipe.run
    asked_rates = (own.vision_lr, own.projector_lr, own.decoder_lr)
    scales = [tau**2 if distil.t_squared else 1.0 for tau in data.weights.temperature]
    parts = Parts(
        distiller=distiller,
        pair=pair,
        load=partial(load, data.index, order=data.order, batch_size=rows),
        rates=Rates(*(args.learning_rate if rate is None else rate for rate in asked_rates)),
        meter=Meter(data.weights, args.device, rate),
        metrics=metrics,
        progress=ShortProgress(dict(zip(data.weights.names, scales, strict=True))),
        saver=Saver(folder, about, args.save_total_limit, logs, best and best.find),
        start=start,
        stop=stop,
        validation=validation,
        evaluator=evaluator_of(recipe, pair, folder, lambda: bool(stop.asked)),
        best=best,
        samples=samples,
        health_steps=recipe.run.health_steps,
    )
    return DistillTrainer(args, parts)


def _check_disk(recipe: Recipe, pair: Pair, folder: Path) -> None:
    args = recipe.training
    # Of whole parameters, also where a rank holds only its part of them.
    sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in pair.student.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, p in sizes if p.requires_grad)
    kept = (args.save_total_limit or 2) if args.save_strategy != "no" else 0
    kept += args.load_best_model_at_end  # which may be an older one
    from_first(lambda: run_folder.check_disk(folder, trained, total, kept))
