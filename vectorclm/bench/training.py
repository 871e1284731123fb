"""`vectorclm bench train` and `bench optimizer`: training steps against transformers, Muon's step against torch.optim.

A step of n micro-batches is n forward and backward passes and one update. Both parts are timed on both sides. The
time of a step with any accumulation is computed from them, even where the step is too long for a bench.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vectorclm.bench.table import Row, Side, bounded, compared, in_turns, reached
from vectorclm.config import load_experiment
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig, hugging_face_config
from vectorclm.nn.matmul import matmul
from vectorclm.runtime.devices import Runtime
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

Parts = tuple[float, float]  # seconds of one micro-batch, and of one update


@dataclass(frozen=True)
class Size:
    """A model, its micro-batch and its bounds."""

    name: str
    config: ModelConfig
    windows: int  # in a micro-batch
    length: int  # tokens in a window
    accumulation: int  # micro-batches in a step of its experiment
    steps: int  # in a round
    faster: float  # bound on the speed over transformers with AdamW
    share: float  # bound on the share of the machine's matrix-product peak
    memory: float  # bound on the peak memory, MB

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.windows * self.length

    def speeds(self, rounds: list[Parts], accumulation: int) -> list[float]:
        """Tokens a second in each round, for steps of `accumulation` micro-batches."""
        return [accumulation * self.tokens / (accumulation * batch + update) for batch, update in rounds]


def model_sizes(*, large: bool) -> list[Size]:
    """The model of `small` and, with `large`, two models of 50 million parameters."""
    small, base = load_experiment("small")[0], load_experiment("base")[0]
    found = [Size("small", small.model, 8, 512, small.pretrain.batch_size // 8, 3, 1.2, 0.68, 1100)]
    if large:
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9}
        wide = base.model.model_copy(update=shape | {"num_key_value_heads": 3})
        batch = base.pretrain.batch_size
        found.append(Size("12 x 576", wide, 2, 1024, batch // 2, 1, 1.2, 0.80, 3000))
        found.append(Size("base", base.model, 2, 1024, batch // 2, 1, 1.2, 0.80, 3000))
    return found


def training(rounds: int, sizes: Sequence[Size]) -> Iterator[Row]:
    """Training speed with Muon against transformers with fused AdamW, the share of the peak, and peak memory."""
    for size in sizes:
        sides: dict[str, Side] = {
            "ours": (_ours, (size,)),
            "peer": (_transformers, (size,)),
            "products": (_products, ()),
        }
        found, memory = in_turns(rounds, sides)
        peak = max(found["products"])
        for accumulation in sorted({1, 4, size.accumulation}):
            own = ", its experiment's own" if accumulation == size.accumulation else ""
            name = f"{size.name}: training with Muon, accumulation {accumulation}{own}"
            ours, peer = (size.speeds(found[side], accumulation) for side in ("ours", "peer"))
            yield compared(name, ours, peer, "tokens/s", ask=size.faster, most=False)
        cost = size.config.flops_per_token(size.length)
        ours, peer = (
            [cost * x / peak for x in size.speeds(found[side], size.accumulation)] for side in ("ours", "peer")
        )
        note = (
            f"transformers {median(peer):.3f}; the peak is {peak / 1e9:.1f} GFLOP/s; Muon's products count as nothing"
        )
        yield reached(f"{size.name}: share of the matrix-product peak", ours, "share", size.share, note)
        note = f"transformers {memory['peer']:.0f} MB"
        yield bounded(f"{size.name}: peak memory", [memory["ours"]], "MB", size.memory, note)


def _products() -> Callable[[], float]:
    """Peak FLOP/s of a 2048 x 2048 matrix product: the best of eight by torch and eight by `matmul`."""
    Runtime().configure_torch()
    a, b = torch.randn(2, 2048, 2048)

    def once(multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
        began = time.perf_counter()
        multiply(a, b)
        return 2 * 2048**3 / (time.perf_counter() - began)

    return lambda: max(once(multiply) for multiply in (torch.mm, matmul) * 8)


def _ours(size: Size) -> Callable[[], Parts]:
    Runtime().configure_torch()
    torch.manual_seed(1)
    model = CausalLM(size.config)
    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=0.01, adamw_learning_rate=0.005))
    return _stepping(size, model, lambda ids: model.loss(ids, ids) / (ids.numel() - len(ids)), optimizers)


def _transformers(size: Size) -> Callable[[], Parts]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(Runtime().threads_each(1))  # our other settings are part of the measurement
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**hugging_face_config(size.config)))
    adamw = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    return _stepping(size, model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, [adamw])


def _stepping(size: Size, model: nn.Module, loss: Callable[[Tensor], Tensor], optimizers: Any) -> Callable[[], Parts]:
    """A function that trains on one batch and returns each part's median. The first step, the warm-up, runs here."""
    ids = torch.randint(5, size.config.vocab_size, (size.windows, size.length))
    model.train()

    def step() -> Parts:
        began = time.perf_counter()
        loss(ids).backward()  # type: ignore[no-untyped-call]
        done = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return done - began, time.perf_counter() - done

    def steps() -> Parts:
        batches, updates = zip(*(step() for _ in range(size.steps)), strict=True)
        return median(batches), median(updates)

    step()
    return steps


def optimizing(rounds: int, experiment: str = "base", layers: int = 2) -> Iterator[Row]:
    """Muon's step over some layers of an experiment's model against torch.optim.Muon; all layers are alike."""
    found, _ = in_turns(rounds, {name: (_muon, (name, experiment, layers)) for name in ("ours", "peer")})
    name = f"Muon's step, {layers} layers of {experiment}, against torch.optim.Muon"
    yield compared(name, [1 / x for x in found["ours"]], [1 / x for x in found["peer"]], "steps/s", ask=25, most=False)


def _muon(side: str, experiment: str, layers: int) -> Callable[[], float]:
    Runtime().configure_torch()
    torch.manual_seed(1)
    config = load_experiment(experiment)[0].model.model_copy(update={"num_hidden_layers": layers})
    model = CausalLM(config)
    if side == "ours":
        optimizer: torch.optim.Optimizer
        optimizer, _ = build_optimizers(model, OptimizerConfig(learning_rate=0.01, adamw_learning_rate=0.005))
    else:
        matrices = [nn.Parameter(w) for name, w in model.state_dict().items() if w.ndim == 2 and ".layers." in name]
        optimizer = torch.optim.Muon(matrices, 0.01, weight_decay=0.0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)

    def step() -> float:
        began = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - began

    if side == "ours":
        step()  # allocates the momenta; torch's first step is not slower
    return step
