"""Muon's matrices are orthogonalised inside a node: no byte between nodes, none for padding, equal bits everywhere."""

import json
import subprocess
import sys

from tests.conftest import skip_or_fail
from tests.services.nodes import CABLE, NODES, NodesMissingError, two_nodes

MATRICES, SIDE, STEPS = 5, 256, 10  # an odd number of matrices for the two ranks of a node
BYTES = MATRICES * SIDE * SIDE * 4
TRAIN = f"""
import hashlib, json
import torch
from torch import nn
from vectorclm.runtime.ranks import joined
from vectorclm.training.muon import Muon, WeightDecay

def sent(interface):
    lines = open("/proc/net/dev").read().splitlines()
    return int(next(line for line in lines if line.strip().startswith(interface + ":")).split(":")[1].split()[8])

torch.manual_seed(0)
weights = [nn.Parameter(torch.randn({SIDE}, {SIDE})) for _ in range({MATRICES})]
with joined() as group:
    group.call("work")
    muon = Muon(weights, 0.02, 0.95, WeightDecay(0.0), group)
    group.total(0)
    before = sent("{CABLE}"), sent("lo")
    for step in range({STEPS}):
        for weight in weights:
            weight.grad = torch.randn({SIDE}, {SIDE})
        muon.step()
    group.total(0)
    after = sent("{CABLE}"), sent("lo")
    bits = hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in weights)).hexdigest()
    print("found", json.dumps([group.rank, bits, after[0] - before[0], after[1] - before[1]]), flush=True)
"""


def test_no_byte_of_muon_goes_between_nodes_and_none_is_padding() -> None:
    try:
        with two_nodes() as nodes:
            commands = nodes.torchrun([sys.executable, "-c", TRAIN], 2)
            children = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True) for one in commands]
            said = [child.communicate(timeout=120)[0] for child in children]
    except NodesMissingError as error:
        skip_or_fail(f"{NODES} ({error})")
    lines = [line.partition("found ")[2] for output in said for line in output.splitlines() if "found " in line]
    found = [json.loads(line) for line in lines]
    assert sorted(rank for rank, *_ in found) == [0, 1, 2, 3]
    assert len({bits for _, bits, *_ in found}) == 1
    assert max(between for *_, between, _ in found) < 0.01 * STEPS * BYTES
    inside = [inside / STEPS for *_, inside in found]  # of both ranks, which send over the loopback interface
    assert min(inside) > BYTES and max(inside) < 1.05 * BYTES, "each matrix is sent once, to the other rank"


SIXTY_FOUR = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from vectorclm.runtime.distributed import DistributedGroup

class Watchdog:
    def moved(self, collective):
        pass

dist.init_process_group("fake", rank=3, world_size=64, store=FakeStore())  # its collectives send nothing
sent, broadcast = [], dist.broadcast
def counted(tensor, src, group):
    sent.append((src, tensor.numel() * tensor.element_size()))
    return broadcast(tensor, src=src, group=group)
dist.broadcast = counted
ranks = DistributedGroup([3, 64, 3, 64], Watchdog())
for rows in (24, 64, 100):
    sent.clear()
    found = ranks.divide(lambda some: some * 2, torch.ones(rows, 8, 4), torch.bfloat16)
    assert found.dtype == torch.float32 and len({src for src, _ in sent}) == len(sent) == min(rows, 64)
    print(rows, sum(size for _, size in sent))
"""


def test_sixty_four_ranks_send_each_row_once_in_its_own_type() -> None:
    done = subprocess.run([sys.executable, "-c", SIXTY_FOUR], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{rows} {rows * 8 * 4 * 2}" for rows in (24, 64, 100)]
