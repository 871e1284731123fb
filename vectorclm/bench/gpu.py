"""`vectorclm bench gpu`: speed, MFU and memory of a training step on one GPU, decoding speed, and a profile.

The step is the training loop's own: `TrainStep` with the compiled loss, over batches of the experiment's size.
The last rows are the profile and have no bounds; all other rows have one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vectorclm.bench.table import Row, bounded, compared, could_not_run, reached
from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.dataset import Batch, document_labels, position_ids
from vectorclm.inference.decode import SteadyDecoding
from vectorclm.model import CausalLM
from vectorclm.nn.attention import Documents
from vectorclm.runtime.devices import Runtime
from vectorclm.tokenizer import BOS_ID, EOS_ID, SPECIAL_TOKENS
from vectorclm.train_step import TrainStep, loss_function
from vectorclm.training.optimizers import build_optimizers, set_learning_rates

# Peak dense bf16 FLOP/s with fp32 sums, from the vendors' data sheets. The first name found in the device's applies.
PEAKS = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
TOKENS_PER_SECOND, MFU = 1.2e6, 0.45
OPTIMIZER_SHARE = 0.05  # of a step
NEAR = 0.03  # largest relative error of a gradient through half precision
DOCUMENT = 600  # tokens, on average
PROMPT, NEW = 64, 256  # tokens
ROWS = {
    "tokens a second, documents apart": ("tokens/s", TOKENS_PER_SECOND),
    "tokens a second, whole windows": ("tokens/s", TOKENS_PER_SECOND),
    "share of the peak (6N and attention)": ("share", MFU),
    "peak memory": ("MB", 1.0),
    "attention by a fused kernel": ("share", 1.0),
    "optimizer's share of a step": ("share", OPTIMIZER_SHARE),
    "decoding by CUDA graph, batch 1": ("tokens/s", 1.0),
    "gradients, farthest from a CPU's in full precision": ("share", NEAR),
}
# Groups of kernels and operations, by a part of the name; the first match applies.
GROUPS = {
    "attention": ("flash", "fmha", "attention", "attn", "sdpa", "cudnn::fusion"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "mm", "bmm", "linear"),
    "copies to and from the device": ("memcpy", "memset"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lerp"),
    "fused by the compiler": ("triton",),
}
REST = "all else"
FUSED = ("flash", "fmha", "cudnn")  # parts of the names of kernels that never store all attention weights


@dataclass(frozen=True)
class DeviceLoad:
    """The measured training: experiment, device and sizes."""

    experiment: ExperimentConfig
    device: torch.device
    micro_batch: int  # windows
    steps: int  # in a round
    peak: float  # FLOP/s of the device
    windows: int = 0  # in a step; 0 means the experiment's

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.experiment.pretrain.batch_size * self.experiment.shards.sequence_length


def gpu(rounds: int, experiment: str = "base") -> Iterator[Row]:
    """Every row on this machine's GPU, or the reason why the rows could not run."""
    why = None if torch.cuda.is_available() else "torch sees no GPU here"
    name = torch.cuda.get_device_name() if why is None else ""
    peak = next((peak for part, peak in PEAKS.items() if part in name), 0.0)
    if why is None and not peak:
        why = f"the peak of a {name} is unknown: add it to PEAKS in vectorclm/bench/gpu.py"
    if why is not None:
        for row, (unit, ask) in ROWS.items():
            yield could_not_run(f"{experiment}: {row}", unit, ask, why)
        return
    found = load_experiment(experiment)[0]
    device = torch.device("cuda")
    micro_batch = min(Runtime().windows_at_once(found.shards.sequence_length, device), found.pretrain.batch_size)
    yield from measured(DeviceLoad(found, device, micro_batch, 5, peak), rounds, name)


