"""Programs that begin where their imports end: forked from a server that has them loaded.

Loading PyTorch, transformers, DeepSpeed and lmms-eval takes as long as a small run of a study. With
a GPU each program is a process of its own, for CUDA's state does not survive a fork.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest import mock

import torch

from ldistill.evaluation.lmms_run import clean_environment


class Warm:
    """Runs programs, one after another; ``offline``: they may not fetch data sets or models."""

    def __init__(self, offline: bool = False) -> None:
        cuda = torch.cuda.is_available()
        # As train.py sets it, before DeepSpeed is imported.
        self._environment = clean_environment({} if cuda else {"DS_ACCELERATOR": "cpu"}, offline)
        self._forks = None if cuda else get_context("forkserver")

    def run(self, module: str, words: Sequence[object], log: Path) -> int:
        """Exit status of ``python -m module words``; its output goes to `log`."""
        arguments = [*map(str, words)]
        if self._forks is None:
            return self.call([sys.executable, "-m", module, *arguments], log)
        # The server, if it does not run yet, has the environment that its children get.
        with mock.patch.dict(os.environ, self._environment, clear=True):
            self._forks.set_forkserver_preload([f"{__package__}.imports"])
            forkserver.ensure_running()
        process = self._forks.Process(target=_program, args=(module, arguments, str(log)))
        process.start()
        try:
            process.join()
        finally:  # of one that has ended, nothing
            process.terminate()
            process.join()
        return process.exitcode

    def call(self, command: Sequence[str], log: Path) -> int:
        """Exit status of a command, in a process of its own; its output goes to `log`."""
        with log.open("wb") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "env": self._environment}
            try:
                return subprocess.run(command, **options).returncode
            except OSError as error:
                raise ValueError(f"{command[0]} cannot be started: {error}.") from error


def _program(module: str, arguments: list[str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
