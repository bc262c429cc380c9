"""What a run is made of: dataclasses with a line for every field, YAML recipes, overrides.

Values come, each overriding the one before, from the dataclasses' defaults, ``_shared.yaml``, the
recipe and the command line. Every field below and of transformers' ``TrainingArguments`` is a flag
of ``train.py``. A recipe is a YAML file of such fields, by the name of a shipped one or a path.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from argparse import Action
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ldistill.common.device import has_fast_bf16
from ldistill.common.errors import did_you_mean, refuse
from ldistill.data.loader import OnBadSample
from ldistill.data.mixture import parse_mix
from ldistill.data.order import OverLong
from ldistill.data.store import Reads
from ldistill.distill.attention import Backend
from ldistill.distill.objective import Combination, Divergence, Gate
from ldistill.distill.targets import Scope
from ldistill.distill.teacher import Engine
from ldistill.models.fit import Rope
from ldistill.models.parts import DEFAULT_TRAIN, parse_train
from ldistill.recipe_values import (
    check_deepspeed,
    check_trainer_flags,
    settle_batch,
    settle_evaluation,
    settle_values,
)
from ldistill.sources import OTHERS, by_source

DEFAULT_RECIPE = "tiny"
SHARED = "_shared"
_FOLDER = Path(__file__).with_name("recipes")


def _doc(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PairArguments:
    """Student and teacher."""

    student: str = _doc("Student checkpoint: folder or hub id.", "lusxvr/nanoVLM-460M-8k")
    teacher: str = _doc(
        "The LM the student was built on: folder or hub id.", "HuggingFaceTB/SmolLM2-360M-Instruct"
    )
    tokenizer: str | None = _doc("Tokenizer; default the one the student's configuration names.")
    teacher_engine: Engine = _doc("auto: zero3 with ZeRO-3, else replicated.", "auto")
    teacher_offload: bool = _doc("Keep a zero3 teacher's partitions in CPU memory.", False)
    teacher_rope: Rope = _doc(
        "lm: refuse a student of another rotary base than its LM's; student: use its base.", "lm"
    )
    attention: Backend = _doc("Student attention.", "sdpa")
    kernels: Literal["auto", "triton", "reference"] = _doc("auto: Triton on CUDA.", "auto")
    compile_blocks: bool = _doc("torch.compile the decoder's blocks; as --torch_compile.", False)
    lora_rank: int = _doc("LoRA on a frozen decoder, merged at export: its rank; 0: none.", 0)
    lora_alpha: float | None = _doc("Scale of the adapters; default twice the rank.")


@dataclass
class DataArguments:
    """Shards, order and packing."""

    shards: str | None = _doc("Folder or URL of shards made by `ldistill shards build`.")
    sources: str = _doc(
        "full (17 sources), lang (the 8), all (those of the shards) or names by commas.", "full"
    )
    extra_sources: list[str] = field(
        default_factory=list, metadata={"help": "Own sources: name=language or name=document."}
    )
    mix: str | None = _doc(
        "How often sources come in an epoch, else once: a=2 (times), b=0.5 (half of it), c=25% (of "
        "its tokens)."
    )
    max_length: int = _doc("Tokens in a packed row, image tokens included.", 1024)
    packing: bool = _doc("Pack documents into rows; false: one document a row.", True)
    on_long: OverLong = _doc("Document over max_length; dropped ones are counted.", "drop")
    on_bad_sample: OnBadSample = _doc("One that cannot be read; drops are counted.", "error")
    tiling: bool = _doc("Cut large images into tiles; false: one tile an image.", False)
    shuffle_window: int = _doc("Shards whose samples are shuffled together.", 32)
    shard_cache: str | None = _doc("Folder for remote shards; default in the user's cache folder.")
    shard_cache_gb: float = _doc("The most that folder may take, in GB.", 64.0)
    shard_reads: Reads = _doc("Remote shards: whole ones are fetched and cached.", "auto")
    validation: str | None = _doc("Share of documents to hold out, by source, and validate on: 1%.")
    eval_shards: str | None = _doc("Folder or URL of shards to validate on instead.")
    prepare: str | None = _doc("package.module:function that makes shards and tells their folders.")


@dataclass
class DistilArguments:
    """The objective (method and defaults: the paper's section 3 and Table 2)."""

    distil: str = _doc("Sources that distil: none | language | all | names by commas.", "language")
    # Once parsed, these two are a number, or {"others": number, SOURCE: number, ...}.
    alpha: str = _doc(
        "Weight of the KD term on distilling sources, and of named ones: 0.7 or 0.7,vqav2=0.9.", 0.7
    )
    temperature: str = _doc("Softmax temperature of the KD term, as alpha by source.", 4.0)
    combine: Combination = _doc("convex: (1-a)CE + a KD; additive: CE + a KD.", "convex")
    t_squared: bool = _doc("Multiply KL by the squared temperature.", True)
    kl: Divergence = _doc("Divergence of the KD term.", "forward")
    gate: Gate = _doc("Scales a by token where it doubts the teacher.", "none")
    kv_scope: Scope = _doc("Memory the teacher reads.", "full")
    kv_grad: Literal["detached", "through"] = _doc(
        "Whether the KL reaches the student's K/V.", "detached"
    )


@dataclass
class RunArguments:
    """The run around the training loop."""

    recipe: str | None = _doc("Name of a shipped recipe or path of a YAML file.")
    global_batch_size: int | None = _doc("Packed rows per step, all ranks; sets accumulation.", 128)
    projector_lr: float | None = _doc("Learning rate of the projector; default --learning_rate.")
    decoder_lr: float | None = _doc("Learning rate of the decoder; default --learning_rate.")
    vision_lr: float | None = _doc("Learning rate of the vision tower; default --learning_rate.")
    train: str = _doc(
        "What trains: vision, projector, decoder or its attention, mlp, gate_up.", DEFAULT_TRAIN
    )
    health_steps: int = _doc("Every so many steps, the teacher with its own memory; 0: never.", 100)
    eval_items: str | None = _doc("JSONL of items to evaluate on before and after training.")
    evaluate: bool = _doc("Evaluate on the items before and after training.", True)
    eval_suite: str | None = _doc(
        "Suite of `ldistill eval` to run every --eval_steps steps (default: every --save_steps)."
    )
    eval_limit: int | None = _doc("Items of every task, of either evaluation; default all.")
    log_samples: bool = _doc("Write which samples each step trained on: samples/.", False)
    overwrite: bool = _doc("Begin anew; a run that is there becomes FOLDER.old-1.", False)
    stop_file: str | None = _doc("Appearing, stops the run, exit 85; default $LDISTILL_STOP_FILE.")


OWN: tuple[type, ...] = (PairArguments, DataArguments, DistilArguments, RunArguments)
_KNOWN = {f.name for cls in (*OWN, TrainingArguments) for f in dataclasses.fields(cls)}


@dataclass
class Recipe:
    """A resolved run: our four groups and transformers' ``TrainingArguments``."""

    pair: PairArguments
    data: DataArguments
    distil: DistilArguments
    run: RunArguments
    training: TrainingArguments
    given: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was settled otherwise than the recipe says, a line each."""
    compile_options: dict[str, Any] = field(default_factory=dict)
    """Of ``torch.compile``, for ``--compile_blocks``."""

    def as_dict(self) -> dict[str, Any]:
        """Every own field, and the training flags that the recipe or the command line set."""
        groups = (self.pair, self.data, self.distil, self.run)
        own = {k: v for group in groups for k, v in dataclasses.asdict(group).items()}
        named = set(self.given) | {"optim"}  # a checkpoint holds the optimizer's state
        own |= {k: getattr(self.training, k) for k in sorted(named) if k not in own}
        return own


def shipped_recipes() -> dict[str, Path]:
    """``{name: file}`` of the recipes in the package."""
    return {p.stem: p for p in sorted(_FOLDER.glob("*.yaml")) if p.stem != SHARED}


def load_recipe(name: str) -> dict[str, Any]:
    """Fields of a recipe, shipped or a user's own, over the shared ones.
    Raises ValueError: no such recipe, not a mapping, an unknown field, or a value it cannot have.
    """
    shared, own = _read_yaml(_FOLDER / f"{SHARED}.yaml"), recipe_differences(name)
    if "num_train_epochs" in own:
        shared.pop("max_steps", None)  # which the Trainer would heed instead
    values = shared | own
    for key in sorted(map(str, values.keys() - _KNOWN)):
        raise ValueError(f"recipe {name!r}: unknown field {key!r}.{did_you_mean(key, _KNOWN)}")
    for f in dataclasses.fields(TrainingArguments):
        if values.get(f.name, "") is None and f.default is not None:
            raise ValueError(f"recipe {name!r}: {f.name} is empty: leave it out.")
    return settle_values(values, OWN, name)


def recipe_differences(name: str) -> dict[str, Any]:
    """What a recipe alone says, without the shared fields. Raises ValueError: none such."""
    shipped = shipped_recipes()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ValueError(
            f"no recipe {name!r}.{did_you_mean(name, shipped)} Shipped: {', '.join(shipped)}; "
            "or give a YAML file's path."
        )
    return _read_yaml(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must be a mapping of fields to values.")
    return values


def parse(argv: list[str]) -> Recipe:
    """Recipe of a command line, which is without the program's name.

    Raises:
        ValueError: unknown recipe, field or flag, or values that contradict each other.
    """
    argv = [a for a in argv if not a.startswith("--local_rank=")]  # of a launcher
    first = _Parser([], add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default=DEFAULT_RECIPE)
    name = first.parse_known_args(argv)[0].recipe
    values = load_recipe(name)
    values["recipe"] = name
    if not torch.cuda.is_available() and "--use_cpu" not in argv:
        values["use_cpu"] = True  # transformers refuses bf16 on a CPU unless told that it is meant
    notes: list[str] = []
    given = {a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")}
    for flag in sorted(given - _KNOWN - {f"no_{k}" for k in _KNOWN}):
        hint = did_you_mean(flag, _KNOWN, "--{}")
        raise ValueError(f"unknown flag --{flag}.{hint} See --help.")
    if values.get("bf16") and "bf16" not in given and not has_fast_bf16():
        values["bf16"] = False
        notes.append("fp32 instead of the recipe's bf16, which is slow here (--bf16 true).")
    if "num_train_epochs" in given and "max_steps" not in given:
        values["max_steps"] = -1  # the recipe's, which the Trainer would heed instead
    parser = _Parser([*OWN, TrainingArguments], add_help=False, allow_abbrev=False)
    defaults = parser.parse_known_args([])[0]
    parser.set_defaults(**values)
    asked = parser.parse_known_args(argv)[0]
    check_deepspeed(asked.deepspeed)
    check_trainer_flags(asked, defaults)
    # Before the arguments exist, for in making them they fill DeepSpeed's configuration.
    sizes = settle_batch(asked, given, world_size(), notes)
    argv = [*argv, *(f"--{name}={size}" for name, size in sizes.items())]
    best = asked.load_best_model_at_end  # transformers' own would want --save_steps to fit
    argv.append("--load_best_model_at_end=false")
    pair, data, distil, run, training = parser.parse_args_into_dataclasses(argv)
    for name in ("alpha", "temperature"):
        own = by_source(name, values.get(name, getattr(defaults, name)), getattr(defaults, name))
        others = own[OTHERS] if isinstance(own, dict) else own
        setattr(distil, name, by_source(name, getattr(distil, name), others))
    recipe = Recipe(pair, data, distil, run, training, dict.fromkeys(given | set(values)), notes)
    training.load_best_model_at_end = best
    _compile_by_blocks(recipe)
    _check(recipe)
    settle_evaluation(training, data.validation, data.eval_shards, run.eval_suite, recipe.given)
    return recipe


class _Parser(HfArgumentParser):
    """One whose errors are a sentence, without the usage of its hundreds of flags before it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. See --help.")

    def _check_value(self, action: Action, value: Any) -> None:
        """Called by argparse for what was typed; below for what a recipe says."""
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise ValueError(f"{action.dest} must be one of {choices}, got {value!r}.")

    def set_defaults(self, **values: Any) -> None:
        for action in self._actions:
            if values.get(action.dest) is not None:
                self._check_value(action, values[action.dest])
        super().set_defaults(**values)


def _check(recipe: Recipe) -> None:
    """Refuse values that do not go together."""
    args, pair, run = recipe.training, recipe.pair, recipe.run
    parse_mix(recipe.data.mix)
    trained = parse_train(run.train)
    checkpointing = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    decodes = trained - {"vision", "projector"}
    cases = {
        "attention is flex_attention, which PyTorch can train on a GPU alone: choose sdpa.": (
            pair.attention == "flex_attention" and not torch.cuda.is_available()
        ),
        f"max_length must be at least 1, got {recipe.data.max_length}.": recipe.data.max_length < 1,
        "save_only_model leaves out the optimizer, without which no run can go on: leave the flag "
        "out. Every checkpoint has the student alone in its student/.": args.save_only_model,
        "kv_grad through needs the graph that gradient checkpointing drops: choose --kv_grad "
        "detached or leave out --gradient_checkpointing.": (
            recipe.distil.kv_grad == "through" and checkpointing
        ),
        "nothing to train: set --max_steps or --num_train_epochs above 0.": (
            args.max_steps <= 0 and args.num_train_epochs <= 0
        ),
        "vision_lr is given, but vision does not train: --train vision,...": (
            run.vision_lr is not None and "vision" not in trained
        ),
        f"lora_rank is given, but nothing of the decoder trains (--train {run.train}).": (
            pair.lora_rank and not decodes
        ),
        "hub_model_id says where to upload, not whether: add --push_to_hub.": (
            args.hub_model_id and not args.push_to_hub
        ),
    }
    refuse(cases)
    if not args.report_to:
        return  # looking for trackers imports them, which takes seconds
    trackers = get_available_reporting_integrations()
    if missing := [name for name in args.report_to if name not in trackers]:
        raise ValueError(
            f"report_to {missing[0]}: its package is not installed here. Install it, or choose "
            f"{' or '.join([*trackers, 'none'])}."
        )


def _compile_by_blocks(recipe: Recipe) -> None:
    """``--torch_compile`` compiles the student's decoder blocks.

    The whole module would be compiled again and again: its rows differ in number at every step.
    """
    args = recipe.training
    if args.torch_compile:
        recipe.pair.compile_blocks = True
        backend, mode = args.torch_compile_backend, args.torch_compile_mode
        recipe.compile_options = {"backend": backend, "mode": mode}
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    for name in ("BACKEND", "MODE"):  # by which accelerate is told as well
        os.environ.pop(f"ACCELERATE_DYNAMO_{name}", None)


def zero_stage(recipe: Recipe) -> int:
    """ZeRO stage of the student's DeepSpeed configuration; -1 without DeepSpeed."""
    plugin = recipe.training.deepspeed_plugin
    return -1 if plugin is None else int(plugin.zero_stage)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What the student's forward computes in."""
    if recipe.training.bf16:
        return torch.bfloat16
    return torch.float16 if recipe.training.fp16 else torch.float32


def world_size() -> int:
    """Ranks of this run, as the launcher's environment says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print_help(everything: bool) -> None:
    """Own flags with their defaults, in groups; transformers' by reference, or argparse's list."""
    if everything:
        parser = HfArgumentParser([*OWN, TrainingArguments], prog="ldistill/train.py")
        own = {f.name for cls in OWN for f in dataclasses.fields(cls)}
        for action in parser._actions:
            if action.dest in own:  # argparse would fill a % in
                action.help = action.help.replace("%", "%%")
        parser.print_help()
        return
    from rich.console import Console
    from rich.table import Table

    # A file or a pager has no width of its own.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110)
    console.print("deepspeed ldistill/train.py --deepspeed ds_configs/zero2.json --recipe NAME ...")
    console.print(f"Recipes: {', '.join(shipped_recipes())}; default {DEFAULT_RECIPE}.\n")
    for cls in OWN:
        table = Table(title=cls.__doc__, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("flag", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for f, hint in zip(dataclasses.fields(cls), get_type_hints(cls).values()):
            default = [] if f.default is dataclasses.MISSING else f.default
            choices = f" One of {', '.join(get_args(hint))}." if get_origin(hint) is Literal else ""
            table.add_row(f"--{f.name}", str(default), f.metadata["help"] + choices)
        console.print(table)
        console.print()
    console.print(
        "Flags of transformers' TrainingArguments work too and override the recipe, such as "
        "--max_steps, --learning_rate, --per_device_train_batch_size, --save_steps, --report_to, "
        "--gradient_checkpointing. --help_all lists them."
    )
