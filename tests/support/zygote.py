"""Ranks of train.py that begin where their imports end: forked from here, where these are loaded.

Input is a socket, to which it answers. A line is a request in JSON: the words of the command line,
the seconds it may take, and of every rank its environment and the files that it prints to; the
answer a line of their exit statuses, once all have ended.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - with the first ZeRO engine
import matplotlib.pyplot  # noqa: F401
import transformers.integrations.deepspeed  # noqa: F401

import ldistill.tiny.suite
import ldistill.training.run  # noqa: F401


def become_rank(words: list[str], env: dict[str, str], out: str, err: str) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["ldistill/train.py", *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


answers = os.fdopen(os.dup(0), "w")
gc.freeze()  # no rank looks through what is loaded here
for line in sys.stdin:
    request = json.loads(line)
    running, statuses = {}, {}
    for number, rank in enumerate(request["ranks"]):
        if (process := os.fork()) == 0:
            answers.close()
            become_rank(request["words"], **rank)  # which ends the process
        running[process] = number
    end = time.monotonic() + request["timeout"]
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in running:
            statuses[running.pop(process)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            for process in running:
                os.kill(process, signal.SIGKILL)
        else:
            time.sleep(0.02)
    print(json.dumps([statuses[number] for number in sorted(statuses)]), file=answers, flush=True)
