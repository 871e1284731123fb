"""Measure this machine's CPU for the planner: single kernels of a model's shapes, with the threads of one rank."""

import time
from collections.abc import Callable

import torch

from vectorclm.memory_plan import TrainingShape, device_memory
from vectorclm.nn.attention import causal_attention
from vectorclm.nn.matmul import matmul, matmul_tn
from vectorclm.planner.hardware import AttentionSpeed, Device
from vectorclm.runtime.group import Group

TOKENS = 512  # of one measured product
REPEATS = 5
CALLS = 200
LINK_VALUES = 2**20
LINK_LATENCY = 5e-5  # seconds of a step of gloo's ring through sockets


def measure_cpu(shape: TrainingShape, threads: int = 1) -> Device:
    """The speed of one rank with so many threads on this machine: the fastest of five runs of each kernel."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measured(shape)
    finally:
        torch.set_num_threads(before)


def _measured(shape: TrainingShape) -> Device:
    attention = _attention_speed(shape)
    memory = device_memory(torch.device("cpu"))
    bandwidth = _bandwidth(shape)
    call = _fastest(_many_calls) / (2 * CALLS)
    name = "CPU of this machine"
    return Device(
        name, "cpu", _product_speed(shape), 0.0, bandwidth, attention, attention, call, memory, bandwidth, LINK_LATENCY
    )


def measure_link(group: Group) -> float:
    """Bytes a second that a rank sends in one all-reduce of 4 MB, which all ranks of the group do together."""
    values = torch.zeros(LINK_VALUES)
    group.add([values])  # connects
    group.total(0)
    began = time.perf_counter()
    group.add([values])
    sent = 2 * (group.world_size - 1) / group.world_size * 4 * LINK_VALUES
    return sent / (time.perf_counter() - began)


def _many_calls() -> None:
    """Operations on few values, and as many for their gradients."""
    x = torch.ones(16, requires_grad=True)
    y = x
    for _ in range(CALLS):
        y = y * 1.01
    y.sum().backward()  # type: ignore[no-untyped-call]


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest run, after one that warms up."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _product_speed(shape: TrainingShape) -> float:
    """FLOP/s of a layer's products and their gradients, in the model's own shapes."""
    m = shape.model
    q, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    d, f = m.hidden_size, m.intermediate_size
    flops = seconds = 0.0
    for outputs, inputs in ((q + 2 * kv, d), (d, q), (2 * f, d), (d, f)):
        x, weight, grad = torch.randn(TOKENS, inputs), torch.randn(outputs, inputs), torch.randn(TOKENS, outputs)
        for work in (
            lambda x=x, weight=weight: matmul(x, weight),
            lambda grad=grad, weight=weight: matmul(grad, weight.T),
            lambda grad=grad, x=x: matmul_tn(grad, x),
        ):
            seconds += _fastest(work)
            flops += 2.0 * TOKENS * outputs * inputs
    return flops / seconds


def _attention_speed(shape: TrainingShape) -> AttentionSpeed:
    """FLOP/s of one window's attention, forward and backward."""
    m, length = shape.model, shape.window_tokens
    q, k, v = (
        torch.randn(1, heads, length, m.head_dim, requires_grad=True)
        for heads in (m.num_attention_heads, m.num_key_value_heads, m.num_key_value_heads)
    )

    def work() -> None:
        causal_attention(q, k, v, 0.0).sum().backward()  # type: ignore[no-untyped-call]

    flops = 3.5 * 4 * length * (length + 1) / 2 * m.num_attention_heads * m.head_dim
    return AttentionSpeed(flops / _fastest(work), 0.0)


def _bandwidth(shape: TrainingShape) -> float:
    """Bytes a second that an operation on activations reads and writes."""
    x = torch.randn(TOKENS, shape.model.intermediate_size)
    y, out = torch.randn_like(x), torch.empty_like(x)
    return 3 * 4 * x.numel() / _fastest(lambda: torch.mul(x, y, out=out))
