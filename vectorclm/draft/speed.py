"""The speed of this machine in training a model, measured for a few seconds."""

import time

import torch

from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.runtime.devices import Runtime
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

MEASURE_SECONDS = 2.0  # of steps, after two that warm up
LEAST_STEPS = 2
PASS_FLOPS = 3e10  # of one pass on a CPU: half a second on two cores
LEAST_TOKENS = 128
LARGE, FEW_LAYERS = 10_000_000, 1  # parameters, above which a CPU measures a part of the model


def training_speed(model: ModelConfig, length: int, windows: int, runtime: Runtime) -> float:
    """Tokens per second of training steps on random tokens, with the windows of one step that fit in memory at once.

    The optimizer's step is counted as often as in a training with `windows` windows a step.
    """
    device = runtime.configure_torch()
    if device.type == "cpu" and model.parameters > LARGE and model.num_hidden_layers > FEW_LAYERS:
        part = model.model_copy(update={"num_hidden_layers": FEW_LAYERS})  # a few layers stand for all
        ratio = part.flops_per_token(length) / model.flops_per_token(length)
        return ratio * training_speed(part, length, windows, runtime)
    at_once = min(windows, runtime.windows_at_once(length, device))
    width = length
    if device.type == "cpu":  # a large model is measured on fewer tokens
        allowed = max(LEAST_TOKENS, int(PASS_FLOPS / model.flops_per_token(length)))
        at_once, width = max(1, min(at_once, allowed // length)), min(length, allowed)
    measured = at_once * width
    torch.manual_seed(0)
    decoder = CausalLM(model).to(device)
    optimizers = build_optimizers(decoder, OptimizerConfig(learning_rate=1e-4, adamw_learning_rate=1e-4))
    tokens = torch.randint(5, model.vocab_size, (at_once, width), device=device)

    def gradients() -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = decoder.loss(tokens, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        _wait(device)
        return time.perf_counter() - began

    def update() -> float:
        began = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(device)
        return time.perf_counter() - began

    gradients(), update()
    passes: list[float] = []
    updates: list[float] = []
    began = time.perf_counter()
    while len(passes) < LEAST_STEPS or time.perf_counter() - began < MEASURE_SECONDS:
        passes.append(gradients())
        updates.append(update())
    seconds = sum(passes) / len(passes) * windows * length / measured + sum(updates) / len(updates)
    return windows * length / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
