"""docs/notebooks: run from top to bottom, and what they say of their own outputs holds."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbclient import NotebookClient
from runs import REPO, environment

NOTEBOOK = REPO / "docs" / "notebooks" / "first_steps.ipynb"


def shown(notebook: nbformat.NotebookNode) -> str:
    """Everything that its cells print and draw."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    drawn = [out.get("data", {}).get("text/html", "") for out in outputs]
    return "\n".join([*(out.get("text", "") for out in outputs), *drawn])


def check(text: str) -> None:
    assert text.count("over the student's") == 3, "three tables of student and teacher"
    labels, distilled = re.findall(r"(\d\.\d+) nats away", text)
    assert float(distilled) < float(labels), "distillation keeps the student at its LM"
    assert re.search(r"to <i [^>]*>0\.05 nats</i>,\s+mean 0\.000<", text), "equal before training"


@pytest.mark.slow
def test_first_steps_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    for name, value in (environment() | {"LDISTILL_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources=where).execute()
    check(shown(notebook))


def test_the_outputs_that_are_kept_are_of_such_a_run_and_tell_nothing_of_its_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check(shown(notebook))
    assert not re.search(r"/(home|root|work|tmp|usr)/", nbformat.writes(notebook))
