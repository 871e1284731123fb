"""Steps of two ranks: on two nodes with a cable of a given speed, or in a network namespace of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import skip_or_fail
from tests.services.nodes import NODES, NodesMissingError, two_nodes

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
from vectorclm.train_step import TrainStep
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


def steps_over_a_link(megabits: int, steps: int) -> dict[str, Any]:
    """What the first of two ranks prints, each a node of its own, with a cable of so many Mb a second each way."""
    try:
        with two_nodes() as nodes:
            nodes.limit_cable(megabits)
            commands = nodes.torchrun([sys.executable, "-c", STEPS, str(steps)], 1)
            children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
            said = [child.communicate(timeout=600)[0] for child in children]
    except NodesMissingError as error:
        skip_or_fail(f"{NODES} ({error})")
    assert [child.returncode for child in children] == [0, 0]
    return _found("".join(said))


def steps_in_one_namespace(steps: int) -> dict[str, Any]:
    """What the first of two ranks prints, both in a namespace with a loopback alone."""
    if sys.platform != "linux" or not (shutil.which("unshare") and shutil.which("ip")):
        skip_or_fail(NODES)
    rights = ["--user", "--map-root-user"] if os.geteuid() else []
    inner = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = ["unshare", "--net", *rights, *inner, *torchrun, sys.executable, "-c", STEPS, str(steps)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return _found(done.stdout)


def _found(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith('{"device"')))
    return found
