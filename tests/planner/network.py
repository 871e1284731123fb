"""Two ranks in network namespaces of their own, joined by a virtual link of a given speed, or in one without a link."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import skip_or_fail

NEEDS = "network namespaces need Linux, root and ip and tc: apt-get install iproute2"
# Trains some steps of a small model; the first rank prints its CPU's speed, the seconds of each step, and the bytes
# that its network sent in each.
STEPS = """
import json, sys, time
from dataclasses import asdict
import torch
from tests.planner.network import MODEL, BATCH, LENGTH, sent
from vectorclm.dataset import Batch
from vectorclm.memory_plan import TrainingShape
from vectorclm.model import CausalLM
from vectorclm.planner.measurement import measure_cpu, measure_link
from vectorclm.runtime.ranks import joined
from vectorclm.train import TrainStep
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

torch.set_num_threads(1)
with joined() as group:
    group.call("work")
    device = measure_cpu(TrainingShape(MODEL, LENGTH, "cpu", False))
    link = measure_link(group)
    torch.manual_seed(0)
    model = CausalLM(MODEL)
    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=0.02, adamw_learning_rate=0.006), group)
    ids = torch.randint(5, MODEL.vocab_size, (BATCH // group.world_size, LENGTH))
    step = TrainStep(model, optimizers, 1.0, BATCH, group)
    seconds, bytes_ = [], []
    for number in range(int(sys.argv[1])):
        group.total(0)
        before, began = sent(), time.perf_counter()
        step(Batch(ids, ids))
        group.total(0)
        seconds.append(time.perf_counter() - began)
        bytes_.append(sent() - before)
    if group.rank == 0:
        print(json.dumps({"device": asdict(device), "link": link, "seconds": seconds, "bytes": bytes_}), flush=True)
"""


def model() -> Any:
    """A model of 2.8M parameters, whose exchange takes longer than its passes."""
    from vectorclm.config import load_experiment

    changes = {
        "vocab_size": 16_384,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    return load_experiment("tiny")[0].model.model_copy(update=changes)


MODEL, BATCH, LENGTH = model(), 4, 64


def sent() -> int:
    """Bytes that all interfaces of this process's namespace have sent."""
    lines = Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines()
    return sum(int(line.partition(":")[2].split()[8]) for line in lines if ":" in line)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def _needs_root() -> None:
    if sys.platform != "linux" or os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        skip_or_fail(NEEDS)


@contextmanager
def linked_namespaces(megabits: int) -> Iterator[list[str]]:
    """Two namespaces, and a link between them of so many Mb a second in each direction; their names."""
    _needs_root()
    names = [f"vclm-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", names[0], "link", "add", "wire0", "type", "veth", "peer", "name", "wire1", "netns", names[1])
        for number, name in enumerate(names):
            wire = f"wire{number}"
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", wire)
            _run("ip", "-n", name, "link", "set", wire, "up")
            shape = ("rate", f"{megabits}mbit", "burst", "32kb", "latency", "20ms")
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", wire, "root", "tbf", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _torchrun(*options: str, steps: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        "--no-python",
        sys.executable,
        "-c",
        STEPS,
        str(steps),
    ]


def steps_over_a_link(megabits: int, steps: int) -> dict[str, Any]:
    """What the first of two ranks prints, each a node of its own."""
    with linked_namespaces(megabits) as names:
        children = []
        for number, name in enumerate(names):
            options = ("--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1", "--master-addr=10.77.0.1")
            command = ["ip", "netns", "exec", name, *_torchrun(*options, "--master-port=29777", steps=steps)]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"wire{number}", "OMP_NUM_THREADS": "1"}
            children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        said = [child.communicate(timeout=600)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def steps_in_one_namespace(steps: int) -> dict[str, Any]:
    """What the first of two ranks prints, both in a namespace with a loopback alone."""
    if sys.platform != "linux" or not (shutil.which("unshare") and shutil.which("ip")):
        skip_or_fail(NEEDS)
    rights = ["--user", "--map-root-user"] if os.geteuid() else []
    inner = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    command = ["unshare", "--net", *rights, *inner, *_torchrun("--standalone", "--nproc-per-node=2", steps=steps)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
