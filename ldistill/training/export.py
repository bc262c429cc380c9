"""From a run to what others load: the student's own checkpoint, and its decoder as a plain LM."""

from __future__ import annotations

import shutil
from pathlib import Path

from ldistill.checkpoint.folder import survey
from ldistill.common import readme, run_files
from ldistill.models.formats import load_processor, load_student
from ldistill.models.weights import is_complete, weight_dtype
from ldistill.training.card import write_card


def find_student(run: Path) -> tuple[Path, Path]:
    """Folder of the newest student of a run, its result, else its newest checkpoint's; and the run.

    Args:
        run: the run's folder, or one of its checkpoints.

    Raises:
        FileNotFoundError: no such folder, nothing trained in it, or no run's.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"run folder {run} does not exist.")
    # Newest first, but what is known to be whole before what is not.
    checkpoints = sorted(survey(run), key=lambda found: found.problem is not None)
    candidates = [folder / run_files.STUDENT for folder in (run, *(c.path for c in checkpoints))]
    student = next(filter(is_complete, candidates), None)
    if student is None:
        raise FileNotFoundError(
            f"{run} holds no trained student yet: neither a result nor checkpoints."
        )
    for folder in (student.parent, student.resolve().parent.parent):
        if (folder / run_files.RECIPE).is_file():
            return student, folder
    raise FileNotFoundError(
        f"{student} lies in no run's folder (no {run_files.RECIPE}), so there is nothing to make a "
        "model card of: copy it as it is, or upload it with `hf upload`."
    )


def export_student(run: Path, out: Path, also: tuple[str, ...] = ()) -> Path:
    """Copy the newest student of a run to ``out``, with its card; returns where it came from.

    Args:
        run: as for :func:`find_student`.
        out: where to; an earlier export there is replaced.
        also: names in ``out`` that the caller writes anew.

    Raises:
        ValueError: ``out`` holds other files.
        FileNotFoundError: as for :func:`find_student`.
    """
    source, home = find_student(run)
    names = {path.name for path in source.iterdir()}
    others = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if others := sorted(others - {*names, *also, readme.NAME}):
        raise ValueError(f"{out} holds other files ({', '.join(others[:3])}): choose another.")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, out / name)
    write_card(home, source, out)
    return source


def export_decoder(student: Path, out: Path, tokenizer: str | None = None) -> None:
    """Write a student's decoder and tokenizer as a folder ``AutoModelForCausalLM`` loads.

    Weights keep the type that the student's have on disk.

    The image tokens stay in the vocabulary: the embedding keeps its shape.
    """
    lm = load_student(student, dtype=weight_dtype(student)).causal_lm()
    tokenizer_ = load_processor(student, tokenizer).tokenizer
    for config in (lm.config, lm.generation_config):
        config.bos_token_id = tokenizer_.bos_token_id
        config.eos_token_id = tokenizer_.eos_token_id
        config.pad_token_id = tokenizer_.pad_token_id
    lm.config.architectures = [type(lm).__name__]
    lm.config._attn_implementation = "sdpa"
    lm.save_pretrained(out)
    tokenizer_.save_pretrained(out)
