"""Bytes that ranks exchange in a step, and the time that a ring of ranks takes for them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vectorclm.memory_plan import FULL, HALF
from vectorclm.model_config import ModelConfig
from vectorclm.planner.hardware import COLLECTIVE_LATENCY, Cluster

BUCKET = 2**23  # values in one all-reduce; that of runtime/distributed.py


def muon_matrices(model: ModelConfig) -> Mapping[tuple[int, int], int]:
    """Number of the matrices that Muon orthogonalises, by shape [rows, columns]."""
    d, f, q = model.hidden_size, model.intermediate_size, model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    return Counter([(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)] * model.num_hidden_layers)


@dataclass(frozen=True)
class Exchange:
    """One kind of traffic of a step."""

    sent: float  # bytes that each rank sends
    seconds: float


def exchange_gradients(model: ModelConfig, cluster: Cluster) -> Exchange:
    """All-reduce of the gradients and the loss, after the last micro-batch, in buckets."""
    ranks, size = cluster.ranks, FULL * (model.parameters + 1)
    if ranks == 1:
        return Exchange(0, 0)
    sent = 2 * (ranks - 1) / ranks * size
    buckets = -(-model.parameters // BUCKET)
    copied = 4 * size / cluster.device.memory_bandwidth  # into a bucket and out of it
    return Exchange(sent, _ring(cluster, sent, 2 * (ranks - 1), buckets) + copied)


def muon_share(count: int, cluster: Cluster) -> int:
    """The matrices of a shape that the busiest rank orthogonalises; the ranks of each node share all of them."""
    return -(-count // cluster.per_node)


def exchange_muon(model: ModelConfig, cluster: Cluster) -> Exchange:
    """Broadcasts of Muon's updates inside each node, one from each rank that has matrices of a shape.

    They travel in the type of Newton-Schulz (`muon.product_dtype`).
    """
    ranks, size = cluster.per_node, HALF if cluster.device.kind == "cuda" else FULL
    sent = seconds = 0.0
    for (rows, columns), count in muon_matrices(model).items():
        if ranks > 1:
            here = (ranks - 1) / ranks * count * size * rows * columns
            sent += here
            seconds += _ring(cluster, here, ranks - 1, min(count, ranks), within_node=True)
    return Exchange(sent, seconds)


def _ring(cluster: Cluster, sent: float, steps: int, calls: int, *, within_node: bool = False) -> float:
    """Time of `calls` collectives in a ring, in which each rank sends `sent` bytes in all, in `steps` steps a call."""
    several = cluster.nodes > 1 and not within_node
    between = steps * cluster.nodes // cluster.ranks if several else 0
    latency = (steps - between) * cluster.device.link_latency + between * cluster.network.latency
    bandwidth = cluster.device.link_bandwidth if cluster.per_node > 1 else cluster.network.bandwidth
    if several:
        bandwidth = min(bandwidth, cluster.network.bandwidth)
    return sent / bandwidth + calls * (COLLECTIVE_LATENCY + latency)
