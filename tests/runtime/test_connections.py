"""Ranks connect to few others on a step's path: the connections of a rank grow with the logarithm of their number."""

import json
import math
import os
import subprocess
import sys

# Twelve ranks, forked from one process that has imported torch; each does what a step does between ranks.
RANKS = 12
TRAIN = """
import json, os, socket, sys
import psutil, torch
from vectorclm.runtime import distributed
from vectorclm.runtime.ranks import joined

def connections():
    return sum(found.status == psutil.CONN_ESTABLISHED for found in psutil.Process().net_connections("tcp"))

size = int(sys.argv[1])
children = []
for rank in range(size):
    child = os.fork()
    if child:
        children.append(child)
        continue
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    with joined() as group:
        group.call("work")
        for _ in range(3):
            total, _ = group.agree(1, False)
            gradient = torch.ones(1000)
            group.add([gradient])
        line = json.dumps([connections(), total, float(gradient[0])])
        os.write(1, ("found " + line + chr(10)).encode())
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_no_rank_is_connected_to_all_others() -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29_600 + os.getpid() % 300)}
    environment = {**os.environ, **place, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", TRAIN, str(RANKS)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    lines = [line.partition("found ")[2] for line in done.stdout.splitlines() if "found " in line]
    found = [json.loads(line) for line in lines]
    assert [found[1:] for found in found] == [[RANKS, RANKS]] * RANKS
    most = sorted((connections for connections, *_ in found), reverse=True)
    store = RANKS  # the first rank hosts the rendezvous, which torchrun's agent does otherwise
    assert most[0] <= store + 2 * math.log2(RANKS) and most[1] <= 2 * math.log2(RANKS) < RANKS - 1
