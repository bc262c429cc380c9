"""Dockerfile and Apptainer definition: the same image, doing what tests do."""

from __future__ import annotations

import re
import tomllib

import pytest
from runs import REPO

DOCKER = (REPO / "containers" / "Dockerfile").read_text()
APPTAINER = (REPO / "containers" / "ldistill.def").read_text()


def found(pattern: str, text: str) -> set[str]:
    match = re.search(pattern, text)
    assert match, pattern
    return set(re.split(r"[ ,]+", match[1].strip()))


@pytest.mark.parametrize("pattern", [
    r"apt-get install -y --no-install-recommends ([\w\d +-]+)",
    r"pip install .*'[\w/.]*\[([\w,]+)\]'",
])  # fmt: skip
def test_both_install_the_same(pattern):
    assert found(pattern, DOCKER) == found(pattern, APPTAINER)


def test_they_install_what_the_project_offers_and_run_what_test_wheel_runs():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = found(r"pip install '\.\[([\w,]+)\]'", DOCKER) | found(r"'\.\[(flash)\]'", DOCKER)
    assert extras <= set(project["optional-dependencies"])
    assert 'CMD ["ldistill", "train"]' in DOCKER
    assert 'exec ldistill train "$@"' in APPTAINER
    versions = [re.search(r"\d+\.\d+\.\d+", text)[0] for text in (DOCKER, APPTAINER)]
    assert versions[0] == versions[1], "one CUDA"
