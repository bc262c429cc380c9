"""What is settled before any library is loaded: versions, and threads that share the cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ldistill.common.environment import check_versions

# OpenMP tells its settings as it is loaded, which is when it reads them.
THREADS = """
from ldistill.common.environment import settle_environment
settle_environment()
import torch
print("threads", torch.get_num_threads())
"""


def settled(**settings: str) -> str:
    ours = ("OMP_", "GOMP_", "MKL_", "LOCAL_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env |= {"OMP_DISPLAY_ENV": "verbose"} | settings
    done = subprocess.run([sys.executable, "-c", THREADS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_threads_that_wait_sleep_and_ranks_share_the_cores():
    told = settled(LOCAL_SIZE="1000")  # as DeepSpeed's launcher says it
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in told
    assert "GOMP_SPINCOUNT = '1000'" in told
    assert "threads 1\n" in told


def test_the_users_own_settings_win():
    told = settled(LOCAL_WORLD_SIZE="1000", OMP_NUM_THREADS="2", OMP_WAIT_POLICY="active")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in told
    assert "GOMP_SPINCOUNT = '1000'" not in told
    assert "threads 2\n" in told


@pytest.mark.parametrize(("need", "told"), [
    ("no-such-package>=1", "no-such-package is not installed: pip install --upgrade 'no-such"),
    ("torch>=99", "and >=99 is needed: pip install --upgrade 'torch>=99'"),
])  # fmt: skip
def test_what_is_missing_or_old_is_a_sentence_before_anything_is_imported(
    monkeypatch, tmp_path, need, told
):
    info = tmp_path / "ldistill-0.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: ldistill\nVersion: 0\nRequires-Dist: {need}\n"
    (info / "METADATA").write_text(text + 'Requires-Dist: other; extra == "eval"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="pip install") as raised:
        check_versions()
    assert told in str(raised.value)
    code = "import sys; from ldistill.train import main; print(main([]), 'torch' in sys.modules)"
    paths = [str(tmp_path), *(path for path in sys.path if path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    # Not in the repository, whose own metadata may lie in the folder.
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert told in done.stderr
