"""Programs of a study: forked with their libraries loaded, or started; either way as typed."""

from __future__ import annotations

import sys
from multiprocessing import forkserver

import pytest
import torch

from ldistill.tools.study.warm import Warm


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is forked beside a GPU")
def test_a_module_runs_as_a_program_and_its_libraries_are_there(tmp_path, monkeypatch):
    """Each in a process of its own: what one does to its modules the next one does not see."""
    pytest.importorskip("lmms_eval", reason="is one of these libraries")
    forkserver._forkserver._stop()  # what a torture test before may have started
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "a_program.py").write_text(
        "import sys, torch\n"
        "print('loaded', 'lmms_eval' in sys.modules, getattr(torch, 'touched', False))\n"
        "torch.touched = True\n"
        "if __name__ == '__main__':\n    sys.exit(int(sys.argv[1]))\n"
    )
    programs, log = Warm(), tmp_path / "log"
    for status in (3, 0):
        assert programs.run("a_program", [status], log) == status
        assert log.read_text() == "loaded True False\n"


def test_a_command_leaves_its_output_and_status(tmp_path):
    programs, log = Warm(), tmp_path / "log"
    words = [sys.executable, "-c", "print('said'); raise SystemExit(4)"]
    assert programs.call(words, log) == 4
    assert log.read_text() == "said\n"
    with pytest.raises(ValueError, match="no-such-program cannot be started"):
        programs.call(["no-such-program"], log)
