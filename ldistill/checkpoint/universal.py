"""A checkpoint of one layout, made loadable by another: other ranks, another ZeRO stage.

DeepSpeed cuts optimizer states by rank and stage. Its universal format has one file per parameter
and state instead, to which this adds what one stage writes and the other wants: each parameter's
step, the optimizer's step where ZeRO-3 looks for it, and the model file under both stages' names.
What is frozen is not in the format: it comes from the original student, as in every run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ldistill.checkpoint import folder as checkpoint_folder
from ldistill.checkpoint.folder import ADAPTED
from ldistill.common.errors import refuse

_STAGE12 = "mp_rank_00_model_states.pt"
_STAGE3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def layout(plugin: Any, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """How a run cuts its optimizer states, by accelerate's plugin for DeepSpeed and the type of its
    forward; equal layouts read each other's checkpoints."""
    if plugin is None:
        return {"engine": "none"}
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    return {
        "engine": f"zero{int(zero.get('stage', 0))}",
        "ranks": world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "optimizer": (zero.get("offload_optimizer") or {}).get("device", "none"),
        "sub_group": int(zero.get("sub_group_size", 1e9)),
    }


def check_convertible(checkpoint: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ValueError where one of the two is a run without ZeRO: no conversion exists for it."""
    names = {"none": "no DeepSpeed", "zero0": "ZeRO stage 0"}
    had, has = (names.get(of["engine"], of["engine"]) for of in (old, new))
    differing = [f"{k}: then {old.get(k)}, now {v}" for k, v in new.items() if old.get(k) != v]
    cases = {
        f"{checkpoint} was written with ZeRO stage 0, which goes on only as it began; "
        f"{', '.join(differing)}.": had == has == names["zero0"],
        f"{checkpoint} was written with {had}, this run has {has}: checkpoints pass between "
        "ranks and ZeRO stages, not between a run with ZeRO and one without. Choose the "
        "--deepspeed configuration accordingly.": {had, has} & set(names.values()),
    }
    refuse(cases)


def convert(checkpoint: Path, run: Path) -> Path:
    """Write a checkpoint in the universal format; returns the folder to resume from.

    It lies beside the run's checkpoints until it has been loaded. Call it on one rank. Raises
    OSError: the conversion failed; the end of what it said is in the message.
    """
    checkpoint_folder.remove(run / ADAPTED)
    target = run / ADAPTED / checkpoint.name
    large = shutil.ignore_patterns("global_step*", "student", "latest")
    shutil.copytree(checkpoint, target, ignore=large)
    [source] = [p for p in checkpoint.iterdir() if p.is_dir() and p.name.startswith("global_step")]
    made = target / f"{source.name}_universal"
    workers = str(min(8, os.cpu_count() or 1))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(made)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    command += ["--inject_missing_state"]
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {k: v for k, v in os.environ.items() if k not in launcher}
    done = subprocess.run(command, capture_output=True, text=True, env=own, check=False)
    if done.returncode != 0:
        raise OSError(
            f"{checkpoint} could not be converted for another number of ranks or ZeRO stage:\n"
            f"{done.stderr[-1500:]}"
        )
    _complete(made)
    checkpoint_folder.write_durably(target / "latest_universal", made.name)
    return target


def _complete(folder: Path) -> None:
    """Add to a universal checkpoint what only the other stages write."""
    path = folder / "zero" / "optimizer_state.pt"
    state = torch.load(path, map_location="cpu", weights_only=False)  # vetted before conversion
    step = _step(folder, state)
    for moment in (folder / "zero").rglob("exp_avg.pt"):
        if not (moment.parent / "step.pt").exists():
            torch.save(step, moment.parent / "step.pt")
        # ZeRO-3's converter writes bare tensors, which only ZeRO-3 reads; all read a wrapped one.
        for part in (moment.with_name("fp32.pt"), moment, moment.with_name("exp_avg_sq.pt")):
            value = torch.load(part, map_location="cpu", weights_only=False)
            if not isinstance(value, dict):
                torch.save({"param": value}, part)
    kept = {k: v for k, v in state.items() if k not in ("optimizer_state_dict", "fp32_flat_groups")}
    kept["optimizer_state_dict"] = {
        "state": {0: {"step": step}},
        "param_groups": state["param_groups"],
    }
    kept.setdefault("ds_version", metadata.version("deepspeed"))  # ZeRO-3 does not write it
    torch.save(kept, path)
    for have, want in ((_STAGE12, _STAGE3), (_STAGE3, _STAGE12)):
        if (folder / have).exists() and not (folder / want).exists():
            shutil.copyfile(folder / have, folder / want)


def _step(folder: Path, state: dict[str, Any]) -> Any:
    """Optimizer steps taken: ZeRO-3 keeps it in the optimizer's state, the others per parameter."""
    kept = state.get("optimizer_state_dict", {}).get("state", {})
    if found := [values["step"] for values in kept.values() if "step" in values]:
        return found[0]
    for path in (folder / "zero").rglob("step.pt"):
        return torch.load(path, weights_only=False)
    if found := [group["step"] for group in state["param_groups"] if "step" in group]:
        return found[0]
    raise OSError(
        f"{folder.parent} holds no optimizer step: only Adam-like optimizers can go on with "
        "another number of ranks or ZeRO stage. Resume with those it was saved with."
    )