def measured(load: DeviceLoad, rounds: int, where: str) -> Iterator[Row]:
    """Measure every row on a device. A CPU is for tests only: it compiles nothing and captures no CUDA graph."""
    Runtime(device=load.device.type).configure_torch()
    torch.manual_seed(load.experiment.seed)
    model, device, name = CausalLM(load.experiment.model).to(load.device), load.device, load.experiment.name
    optimizers = build_optimizers(model, load.experiment.pretrain.optimizer)
    set_learning_rates(optimizers, 1e-3)  # random tokens have nothing to learn
    train_step = TrainStep(model, optimizers, 1.0, load.micro_batch, loss_of=loss_function(model, device))
    names = iter(f"{name}: {row}" for row in ROWS)
    seconds: dict[bool, list[float]] = {}
    for apart in (True, False):
        batch = _batch(load, apart=apart)

        def step(batch: Batch = batch) -> None:
            train_step(batch)

        step()  # compiles
        seconds[apart] = [_timed(device, step, load.steps) for _ in range(rounds)]
        speeds = [load.tokens / each for each in seconds[apart]]
        yield reached(
            next(names), speeds, "tokens/s", TOKENS_PER_SECOND, f"{where}, {load.micro_batch} windows at once"
        )
    cost = load.tokens * load.experiment.model.flops_per_token(load.experiment.shards.sequence_length)
    shares = [cost / each / load.peak for each in seconds[False]]
    yield reached(next(names), shares, "share", MFU, f"of {load.peak / 1e12:g} TFLOP/s, in whole windows")
    yield bounded(next(names), [_peak_memory(device)], "MB", _memory(device), "what the device has")
    times = _profile(device, step)
    yield _attention(next(names), times)
    updates = [_timed(device, lambda: _update(model, optimizers), load.steps) for _ in range(rounds)]
    whole = sorted(seconds[False])[rounds // 2]
    yield bounded(next(names), [each / whole for each in updates], "share", OPTIMIZER_SHARE)
    yield _decoding(next(names), model, rounds)
    yield bounded(next(names), [_gradients_apart(load)], "share", NEAR, "two layers, documents apart and whole windows")
    yield from _where(name, times)


def _batch(load: DeviceLoad, *, apart: bool) -> Batch:
    """A batch of random tokens in host memory, as from the loader; with `apart`, in documents of geometric lengths."""
    length, windows = load.experiment.shards.sequence_length, load.windows or load.experiment.pretrain.batch_size
    random = np.random.default_rng(1)
    ids = random.integers(len(SPECIAL_TOKENS), load.experiment.model.vocab_size, (windows, length))
    if apart:
        ends = random.random(ids.shape) < 1 / DOCUMENT
        ids[ends] = EOS_ID
        ids[:, 1:][ends[:, :-1]] = BOS_ID
    positions = position_ids(ids) if apart else None
    parts = [ids, document_labels(ids, positions), *([] if positions is None else [positions])]
    tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
    return Batch(*(tensor.pin_memory() if load.device.type == "cuda" else tensor for tensor in tensors))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, work: Callable[[], Any], times: int) -> float:
    """Mean seconds of one call over `times` calls."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - began) / times


def _update(model: CausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """The update of a training step, with constant gradients."""
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.full_like(p, 1e-3)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def _gradients_apart(load: DeviceLoad) -> float:
    """The largest relative distance between a parameter's gradient here and on the CPU: a fast step may be wrong."""
    model = load.experiment.model.model_copy(update={"num_hidden_layers": 2})
    small = replace(
        load, experiment=load.experiment.model_copy(update={"model": model}), windows=20
    )  # more tokens than a chunk of the loss
    ours, exact = CausalLM(model), CausalLM(model)
    exact.load_state_dict(ours.state_dict())
    torch.compiler.reset()  # otherwise a second batch size compiles a graph with dynamic shapes
    loss_of = loss_function(ours.to(load.device), load.device)
    far: list[Tensor] = []
    for apart in (True, False):
        batch = _batch(small, apart=apart)
        for net, device, loss in ((ours, load.device, loss_of), (exact, torch.device("cpu"), exact.loss)):
            net.zero_grad()
            documents = Documents.at(batch.position_ids, device)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss(batch.input_ids.to(device), batch.labels.to(device), documents).backward()  # type: ignore[no-untyped-call]
        for mine, other in zip(ours.parameters(), exact.parameters(), strict=True):
            assert other.grad is not None
            grad = torch.zeros_like(other) if mine.grad is None else mine.grad.cpu()
            far.append((grad - other.grad).norm() / other.grad.norm())
    return float(torch.stack(far).max())  # NaN if one is NaN


