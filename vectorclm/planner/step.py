"""The time of a training step, summed over its kernels and collectives. Shape letters: model.py."""

import math
from dataclasses import dataclass

from vectorclm.memory_plan import FULL, MemoryPlan, TrainingShape, choose_plan
from vectorclm.model_config import ModelConfig
from vectorclm.planner.hardware import Cluster, Device
from vectorclm.planner.traffic import Exchange, exchange_gradients, exchange_muon, muon_matrices, muon_share

DOCUMENT_TOKENS = 600  # of a typical document; that of `vectorclm bench gpu`
FASTEST_TOKENS = 2**17  # of a micro-batch on a large GPU, as in Runtime.windows_at_once
NEWTON_SCHULZ = 5  # steps
DECODED_LAYER_CALLS = 30  # for one token of an answer; see hardware.CALL_SECONDS


@dataclass(frozen=True)
class Workload:
    """A training as the planner sees it."""

    shape: TrainingShape
    batch_size: int  # windows in a step, over all ranks
    steps: int
    token_bytes: int = 2
    validation_tokens: float = 0.0  # of the whole training
    sample_tokens: int = 0  # written one after another
    prompts: int = 1  # of the samples

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.shape.window_tokens


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what the slowest rank does, and the traffic behind them."""

    compute: float  # forward and backward passes
    gradients: float  # sum of the gradients over the ranks
    muon: float  # the optimizers' step with its exchange
    plan: MemoryPlan
    gradient_exchange: Exchange
    muon_exchange: Exchange

    @property
    def seconds(self) -> float:
        """The whole step: nothing overlaps."""
        return self.compute + self.gradients + self.muon


def step_time(work: Workload, cluster: Cluster) -> StepTime:
    """The time of a step on a cluster, by the rank with the most windows."""
    own = -(-work.batch_size // cluster.ranks)
    plan = choose_plan(work.shape, own, _fastest(work, cluster.device), cluster.device.memory)
    whole, rest = divmod(own, plan.windows)
    compute = whole * pass_seconds(work.shape, plan.windows, cluster.device, plan.activation_checkpointing)
    if rest:
        compute += pass_seconds(work.shape, rest, cluster.device, plan.activation_checkpointing)
    gradients = exchange_gradients(work.shape.model, cluster)
    gathered = exchange_muon(work.shape.model, cluster) if work.shape.matrices == "muon" else Exchange(0, 0)
    muon = update_seconds(work.shape, cluster) + gathered.seconds
    return StepTime(compute, gradients.seconds, muon, plan, gradients, gathered)


def _fastest(work: Workload, device: Device) -> int:
    """Windows of the fastest micro-batch on a device."""
    return max(1, (FASTEST_TOKENS if device.kind == "cuda" else 2**12) // work.shape.window_tokens)


def pass_seconds(shape: TrainingShape, windows: int, device: Device, activation_checkpointing: bool) -> float:
    """Time of a micro-batch's forward and backward pass.

    A GPU takes the time of its kernels, or of their launches if these take longer; a CPU launches and computes in turn.
    """
    tokens, layers = windows * shape.window_tokens, shape.model.num_hidden_layers
    one, loss = layer_seconds(shape, tokens, device)
    again = one / 3 if activation_checkpointing else 0.0
    launches = layers * LAYER_CALLS[device.kind] * device.call_seconds * (4 / 3 if activation_checkpointing else 1)
    kernels = layers * (one + again) + loss
    return kernels + launches if device.kind == "cpu" else max(kernels, launches)


def beside_seconds(work: Workload, cluster: Cluster) -> tuple[float, float]:
    """Time of a training's validations, a forward pass over tokens that the ranks share, and of its samples."""
    own = max(1, round(work.validation_tokens / work.shape.window_tokens / cluster.ranks))
    plan = choose_plan(work.shape, own, _fastest(work, cluster.device), cluster.device.memory)
    forward = (
        pass_seconds(work.shape, plan.windows, cluster.device, False) / 3 / (plan.windows * work.shape.window_tokens)
    )
    written = work.sample_tokens / min(work.prompts, cluster.ranks)
    return work.validation_tokens / cluster.ranks * forward, written * written_token_seconds(work.shape, cluster.device)


def written_token_seconds(shape: TrainingShape, device: Device) -> float:
    """Time of one token of an answer: its calls into torch, or the reading of all weights if this takes longer."""
    calls = shape.model.num_hidden_layers * DECODED_LAYER_CALLS * device.call_seconds
    return max(calls, shape.value_bytes * shape.model.parameters / device.memory_bandwidth)


