"""A real SLURM of two nodes on this machine, in folders and on ports of its own.

Debian's slurm-wlm and munge are all it needs: no systemd, no cgroups, no entry in /etc. The nodes
are named by loopback addresses, so that the name of a job's first node is also where it listens.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path

import psutil
from runs import REPO, discard_buffers, environment, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("127.0.0.1", "127.0.0.2")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
CONFIG = """
ClusterName=lab
SlurmctldHost=localhost
SlurmctldPort={port}
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket,cred_expire=30
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
MessageTimeout=60
BatchStartTimeout=60
MinJobAge=3600
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeAddr=127.0.0.1 NodeHostname=localhost Port={port} CPUs=1 "
    "RealMemory=2000 Gres=gpu:1"
)


class CommandFailed(Exception):
    """A command of SLURM ended with an error, or its daemon did not answer it in time."""


def job_port(job: str, restarts: int = 0, attempt: int = 0) -> str:
    """Where rank 0 of a job listens, as `slurm/common.sh` says."""
    return str(20000 + (int(job) + 997 * (100 * restarts + attempt)) % 12000)


def missing_programs() -> list[str]:
    """What a cluster needs and this machine has not; the daemons lie in /usr/sbin."""
    return [p for p in PROGRAMS if shutil.which(p, path=_path()) is None]


def _path() -> str:
    return environment()["PATH"] + os.pathsep + "/usr/sbin"


class Cluster:
    """munged, slurmctld and two slurmd; every node says it has a GPU, which is /dev/null."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="ldistill-slurm-"))  # a socket's path must be short
        self.submitted: list[str] = []
        self.env = environment() | {"SLURM_CONF": str(self.dir / "slurm.conf"), "PATH": _path()}

    def start(self) -> None:
        """Until both nodes are idle."""
        for name in ("state", "spool", "log", "munge"):
            (self.dir / name).mkdir()
        (self.dir / "munge" / "key").write_bytes(os.urandom(1024))
        (self.dir / "munge" / "key").chmod(0o400)
        nodes = "\n".join(NODE.format(name=n, port=free_port()) for n in NODES)
        user = psutil.Process().username()
        # Ports of ranks follow from a job's number: clusters at the same time must not share them.
        first = random.randrange(1, 12_000)
        text = CONFIG.format(dir=self.dir, port=free_port(), first=first, user=user, nodes=nodes)
        (self.dir / "slurm.conf").write_text(text)
        gres = "\n".join(f"NodeName={name} Name=gpu File=/dev/null" for name in NODES)
        (self.dir / "gres.conf").write_text(gres + "\n")
        kinds = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = [f"--{k}={self.dir}/munge/{k.partition('-')[0]}" for k in kinds]
        self.call("munged", "--force", *files)  # force: the folder is open to its owner alone
        self.call("slurmctld", "-c")
        for name in NODES:
            self.call("slurmd", "-N", name)
        self.until(
            lambda: self.call("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", "idle nodes"
        )

    def stop(self) -> None:
        """End the jobs, then every daemon by the process id it wrote."""
        user = psutil.Process().username()
        subprocess.run(("scancel", "-u", user), env=self.env, capture_output=True)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and self._jobs():
            time.sleep(0.2)
        for file in (*self.dir.glob("*.pid"), self.dir / "munge" / "pid"):
            if not file.is_file():
                continue
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(file.read_text()))
                for child in (*process.children(recursive=True), process):
                    with suppress(psutil.NoSuchProcess):
                        child.send_signal(signal.SIGTERM)
        for job in self.leftovers():
            with suppress(psutil.NoSuchProcess):
                job.kill()
        time.sleep(1)
        for job in self.submitted:
            for restarts, attempt in product(range(3), repeat=2):
                discard_buffers(job_port(job, restarts, attempt))
            (REPO / "slurm" / "logs" / f"found-{job}").unlink(missing_ok=True)
        shutil.rmtree(self.dir, ignore_errors=True)

    def _jobs(self) -> bool:
        shown = subprocess.run(("squeue", "-h"), env=self.env, capture_output=True, text=True)
        return bool(shown.stdout.strip())

    def call(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """What a command prints; CommandFailed when it fails."""
        result = subprocess.run(
            command, env=self.env | dict(env or {}), cwd=REPO, capture_output=True, text=True
        )
        if result.returncode != 0:
            raise CommandFailed(f"{command}: {result.stdout}{result.stderr}")
        return result.stdout

    def submit(self, script: str, *args: str, log: Path, flags: tuple[str, ...] = (), **env) -> str:
        """Number of a new job of `slurm/{script}.sh`; one core a task, the log where asked."""
        cores = ("--cpus-per-task=1",) if script in ("shards", "merge") else ("--cpus-per-gpu=1",)
        flags = (*cores, f"--output={log}", *flags)
        command = ("sbatch", "--parsable", *flags, f"slurm/{script}.sh", *args)
        self.submitted.append(self.call(*command, env={"SETUP": ":"} | env).strip())
        return self.submitted[-1]

    def sleeper(self, seconds: int) -> str:
        """Number of a job that does nothing for so long."""
        flags = ("--parsable", "--output=/dev/null", "--wrap", f"sleep {seconds}")
        return self.call("sbatch", *flags).strip()

    def show(self, job: str) -> list[dict[str, str]]:
        """What SLURM knows of a job, or of each task of an array."""
        lines = self.call("scontrol", "show", "job", "-o", job).strip().splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]

    def wait(self, job: str) -> list[dict[str, str]]:
        """Until a job (or all tasks of an array) is over."""
        self.until(lambda: all(t["JobState"] in OVER for t in self.show(job)), f"the end of {job}")
        return self.show(job)

    def wait_for_restart(self, job: str, number: int) -> None:
        """Until SLURM itself counts so many restarts of a job."""
        self.until(lambda: self.show(job)[0]["Restarts"] == str(number), f"restart {number}")

    def rank(self, job: str, number: int) -> psutil.Process:
        """The process of a rank, once it is there."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [p for p in self.leftovers(job) if _environ(p).get("RANK") == str(number)]
            return bool(found)

        self.until(look, f"rank {number} of job {job}")
        return found[0]

    def leftovers(self, job: str | None = None) -> list[psutil.Process]:
        """train.py's processes in jobs of this cluster."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            env = _environ(process)
            ours = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURM_JOB_ID" in env
            starts = "ldistill.train" in (process.info["cmdline"] or [])
            if ours and starts and job in (None, env["SLURM_JOB_ID"]):
                found.append(process)
        return found

    @staticmethod
    def until(condition: Callable[[], bool], what: str, timeout: float = 400) -> None:
        """Wait for something; AssertionError when it does not come about.

        A busy daemon may not answer a question: it is asked again.
        """
        deadline, failure = time.monotonic() + timeout, ""
        while True:
            try:
                if condition():
                    return
            except CommandFailed as error:
                failure = f"; {error}"
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}{failure}"
            time.sleep(0.2)


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}