def _peak_memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0


def _memory(device: torch.device) -> float:
    return float(torch.cuda.get_device_properties(device).total_memory) / 1e6 if device.type == "cuda" else 0.0


def _profile(device: torch.device, step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step by kernel; on a CPU by operation, without the operations it calls."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        step()
        _wait(device)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = "CUDA" if on_gpu else "CPU"  # without the launches
    return {
        event.key: getattr(event, field) / 1e3
        for event in seen.key_averages()
        if event.device_type.name == kernels and getattr(event, field) > 0
    }


def _group(name: str) -> str:
    lower = name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in lower for part in parts)), REST)


def _attention(name: str, times: dict[str, float]) -> Row:
    """The share of attention's time in fused kernels, and the longest kernels."""
    kernels = {key: spent for key, spent in times.items() if _group(key) == "attention"}
    spent = sum(kernels.values())
    fused = sum(spent for key, spent in kernels.items() if any(part in key.lower() for part in FUSED))
    longest = sorted(kernels, key=kernels.__getitem__, reverse=True)[:3]
    return reached(name, [fused / spent if spent else 0.0], "share", 0.99, "; ".join(key[:100] for key in longest))


def _decoding(name: str, model: CausalLM, rounds: int) -> Row:
    """Decoding speed with a captured CUDA graph against the same step launched kernel by kernel."""
    model.eval()
    device = model.model.embed_tokens.weight.device
    prompt = torch.randint(len(SPECIAL_TOKENS), model.config.vocab_size, (1, PROMPT), device=device)
    new = min(NEW, model.config.max_position_embeddings - PROMPT)
    speeds: dict[bool, list[float]] = {True: [], False: []}
    tokens: dict[bool, list[int]] = {}
    for captured in [True, False] * rounds:
        steady = SteadyDecoding(model, 1, PROMPT + new, captured=captured and device.type == "cuda")
        with torch.inference_mode():
            chosen = [steady(steady(prompt).argmax(1, keepdim=True)).argmax(1, keepdim=True)]  # captures

            def another() -> None:
                chosen.append(steady(chosen[-1]).argmax(1, keepdim=True))  # noqa: B023

            speeds[captured].append(1 / _timed(device, another, new - 1))
        tokens[captured] = torch.cat(chosen).flatten().tolist()
    same = sum(a == b for a, b in zip(tokens[True], tokens[False], strict=True))
    row = compared(name, speeds[True], speeds[False], "tokens/s", ask=1.0, most=False)
    why = f"{same} of {len(tokens[True])} tokens are equal without the graph; {row.why}"
    return replace(row, why=why)


def _where(name: str, times: dict[str, float]) -> Iterator[Row]:
    """The profile of a step: milliseconds of each group of kernels, over those of all groups."""
    whole = sum(times.values())
    for group in (*GROUPS, REST):
        inside = {key: spent for key, spent in times.items() if _group(key) == group}
        spent, longest = sum(inside.values()), max(inside, key=inside.__getitem__, default="")
        why = "no bound" + (f"; most of it in {longest[:100]}" if longest else "")
        share = round(spent / whole, 4) if whole else None
        yield Row(f"{name}: a step's {group}", round(spent, 3), round(whole, 3), share, "ms", 1.0, None, why)
