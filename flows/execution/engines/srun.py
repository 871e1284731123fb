"""Slurm: one torchrun a node by srun, inside an allocation: `python -m flows.execution.engines.srun JOB`."""

import os
import shutil
import signal
import subprocess
import sys

from flows.execution.engines.node import job_line, read_job, write_line
from flows.net import free_port
from vectorclm.errors import ConfigError
from vectorclm.runtime.devices import Runtime


def check(runtime: Runtime) -> None:
    """Raise ConfigError outside an allocation, away from its first node, or where it is too small."""
    if shutil.which("srun") is None or "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("engine srun works inside a Slurm job: submit infra/cluster/train.sbatch, or set engine")
    if os.environ.get("SLURM_NODEID") != "0":  # set in a batch script, which runs on the job's first node
        raise ConfigError("engine srun starts from the job's first node: use sbatch, or `srun --pty` on one node")
    if (there := int(os.environ["SLURM_JOB_NUM_NODES"])) < runtime.nodes[0]:
        raise ConfigError(f"this Slurm job has {there} nodes, but nodes is {[*runtime.nodes]}: give sbatch --nodes")


def main() -> int:
    """Start the nodes; pass SIGTERM on to their ranks. srun itself would kill them at once."""
    job, runtime = read_job(sys.argv[1])
    nodes = min(int(os.environ["SLURM_JOB_NUM_NODES"]), runtime.nodes[1])
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--mem=0"]
    command += ["--kill-on-bad-exit=0", f"--cpus-per-task={os.environ.get('SLURM_CPUS_ON_NODE', '1')}"]
    command += [sys.executable, "-m", "flows.execution.engines.node"]
    # In a session of its own: a signal to this process's group does not reach srun.
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as child:
        signal.signal(signal.SIGTERM, lambda *_: write_line(child.stdin, "end\n"))
        write_line(child.stdin, job_line(job, nodes, f":{free_port()}"))
        return child.wait()


if __name__ == "__main__":
    sys.exit(main())
