"""Bytes that ranks exchange in a step, and the time that a ring of ranks takes for them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vectorclm.memory_plan import FULL
from vectorclm.model_config import ModelConfig
from vectorclm.planner.hardware import COLLECTIVE_LATENCY, Cluster

BUCKET = 2**23  # values in one all-reduce; that of runtime/distributed.py
# How the product divides Muon's matrices among ranks (`DistributedGroup.divide`).
MUON_AMONG_NODES = True  # or among the ranks of each node
MUON_PADS = True  # whether each rank gets equally many matrices, of which some are zeros
MUON_VALUE_BYTES = FULL


def muon_matrices(model: ModelConfig) -> Mapping[tuple[int, int], int]:
    """Number of the matrices that Muon orthogonalises, by shape [rows, columns]."""
    d, f, q = model.hidden_size, model.intermediate_size, model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    return Counter([(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)] * model.num_hidden_layers)


@dataclass(frozen=True)
class Exchange:
    """One kind of traffic of a step."""

    sent: float  # bytes that each rank sends
    padding: float  # of these, bytes that carry nothing
    seconds: float


def exchange_gradients(model: ModelConfig, cluster: Cluster) -> Exchange:
    """All-reduce of the gradients and the loss, after the last micro-batch, in buckets."""
    ranks, size = cluster.ranks, FULL * (model.parameters + 1)
    if ranks == 1:
        return Exchange(0, 0, 0)
    sent = 2 * (ranks - 1) / ranks * size
    buckets = -(-model.parameters // BUCKET)
    copied = 4 * size / cluster.device.memory_bandwidth  # into a bucket and out of it
    return Exchange(sent, 0, _ring(cluster, sent, 2 * (ranks - 1), buckets) + copied)


def muon_share(count: int, cluster: Cluster) -> tuple[int, int]:
    """The matrices of a shape that one rank computes, and the ranks that share them."""
    ranks = cluster.ranks if MUON_AMONG_NODES else cluster.per_node
    return -(-count // ranks), ranks


def exchange_muon(model: ModelConfig, cluster: Cluster) -> Exchange:
    """All-gather of Muon's updates, one for each shape of matrix."""
    sent = padding = seconds = 0.0
    for (rows, columns), count in muon_matrices(model).items():
        share, ranks = muon_share(count, cluster)
        if ranks == 1:
            continue
        matrix = MUON_VALUE_BYTES * rows * columns
        gathered = share * ranks if MUON_PADS else count
        here = (ranks - 1) / ranks * gathered * matrix
        sent += here
        padding += here * (1 - count / gathered)
        seconds += _ring(cluster, here, ranks - 1, 1, within_node=not MUON_AMONG_NODES)
    return Exchange(sent, padding, seconds)


def _ring(cluster: Cluster, sent: float, steps: int, calls: int, *, within_node: bool = False) -> float:
    """Time of `calls` collectives in a ring, in which each rank sends `sent` bytes in all, in `steps` steps a call."""
    several = cluster.nodes > 1 and not within_node
    between = steps * cluster.nodes // cluster.ranks if several else 0
    latency = (steps - between) * cluster.device.link_latency + between * cluster.network.latency
    bandwidth = cluster.device.link_bandwidth if cluster.per_node > 1 else cluster.network.bandwidth
    if several:
        bandwidth = min(bandwidth, cluster.network.bandwidth)
    return sent / bandwidth + calls * (COLLECTIVE_LATENCY + latency)
