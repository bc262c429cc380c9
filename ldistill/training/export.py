"""From a run to what others load: its student in a folder or on the hub, its decoder as an LM."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, httpx

from ldistill.checkpoint.folder import survey
from ldistill.common import readme, run_files
from ldistill.common.errors import TransientError
from ldistill.common.telling import telling
from ldistill.models.formats import load_processor, load_student
from ldistill.models.weights import is_complete, weight_dtype
from ldistill.training.card import card


def find_student(run: Path) -> tuple[Path, Path]:
    """Folder of the newest student of a run (or of one of its checkpoints): its result, else its
    newest checkpoint's; and the run's.

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

    An earlier export there is replaced; ``also`` are names that the caller writes anew. Raises
    ValueError: ``out`` holds other files; else as :func:`find_student`.
    """
    source, home = find_student(run)
    names = {path.name for path in source.iterdir()}
    others = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if others := sorted(others - {*names, *also, readme.NAME}):
        raise ValueError(f"{out} holds other files ({', '.join(others[:3])}): choose another.")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, out / name)
    (out / readme.NAME).write_text(card(home, source), encoding="utf-8")
    return source


def export_decoder(student: Path, out: Path, tokenizer: str | None = None) -> None:
    """Write a student's decoder and tokenizer as a folder ``AutoModelForCausalLM`` loads.

    Weights keep their type and shape: the image tokens stay in the vocabulary.
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


# ---- to the hub ----


def make_repo(name: str, private: bool | None) -> str:
    """A model repository on the hub, new or the one there; its whole id, ``owner/name``.

    ``name`` may be without the owner; ``private`` None: as the owner's repositories are.

    Raises:
        ValueError: no token, or one that may not write there; a bad name.
        TransientError: the hub does not answer.
    """
    if not get_token():
        raise ValueError(
            f"no token for {constants.ENDPOINT}: log in with `hf auth login`, or set HF_TOKEN to "
            "one that may write."
        )
    with _sentences(name):
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id


def push(run: Path, name: str, private: bool | None = None) -> str:
    """Upload the newest student of a run with its card and curves, in one commit; its address.

    Args and errors as of :func:`find_student` and :func:`make_repo`.
    """
    student, home = find_student(run)
    repo = make_repo(name, private)
    files: dict[str, Path | bytes] = {p.name: p for p in student.iterdir() if p.is_file()}
    if (curves := home / run_files.CURVES).is_file():
        files[curves.name] = curves
    files[readme.NAME] = card(home, student, repo, curves=curves.is_file()).encode()
    added = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
    disable_progress_bars()
    with telling(f"uploading {len(added)} files to {constants.ENDPOINT}/{repo}"), _sentences(name):
        message = f"{student.parent.name} by ldistill"
        return str(HfApi().create_commit(repo, added, commit_message=message).commit_url)


@contextmanager
def _sentences(name: str) -> Iterator[None]:
    """What the hub's library raises, as what to do."""
    hub = constants.ENDPOINT
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing is uploaded: unset it.") from error
    except HFValidationError as error:
        raise ValueError(f"--repo {name}: {error}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        told = str(error.server_message or error).strip().splitlines()[0]
        if code == 401:
            advice = "log in with `hf auth login`, or set HF_TOKEN to one that is valid"
            raise ValueError(f"{hub} refuses the token ({told}): {advice}.") from error
        if code < 500 and code != 429:
            advice = "choose a --repo of your own, or a token that may write there"
            raise ValueError(f"{hub} refuses {name} ({code}, {told}): {advice}.") from error
        raise TransientError(f"{hub} failed ({code}, {told}): try again later.") from error
    except (httpx.HTTPError, RuntimeError) as error:  # the latter of an upload's threads
        raise TransientError(
            f"{hub} does not answer ({error.__cause__ or error}): check the network, and try "
            "again; nothing of the run is lost."
        ) from error
