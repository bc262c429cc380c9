"""To the hub: a run's student, card and curves, when `ldistill push` or a flag asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, httpx

from ldistill.common import readme, run_files
from ldistill.common.errors import TransientError
from ldistill.common.telling import telling
from ldistill.training.card import card
from ldistill.training.export import find_student


def make_repo(name: str, private: bool | None) -> str:
    """A model repository on the hub, new or the one there; its whole id, ``owner/name``.

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
    """Upload the newest student of a run with its card and curves, in one commit.

    Args:
        run: as for :func:`find_student`.
        name: ``owner/name``, or the name of one's own.
        private: of a new repository; None: as the owner's repositories are.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: as for :func:`find_student`.
        ValueError, TransientError: as for :func:`make_repo`.
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
