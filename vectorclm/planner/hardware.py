"""Speeds of devices and links, each measured on single kernels or taken from a published sheet; none from a whole step.

Sources:
    [B]  BENCHMARKS.md, "On a GPU": single kernels on an H200. A product of 8192 x 8192 x 8192 runs at 787 TFLOP/s,
         all products in the shapes of `base` at 680 (19.8 TFLOP in 29.1 ms); a copy moves 4.25 TB/s; attention of 64
         windows of 1,024 tokens takes 0.95 ms a layer; a token decoded kernel by kernel takes 7.8 ms, in some 30 calls
         for each of 16 layers.
    [F]  Shah et al., FlashAttention-3 (arXiv 2407.08608), figures 5 and 6: speeds by length on an H100, heads of 64.
    [N]  NCCL's own model of its collectives, src/graph/tuning.cc: latencies in a ring, bus bandwidth over NVLink.
    [T]  github.com/NVIDIA/nccl/issues/209: sockets reach at most 60 % of the wire above 10 Gb/s.
    [R]  github.com/NVIDIA/nccl/issues/495: 600 of 800 Gb/s over RoCE.
    [D]  NVIDIA's data sheets: peak of bf16 products without sparsity, memory, memory and link bandwidth.
"""

from dataclasses import dataclass
from typing import Literal

from vectorclm.errors import ConfigError


@dataclass(frozen=True)
class AttentionSpeed:
    """The speed of an attention kernel: `flops` in long sequences, half of it in sequences of `half_length` tokens."""

    flops: float
    half_length: float

    def seconds(self, flops: float, length: float) -> float:
        """Time of so many FLOPs in sequences of a length."""
        return flops / self.flops * (1 + self.half_length / length)


@dataclass(frozen=True)
class Device:
    """One device and the links between those of a node."""

    name: str
    kind: Literal["cpu", "cuda"]
    product_flops: float  # of a large product
    half_width: float  # smallest dimension at which a product reaches half of that
    memory_bandwidth: float  # bytes a second, read or written
    attention: AttentionSpeed  # over whole windows
    document_attention: AttentionSpeed  # inside documents
    call_seconds: float  # of the host for one call into torch
    memory: float  # bytes
    link_bandwidth: float  # bytes a second in one direction between devices of a node, in a collective
    link_latency: float  # seconds of a step of a ring

    def product_seconds(self, rows: int, columns: int, inner: int, value_bytes: int) -> float:
        """Time of a matrix product: what its arithmetic or its bytes take, whichever is longer."""
        smallest = min(rows, columns, inner)
        speed = self.product_flops * smallest / (smallest + self.half_width)
        size = value_bytes * (rows * inner + inner * columns + rows * columns)
        return max(2.0 * rows * columns * inner / speed, size / self.memory_bandwidth)


# 787 TFLOP/s at 8192 and 680 at the 512 of `base` [B] give the speed without an end, and the width of half of it.
PRODUCT_SHARE, HALF_WIDTH = 795 / 989, 87.0
COPY_SHARE = 4.25 / 4.8  # of the sheet's bandwidth [B, D]
# The lengths of half speed follow from 512 and 1,024 tokens [F], the level from 253 TFLOP/s at 1,024 [B], and the
# ratio of the two kernels from [F] again: cuDNN's over whole windows, FlashAttention 2's inside documents.
ATTENTION_SHARE, HALF_LENGTH = 361 / 989, 437.0
DOCUMENT_SHARE, DOCUMENT_HALF_LENGTH = 233 / 989, 293.0
CALL_SECONDS = 1 / 128 / (16 * 30)  # of a decoded token of `base` [B]
LINK_SHARE = 235 / 300  # of NVLink's sheet: NCCL's bus bandwidth on an A100 [N, D]
LINK_LATENCY, NETWORK_LATENCY = 3.4e-6, 9.6e-6  # a step of a ring inside a node, between nodes [N]
COLLECTIVE_LATENCY = 8.4e-6  # before the first step of a ring [N]


def _gpu(name: str, peak: float, bandwidth: float, memory: float, link: float) -> Device:
    """A GPU by its sheet [D]: TFLOP/s, TB/s, GB, and GB/s in one direction to its peers."""
    flops = peak * 1e12
    return Device(
        name,
        "cuda",
        PRODUCT_SHARE * flops,
        HALF_WIDTH,
        COPY_SHARE * bandwidth * 1e12,
        AttentionSpeed(ATTENTION_SHARE * flops, HALF_LENGTH),
        AttentionSpeed(DOCUMENT_SHARE * flops, DOCUMENT_HALF_LENGTH),
        CALL_SECONDS,
        memory * 1e9,
        LINK_SHARE * link * 1e9,
        LINK_LATENCY,
    )


def _cpu(cores: int) -> Device:
    """Cores of a CPU with AVX2: 107 GFLOP/s a core by MKL, and attention in 70 ms a layer of `small` on two [B]."""
    return Device(
        f"{cores} CPU cores",
        "cpu",
        107e9 * cores,
        0.0,
        10e9 * cores,  # of memory that all cores share
        AttentionSpeed(27e9 * cores, 0.0),
        AttentionSpeed(27e9 * cores, 0.0),
        2e-6,
        16e9,
        10e9,
        5e-5,
    )


DEVICES = {
    device.name.lower().replace(" ", ""): device
    for device in (
        _cpu(2),
        _cpu(16),
        _gpu("H200", 989, 4.8, 141, 450),
        _gpu("H100", 989, 3.35, 80, 450),
        _gpu("B200", 2250, 8.0, 180, 900),
        _gpu("A100", 312, 2.039, 80, 300),
        _gpu("L40S", 362, 0.864, 48, 32),
        _gpu("RTX 4090", 165, 1.008, 24, 32),
    )
}


@dataclass(frozen=True)
class Network:
    """The link of a node to the others."""

    bandwidth: float  # bytes a second of a collective, in one direction
    latency: float  # seconds of a step of a ring


WIRE_SHARE = 1448 / 1514  # bytes of a frame of Ethernet that TCP carries
SOCKET_SHARE, RDMA_SHARE = 0.6, 0.75  # of a fast wire [T, R]
SLOW_WIRE = 10e9  # bits a second, up to which sockets fill the wire


def network(bits: float, *, rdma: bool = False) -> Network:
    """A network of so many bits a second and node: Ethernet through sockets, or InfiniBand and RoCE (`rdma`)."""
    share = RDMA_SHARE if rdma else SOCKET_SHARE if bits > SLOW_WIRE else WIRE_SHARE
    return Network(share * bits / 8, NETWORK_LATENCY)


def parse_bits(text: str) -> float:
    """Bits a second of a text such as 100G or 800M. Raises ConfigError for another form."""
    factors = {"M": 1e6, "G": 1e9, "T": 1e12}
    try:
        value = float(text[:-1]) * factors[text[-1:].upper()]
    except (KeyError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"network {text!r} is no speed: give the bits a second of a node, as in 100G")
    return value


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind; one rank trains on each device."""

    device: Device
    nodes: int
    per_node: int
    network: Network

    @property
    def ranks(self) -> int:
        """Ranks that train together."""
        return self.nodes * self.per_node
