"""Plan the memory of a training rank, and choose the micro-batch and activation checkpointing that fit a device.

The plan counts tensors: weights, gradients, optimizer state, the activations that wait for the backward pass, and what
the largest operation holds at that moment. Shape letters: model.py; Q and KV are the widths of all query and all
key heads.
"""

import os
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vectorclm.model_config import ModelConfig
from vectorclm.nn.attention_kinds import ATTENTION_KINDS
from vectorclm.runtime.devices import ActivationCheckpointing, Runtime

if TYPE_CHECKING:
    import torch

    from vectorclm.training.optimizers import MatrixOptimizer

DeviceType = Literal["cpu", "cuda"]
FULL, HALF = 4, 2  # bytes of a value
CHUNK, GPU_CHUNK, QUERY_BLOCK = 256, 16_384, 128  # tokens; those of nn/loss.py and nn/attention.py
# Share of the memory that a plan may use: allocators leave gaps, most of all that of glibc with `_keep_memory`.
USABLE = {"cuda": 0.9, "cpu": 0.5}
FEW = 8  # fewer than an eighth of the fastest micro-batch is worth a second forward pass


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a rank holds at the peak of a training step, by what holds them."""

    windows: int  # in a micro-batch
    activation_checkpointing: bool
    weights: int  # with their copies in half precision
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass
    working: int  # of the largest operation at the peak

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True)
class TrainingShape:
    """What decides a training's memory besides the micro-batch."""

    model: ModelConfig
    window_tokens: int
    device: DeviceType = "cuda"
    document_mask: bool = True  # attention inside each document
    matrices: "MatrixOptimizer" = "muon"

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.model.vocab_size * self.model.hidden_size

    @property
    def hidden_matrices(self) -> int:
        """Parameters of the projections in the decoder layers, which Muon updates."""
        norms = (2 * self.model.num_hidden_layers + 1) * self.model.hidden_size
        return self.model.parameters - self.embedding - norms

    @property
    def optimizer_values(self) -> int:
        """Values of the optimizers' state: Muon has one for each parameter, AdamW two."""
        one = self.hidden_matrices if self.matrices == "muon" else 0
        return 2 * self.model.parameters - one

    @property
    def value_bytes(self) -> int:
        """Bytes of an activation's value."""
        return HALF if self.device == "cuda" else FULL

    def layer_bytes(self) -> int:
        """Bytes of the activations of a token that one layer keeps for its backward pass.

        On a GPU, the compiler keeps gate, up and their product; keys and values count once for each query head, and
        the output of attention in the layouts of both its readers.
        """
        m = self.model
        d, f, h = m.hidden_size, m.intermediate_size, m.num_attention_heads
        q, kv = h * m.head_dim, m.num_key_value_heads * m.head_dim
        residual = 4 * d  # two inputs and two normalised inputs
        if self.device == "cuda":
            statistics = FULL * (h + 2)
            return HALF * (residual + (q + kv) + 2 * q + 2 * q + 3 * f) + statistics
        return FULL * (residual + (q + 2 * kv) + 2 * q + 2 * f + (h + 2))

    def mask_bytes(self, windows: int) -> int:
        """Bytes of the masks of one layer's attention: one for each block of queries after the first, on a CPU."""
        if not ATTENTION_KINDS[self.model.attention.kind].is_causal:
            return windows * self.window_tokens**2  # a dense mask of single bytes
        blocks = -(-self.window_tokens // QUERY_BLOCK)
        return FULL * QUERY_BLOCK**2 * (blocks * (blocks + 1) // 2 - 1) if self.device == "cpu" else 0

    def working_bytes(self) -> int:
        """Bytes of a token that the backward pass of the last layer holds besides what waits for it.

        A CPU splits and joins the gradients of attention document by document.
        """
        m = self.model
        q, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
        mlp = (3 if self.device == "cuda" else 4) * m.intermediate_size
        copies = 3 if self.device == "cpu" and self.document_mask else 2
        return self.value_bytes * (3 * m.hidden_size + max(mlp, copies * (q + 2 * kv)))

    def loss_bytes(self, tokens: int) -> int:
        """Bytes of a chunk of logits and of its gradient, of the embedding's gradient and of its turned copy."""
        chunk = min(tokens, GPU_CHUNK if self.device == "cuda" else CHUNK)
        return 2 * self.value_bytes * chunk * self.model.vocab_size + 2 * FULL * self.embedding

    def update_bytes(self) -> int:
        """Bytes of the optimizer's step: Muon's momentum of all matrices, and four copies of those of one shape."""
        if self.matrices != "muon":
            return 0
        m = self.model
        q, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
        square = 2 * q if q == m.hidden_size else q
        largest = max(2 * m.intermediate_size, square, 2 * kv) * m.hidden_size * m.num_hidden_layers
        return FULL * (self.hidden_matrices + 4 * largest)


def plan_memory(
    shape: TrainingShape, windows: int, *, activation_checkpointing: bool = False, accumulates: bool = True
) -> MemoryPlan:
    """The memory of a rank with `windows` windows in a micro-batch; `accumulates` where a step has several of them."""
    parameters, layers, tokens = shape.model.parameters, shape.model.num_hidden_layers, windows * shape.window_tokens
    one_layer = shape.layer_bytes() * tokens + shape.mask_bytes(windows)
    input_bytes = shape.value_bytes * shape.model.hidden_size * tokens  # of a layer
    kept = layers * (input_bytes if activation_checkpointing else one_layer)
    again = one_layer - input_bytes if activation_checkpointing else 0  # one layer at a time, in the backward pass
    fresh = shape.embedding + shape.hidden_matrices // layers  # gradients of the loss and of one layer, not yet added
    backward = again + shape.working_bytes() * tokens + FULL * fresh
    activations, working = kept, max(backward, shape.loss_bytes(tokens) + 3 * input_bytes)
    gradients = FULL * parameters
    if not accumulates:
        gradients = 0  # they appear as the activations go
    if activations + working + gradients < shape.update_bytes() + FULL * parameters:  # the peak is the update
        activations, working, gradients = 0, shape.update_bytes(), FULL * parameters
    copies = HALF * parameters if shape.device == "cuda" else 0
    return MemoryPlan(
        windows,
        activation_checkpointing,
        FULL * parameters + copies,
        gradients,
        FULL * shape.optimizer_values,
        activations,
        working,
    )


def checkpoint_bytes(shape: TrainingShape) -> int:
    """Bytes of a checkpoint's weights and optimizer state."""
    return FULL * (shape.model.parameters + shape.optimizer_values)


def device_memory(device: "torch.device") -> float:
    """Bytes of memory of a GPU, or of this machine for a CPU: all of it, so that equal hardware plans alike."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def choose_plan(
    shape: TrainingShape, windows: int, fastest: int, memory: float, choice: ActivationCheckpointing = "auto"
) -> MemoryPlan:
    """The plan of the largest micro-batch that fits `memory`, of at most `fastest` and `windows` windows.

    `windows` are a rank's windows of a step. With "auto", activation checkpointing is used where otherwise less than
    an eighth of this micro-batch fits. A single window is planned even where it does not fit.
    """
    most = max(1, min(fastest, windows))

    def largest(activation_checkpointing: bool) -> MemoryPlan:
        def plan(count: int) -> MemoryPlan:
            return plan_memory(
                shape, count, activation_checkpointing=activation_checkpointing, accumulates=windows > count
            )

        room = USABLE[shape.device] * memory
        fitting = bisect_left(range(1, most + 1), True, key=lambda count: plan(count).bytes > room)
        return plan(max(1, fitting))

    whole = largest(choice == "on")
    if choice == "auto" and whole.windows * FEW < most:
        return max(whole, largest(True), key=lambda found: found.windows)
    return whole


def plan_for(shape: TrainingShape, windows: int, runtime: Runtime, device: "torch.device", ranks: int) -> MemoryPlan:
    """The plan of a rank's training of `windows` windows a step on this machine, of whose CPU memory `ranks` share.

    `micro_batch_size` and `activation_checkpointing` of the machine decide where they are set.
    """
    fastest = runtime.windows_at_once(shape.window_tokens, device)
    memory = device_memory(device) / (1 if device.type == "cuda" else ranks)
    if not runtime.micro_batch_size:
        return choose_plan(shape, windows, fastest, memory, runtime.activation_checkpointing)
    accumulates = windows > fastest
    found = plan_memory(
        shape, fastest, activation_checkpointing=runtime.activation_checkpointing == "on", accumulates=accumulates
    )
    if runtime.activation_checkpointing == "auto" and found.bytes > USABLE[shape.device] * memory:
        return plan_memory(shape, fastest, activation_checkpointing=True, accumulates=accumulates)
    return found
