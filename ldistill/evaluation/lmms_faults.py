"""What goes wrong with lmms-eval, in sentences: known before it starts, or read from its log."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ldistill.common.errors import did_you_mean
from ldistill.evaluation.suites import ROWS

_CAPTIONS = ("coco", "nocaps", "flickr30k", "textcaps")
_UNREACHABLE = re.compile(
    r"OfflineModeIsEnabled|ConnectionError|Couldn't reach|LocalEntryNotFoundError|"
    r"DatasetNotFoundError|Couldn't find (?:any data file|the dataset|cache)|Max retries exceeded|"
    r"Name or service not known|Temporary failure in name resolution|MaxRetryError|GatedRepoError"
)
_LAST_ERROR = re.compile(r"(?m)^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Enabled)\b.*)$")


def check_before(tasks: Sequence[str], limit: int | None = None) -> None:
    """Whether lmms-eval is there, knows our models, and has what some tasks need.

    Raises:
        ValueError: it would start for nothing; says what to install.
    """
    if find_spec("lmms_eval") is None:
        raise ValueError("lmms-eval is not installed: pip install 'ldistill[eval]'.")
    if not any(ep.name == "ldistill" for ep in metadata.entry_points(group="lmms_eval.models")):
        raise ValueError(
            "ldistill runs from a folder that is not installed, so lmms-eval cannot find its "
            "models: pip install -e . in the repository."
        )
    if limit is not None and limit % 2 and any(fnmatchcase("mme", task) for task in tasks):
        raise ValueError(
            f"task mme asks in pairs, and lmms-eval fails on half of one: the limit must be even, "
            f"got {limit}."
        )
    captions = [task for task in tasks if task.startswith(_CAPTIONS)]
    if captions and shutil.which("java") is None:
        raise ValueError(
            f"task {', '.join(captions)}: caption scores (METEOR, the tokenizer) are computed by a "
            "Java program, and there is no java on the PATH. Install a Java runtime "
            "(apt install default-jre-headless), or name the others with --tasks and no --suite."
        )
    if captions and find_spec("pycocoevalcap") is None:
        raise ValueError(
            f"task {', '.join(captions)} needs pycocoevalcap: pip install pycocoevalcap."
        )


def explain(log: str, tasks: Sequence[str]) -> str | None:
    """The cause of a failure, from lmms-eval's log; None when there is none to be found."""
    if found := re.search(r"Tasks? not found: ([^\n]*?)\. Try ", log):
        return _unknown_tasks([name.strip() for name in found.group(1).split(",")])
    if "OutOfMemoryError" in log or "CUDA out of memory" in log:
        return "The GPU's memory did not suffice: lower --batch-size."
    if found := re.findall(r"(?m)^RuntimeError: (task .*|batch from task .*)$", log):
        return f"The model failed on {found[-1]}"
    if _UNREACHABLE.search(log):
        return _unreachable(log, tasks)
    errors = _LAST_ERROR.findall(log)
    return f"The last error was: {errors[-1]}" if errors else None


def _unknown_tasks(names: Sequence[str]) -> str:
    known = [row.task for row in ROWS]
    hint = "".join(did_you_mean(name, known, "{}") for name in names)
    return (
        f"lmms-eval knows no task {', '.join(names)}.{hint} "
        "`lmms-eval tasks` lists what it knows; --include-path adds a folder of your own."
    )


def _unreachable(log: str, tasks: Sequence[str]) -> str:
    """Which tasks' data could not be fetched, as far as the log names the data set."""
    paths = _data_sets(tasks)
    lines = [line for line in log.splitlines() if _UNREACHABLE.search(line)]
    hit = [task for task, path in paths.items() if any(path in line for line in lines)]
    which = f"The data of {', '.join(hit)}" if hit else "The data of a task"
    rest = [task for task in tasks if task not in hit]
    reason = _LAST_ERROR.findall("\n".join(lines))
    text = f"{which} cannot be fetched ({reason[0][:200] if reason else lines[-1][:200]}). "
    text += "Fetch it once with a network (the Hugging Face cache keeps it)"
    if hit and rest:
        text += f", or leave it out: --tasks {','.join(rest)} and no --suite"
    return text + "."


def _data_sets(tasks: Sequence[str]) -> dict[str, str]:
    """Task → Hugging Face data set, for lmms-eval's own tasks, read from its YAML files."""
    spec = find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(next(iter(spec.submodule_search_locations))) / "tasks"
    found = {}
    for path in root.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8", errors="ignore")
        name = re.search(r"(?m)^task\s*:\s*[\"']?([\w.\-]+)", text)
        if name and name.group(1) in tasks:
            found[name.group(1)] = _data_set(path, text)
    return {task: path for task, path in found.items() if path}


def _data_set(path: Path, text: str) -> str | None:
    if found := re.search(r"(?m)^dataset_path\s*:\s*[\"']?([^\s\"']+)", text):
        return found.group(1)
    include = re.search(r"(?m)^include\s*:\s*[\"']?([^\s\"']+)", text)
    other = path.with_name(include.group(1)) if include else None
    if other is None or not other.is_file():
        return None
    return _data_set(other, other.read_text(encoding="utf-8", errors="ignore"))
