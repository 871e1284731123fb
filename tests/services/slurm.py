"""Slurm on this machine: Debian's controller and two nodes, each a slurmd of its own."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.net import free_port
from tests.conftest import skip_or_fail

MISSING = "Slurm is missing: apt-get install slurm-wlm"
START_SECONDS = 60
NAMES = "node1", "node2"
CONFIG = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,requeue_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=test Nodes={nodes} Default=YES State=UP MaxTime=INFINITE
"""


class Slurm:
    """A cluster with two nodes; `environment` lets Slurm's commands find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        text = CONFIG.format(port=free_port(), user=user, folder=folder, nodes=",".join(NAMES))
        for name in NAMES:
            text += f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()} CPUs=2\n"
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()

    def start(self) -> None:
        """Start the controller and the nodes, and wait until both nodes are idle."""
        for name, command in (("ctld", ["slurmctld", "-D"]), *((name, ["slurmd", "-D", "-N", name]) for name in NAMES)):
            with (self.folder / f"{name}.out").open("ab") as log:
                daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            self.daemons.append(daemon)
        self.until(lambda: self.command("sinfo", "--noheader", "--format=%T %D") == "idle 2", START_SECONDS)

    def command(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job, such as RUNNING."""
        shown = self.command("scontrol", "show", "job", job)
        return next((word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")), "")

    def until(self, ready: Callable[[], object], seconds: float) -> None:
        """Wait for something; fails with the daemons' logs."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, "\n".join(
                path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))
            )
            time.sleep(0.1)

    def close(self) -> None:
        """End all jobs and daemons."""
        self.command("scancel", "--quiet", "--signal=KILL", "--full", f"--user={os.getuid()}")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Slurm with two idle nodes; the test is skipped where the programs are missing."""
    if not all(shutil.which(program) for program in ("slurmctld", "slurmd", "srun")):
        skip_or_fail(MISSING)
    if os.geteuid():
        pytest.skip("slurmd runs as root only")
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.close()
