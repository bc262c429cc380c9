"""What a recipe and a DeepSpeed file say, held against what their fields can be.

Texts are left to the command line's parser, which reads ``1e-4`` as a number and names what it
cannot read.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Container
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from ldistill.common.errors import refuse

LISTS = ("sources", "distil", "train")
"""Fields that a YAML list may say as well: names, which the command line has between commas."""
BY_SOURCE = {
    "mix": "amounts",
    "alpha": "a number, or numbers",
    "temperature": "a number, or numbers",
}
"""Fields that a YAML mapping may say as well: source=value, likewise."""
_KINDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list[str]: "a list of texts",
}


def settle_values(values: dict[str, Any], groups: tuple[type, ...], recipe: str) -> dict[str, Any]:
    """The values of a recipe in the types of the dataclasses' fields, or a ValueError."""
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    try:
        own = {name: _settled(name, values[name], hints[name]) for name in hints.keys() & values}
    except ValueError as error:
        raise ValueError(f"recipe {recipe!r}: {error}") from None
    return values | own


def _settled(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:  # which of its choices is the parser's to check
        hint = str
    kind = next(k for k in (hint, *get_args(hint)) if k in _KINDS)
    if value is None:
        if NoneType in get_args(hint):
            return None
        raise ValueError(f"{name} is empty: give it {_KINDS[kind]}, or leave it out.")
    if name in BY_SOURCE:
        return _by_source(name, value)
    if kind == list[str] and isinstance(value, str):
        return [value]
    texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
    if name in LISTS and texts:
        return ",".join(value)
    fits = texts if kind == list[str] else isinstance(value, (kind, str))
    if kind is float:
        fits |= isinstance(value, int)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {value!r}.")
    return value


def _by_source(name: str, value: Any) -> Any:
    by = isinstance(value, dict)
    kinds = (int, float, str) if by or name != "mix" else (str,)
    if not all(type(v) in kinds for v in (value.values() if by else [value])):
        raise ValueError(f"{name} must be {BY_SOURCE[name]} by source, got {value!r}.")
    return ",".join(f"{k}={v}" for k, v in value.items()) if by else value


# Rows of a pass on a rank, passes, rows of a step over all ranks.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")


def settle_batch(asked: Namespace, given: set[str], ranks: int, notes: list[str]) -> dict[str, int]:
    """The sizes of a step on so many ranks: what was typed stays, what a recipe says gives way.

    The global batch decides, unless accumulation was typed and it was not. Rows of a pass shrink
    to the largest divisor of a rank's share of it; a global batch that the ranks do not divide
    becomes the next best; then `notes` get a line.

    Raises:
        ValueError: no rows in a pass, or typed sizes (`given`) that contradict each other.
    """
    sizes = {name: getattr(asked, name) for name in BATCH}
    rows, steps, total = sizes.values()
    if rows < 1:
        raise ValueError(f"per_device_train_batch_size must be at least 1, got {rows}.")
    typed = [name in given for name in BATCH]
    if total is None or (typed[1] and not typed[2]):
        return dict(zip(BATCH, (rows, steps, rows * steps * ranks), strict=True))
    share = total / ranks
    if typed[0]:
        steps = max(1, round(share / rows))
    elif typed[1]:
        rows = max(1, round(share / steps))
    elif total >= ranks and total % ranks == 0:
        rows = next(n for n in range(min(rows, total // ranks), 0, -1) if share % n == 0)
        steps = int(share) // rows
    else:
        steps = math.ceil(share / rows)
        rows = max(1, round(share / steps))
    reached = rows * steps * ranks
    settled = dict(zip(BATCH, (rows, steps, reached), strict=True))
    if any(settled[name] != sizes[name] for name in given.intersection(BATCH)):
        units = ("rows", "accumulation steps")
        parts = [f"{sizes[n]} {unit}" for n, unit in zip(BATCH, units) if n in given]
        raise ValueError(
            f"global_batch_size {total} is {'not' if all(typed) else 'no multiple of'} "
            f"{' × '.join([*parts, f'{ranks} ranks'])}: change "
            f"{' or '.join('--' + name for name in BATCH if name in given)}."
        )
    if reached != total:
        notes.append(
            f"a step has {reached} rows instead of the recipe's {total}: {rows} a pass × {steps} "
            f"passes × {ranks} ranks."
        )
    elif rows != sizes[BATCH[0]]:
        notes.append(
            f"{rows} rows a pass instead of the recipe's {sizes[BATCH[0]]}: with {ranks} ranks "
            f"and {steps} passes a step keeps its {total} rows."
        )
    return settled


_HEEDED = """
output_dir resume_from_checkpoint seed data_seed full_determinism use_cpu local_rank deepspeed
per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps do_train
learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16 tf32 torch_empty_cache_steps
gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
activation_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
logging_steps logging_first_step logging_strategy log_level log_level_replica log_on_each_node
disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
skip_memory_metrics debug eval_steps eval_delay eval_strategy eval_on_start
per_device_eval_batch_size save_strategy save_steps save_total_limit save_only_model
restore_callback_states_from_checkpoint dataloader_num_workers dataloader_pin_memory
dataloader_prefetch_factor accelerator_config ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
ddp_find_unused_parameters ddp_static_graph ddp_timeout
load_best_model_at_end metric_for_best_model greater_is_better
push_to_hub hub_model_id hub_private_repo
"""
HEEDED = frozenset(_HEEDED.split())
"""Flags of transformers' ``TrainingArguments`` that a run does something with."""
# What others begin with, and why a run does nothing with them.
_UNUSED = {
    "label_smoothing_factor": "the loss is the recipe's own",
    "neftune_noise_alpha": "the teacher reads what the student's embeddings give",
    "use_liger_kernel liger_kernel": "kernels are chosen with --kernels",
    "auto_find_batch_size": "a step's rows are the recipe's; `ldistill plan` says what fits",
    "train_sampling_strategy": "rows are packed, in the order of --seed or --data_seed",
    "optim_target_modules": "--train says what trains",
    "average_tokens_across_devices": "the loss always counts the rows of all ranks",
    "enable_jit_checkpoint": "a run that is told to stop always saves a checkpoint",
    "ignore_data_skip": "a resumed run reads on exactly where it stopped",
    "save_on_each_node": "all nodes share the run's folder",
    "dataloader_drop_last dataloader_persistent_workers": "the stream of rows has no end",
    "dataloader_in_order": "a run can be repeated",
    "hub_": "--push_to_hub uploads the export once, when the run ends; a token is HF_TOKEN's",
    "fsdp": "sharding is DeepSpeed's: --deepspeed",
    "eval_ do_eval do_predict prediction_loss_only include_for_metrics batch_eval_metrics "
    "bf16_full_eval fp16_full_eval": "evaluation is --validation, --eval_items and --eval_suite",
}


def check_trainer_flags(asked: Namespace, defaults: Namespace) -> None:
    """Refuse what transformers' ``TrainingArguments`` has and nothing here would heed, where it is
    not what it is by default: ValueError with the reason."""
    strategies = ("save_strategy", "eval_strategy", "logging_strategy")
    cases = {
        f"{name} must be steps or no, got {getattr(asked, name)!r}: the stream of rows has no "
        "epochs.": getattr(asked, name) not in ("steps", "no")
        for name in strategies
    }
    for name in sorted(TrainingArguments.__dataclass_fields__.keys() - HEEDED):
        found = (why for names, why in _UNUSED.items() if name.startswith(tuple(names.split())))
        why = next(found, "nothing here reads it")
        differs = getattr(asked, name, None) != getattr(defaults, name, None)
        cases[f"{name} cannot be used here ({why}): leave it out."] = differs
    refuse(cases)


LOWER_IS_BETTER = ("loss", "ce", "kd", "extra_vocabulary_mass")


def settle_evaluation(
    args: TrainingArguments,
    validation: str | None,
    eval_shards: str | None,
    eval_suite: str | None,
    given: Container[str],
) -> None:
    """Settle in ``args`` when to evaluate, and what makes one student better than another, by the
    fields that were ``given``. Raises ValueError: nothing to evaluate on, or twice."""
    evaluates = validation or eval_shards or eval_suite
    best = args.load_best_model_at_end
    cases = {
        "--validation and --eval_shards both say what to validate on: choose one.": (
            validation and eval_shards
        ),
        "--eval_strategy needs something to evaluate on: give --validation, --eval_shards or "
        "--eval_suite, and --eval_steps.": not evaluates and args.eval_strategy != "no",
        "load_best_model_at_end takes the checkpoint that was evaluated best: give --validation, "
        "--eval_shards or --eval_suite, and leave out --save_strategy no.": (
            best and (not evaluates or args.save_strategy == "no")
        ),
    }
    refuse(cases)
    args.eval_steps = args.eval_steps or args.save_steps
    if not best:
        return
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    args.metric_for_best_model = f"eval_{metric}"
    if "greater_is_better" not in given:
        args.greater_is_better = not metric.rpartition("/")[2].endswith(LOWER_IS_BETTER)


def check_deepspeed(config: str | dict[str, Any] | None) -> None:
    """Refuse a DeepSpeed configuration that is no JSON or would replace this program's rates."""
    where = "of the recipe"
    if isinstance(config, str):
        written_out = config.startswith("{")  # as transformers takes it too
        if not written_out and not Path(config).is_file():
            return  # transformers says so
        where = "on the command line" if written_out else config
        try:
            config = json.loads(config if written_out else Path(config).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"the DeepSpeed configuration {where} is not valid JSON: {error}."
            ) from error
        if not isinstance(config, dict):
            raise ValueError(f"the DeepSpeed configuration {where} must be a JSON object.")
    if own := [name for name in ("optimizer", "scheduler") if name in (config or {})]:
        raise ValueError(
            f"the DeepSpeed configuration {where} has its own {' and '.join(own)}, which would "
            "train projector and decoder at one rate: take it out, and say the same with --optim, "
            "--projector_lr, --decoder_lr and --lr_scheduler_type."
        )