LAYER_CALLS = {"cuda": 36, "cpu": 90}  # kernels of a compiled layer; calls into torch of one that is not


def layer_seconds(shape: TrainingShape, tokens: int, device: Device) -> tuple[float, float]:
    """Time of one layer, and of the embedding with the loss; each forward and backward."""
    m, size = shape.model, shape.value_bytes
    d, f, v = m.hidden_size, m.intermediate_size, m.vocab_size
    q, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim

    def products(outputs: int, inputs: int) -> float:
        """A projection and its two gradients."""
        forms = (tokens, outputs, inputs), (tokens, inputs, outputs), (outputs, inputs, tokens)
        return sum(device.product_seconds(*form, size) for form in forms)

    matrices = products(q + 2 * kv, d) + products(d, q) + 2 * products(f, d) + products(d, f)
    seconds = matrices + attention_seconds(shape, tokens, device)
    seconds += tokens * layer_traffic(shape) / device.memory_bandwidth
    casts = 0 if device.kind == "cpu" else 6 * (shape.hidden_matrices / m.num_hidden_layers)
    logits = (3 if device.kind == "cuda" else 6) * v + 8 * d  # in two passes over a chunk
    loss = products(v, d) + tokens * size * logits / device.memory_bandwidth
    return seconds + casts / device.memory_bandwidth, loss


def attended_keys(window_tokens: int, document_mask: bool) -> float:
    """Keys that a token attends to, on average; documents have geometric lengths."""
    if not document_mask:
        return (window_tokens + 1) / 2
    long = 1 - math.exp(-window_tokens / DOCUMENT_TOKENS)
    return DOCUMENT_TOKENS * (1 - DOCUMENT_TOKENS / window_tokens * long)


def attention_seconds(shape: TrainingShape, tokens: int, device: Device) -> float:
    """Time of one layer's attention, forward and backward (3.5 times the FLOPs of the forward pass)."""
    m = shape.model
    keys = attended_keys(shape.window_tokens, shape.document_mask)
    flops = 3.5 * 4 * tokens * keys * m.num_attention_heads * m.head_dim
    kernel = device.document_attention if shape.document_mask else device.attention
    return kernel.seconds(flops, 2 * keys)


def layer_traffic(shape: TrainingShape) -> float:
    """Bytes of a token that a layer's other operations read and write: norms, rotation, SwiGLU, residuals.

    A compiled layer fuses each chain of them, reads its inputs and writes its outputs once; keys and values are
    repeated for each query head. On a CPU each operation reads and writes its own.
    """
    m = shape.model
    q, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    if shape.device == "cpu":
        return FULL * (40 * m.hidden_size + 20 * m.intermediate_size + 16 * (q + 2 * kv))
    angles = 4 * FULL * m.head_dim if shape.document_mask else 0  # cosines and sines of each token's own position
    return shape.value_bytes * (17 * m.hidden_size + 9 * m.intermediate_size + 4 * (q + 2 * kv) + 4 * q) + angles


def update_seconds(shape: TrainingShape, cluster: Cluster) -> float:
    """Time of the clipping and of the optimizers' step on one rank: products, memory, or calls, whichever is longer."""
    device, model = cluster.device, shape.model
    traffic = 12 * FULL * model.parameters / device.memory_bandwidth
    if shape.matrices != "muon":
        return max(traffic, 60 * device.call_seconds)
    products = 0.0
    for (rows, columns), count in muon_matrices(model).items():
        narrow, wide = sorted((rows, columns))
        share = muon_share(count, cluster)
        one = 2 * device.product_seconds(narrow, wide, narrow, shape.value_bytes)
        one += device.product_seconds(narrow, narrow, narrow, shape.value_bytes)
        products += NEWTON_SCHULZ * share * one
    launches = update_calls(model) * device.call_seconds
    if device.kind == "cpu":  # orthogonalises one matrix at a time
        alone = sum(muon_share(count, cluster) for count in muon_matrices(model).values())
        launches += alone * (6 + 7 * NEWTON_SCHULZ) * device.call_seconds
    return traffic + products + launches if device.kind == "cpu" else max(traffic + products, launches)


def update_calls(model: ModelConfig) -> int:
    """Calls into torch of a step of Muon on a GPU: four weights and seven matrices a layer, four stacks of matrices."""
    return 25 + model.num_hidden_layers * (4 * 4 + 7 * 3) + len(muon_matrices(model)) * (6 + 3 * NEWTON_SCHULZ)
