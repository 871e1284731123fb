"""Muon for the hidden matrices, AdamW for the rest, and the learning rate over the steps."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vectorclm.nn.layers import StackedLinear
from vectorclm.nn.matmul import matmul, takes_onednn
from vectorclm.runtime.distributed import ALONE, Group
from vectorclm.settings import Settings

# Coefficients of the quintic iteration: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024
A, B, C = 3.4445, -4.7750, 2.0315


class OptimizerConfig(Settings):
    """Muon on the hidden matrices, AdamW on embeddings and norms.

    A setting that older experiments lack stays out of their fingerprints where it changes nothing.
    """

    learning_rate: float = Field(gt=0, description="Peak learning rate of Muon")
    adamw_learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW")
    matrices: Literal["muon", "adamw"] = Field(
        "muon",
        exclude_if=lambda value: value == "muon",
        description="What trains the hidden matrices; adamw does so at learning_rate, too",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Nesterov momentum of Muon")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled decay of the hidden matrices, per unit of learning rate"
    )
    cautious_weight_decay: bool = Field(
        False,
        exclude_if=lambda value: not value,
        description="Decay only what the update, too, moves towards zero; Muon only",
    )

    @model_validator(mode="after")
    def _muon_is_cautious(self) -> Self:
        if self.cautious_weight_decay and self.matrices != "muon":
            raise ValueError("cautious_weight_decay needs matrices = 'muon'")
        return self


class ScheduleConfig(Settings):
    """The learning rate's factor over the steps: linear warm-up, then down to the floor."""

    kind: Literal["cosine", "warmup_stable_decay"] = "cosine"
    warmup: float = Field(0.02, ge=0, lt=1, description="Share of the steps spent warming up")
    floor: float = Field(0.1, ge=0, le=1, description="The last step's share of the peak")
    decay: float = Field(0.2, gt=0, le=1, description="Share of the steps spent decaying; warmup_stable_decay only")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.kind == "warmup_stable_decay" and self.warmup + self.decay > 1 + 1e-9:
            raise ValueError(f"warmup ({self.warmup}) and decay ({self.decay}) are more than all steps: lower one")
        return self


def schedule(config: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate's factor in step `step` (from 0) of `steps`: a pure function, so resuming needs no state.

    Cosine: Loshchilov & Hutter, arXiv 1608.03983, without restarts. Warmup-stable-decay: Hu et al.,
    arXiv 2404.06395, section 4, with a linear decay.
    """
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay = max(1, round(config.decay * steps))
    left = min(1.0, (steps - 1 - step) / decay)
    return config.floor + (1 - config.floor) * left


def orthogonalise(g_NRC: Tensor, steps: int = 5) -> Tensor:
    """Roughly U Vᵀ of each matrix in `g_NRC` [N, rows, columns], by Newton-Schulz.

    On GPUs all at once in bf16; on CPUs one by one, in the cache, and in fp32: most multiply bf16 by software, 10 to 20
    times slower, and where they do not, half a tenth of a step is not worth other bits for one rank than for two.
    """
    if g_NRC.is_cuda:
        return _newton_schulz(g_NRC.bfloat16(), steps).to(g_NRC.dtype)
    return torch.stack([_newton_schulz(g_RC.float(), steps) for g_RC in g_NRC]).to(g_NRC.dtype)


def _newton_schulz(x_RC: Tensor, steps: int) -> Tensor:
    """Of a matrix, or of several in one tensor."""
    tall = x_RC.shape[-2] > x_RC.shape[-1]
    if tall:
        x_RC = x_RC.mT
    x_RC = (x_RC / (x_RC.norm(dim=(-2, -1), keepdim=True) + 1e-7)).contiguous()
    for _ in range(steps):
        gram_RR = matmul(x_RC, x_RC) if takes_onednn(x_RC) else x_RC @ x_RC.mT
        poly_RR = _plus_product(gram_RR, B, gram_RR, gram_RR, C)  # a Gram matrix is its own transpose
        x_RC = _plus_product(x_RC, A, poly_RR, x_RC.mT, 1.0)
    return x_RC.mT if tall else x_RC


def _plus_product(x: Tensor, beta: float, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """`beta * x + alpha * a @ b.T`."""
    if takes_onednn(a):
        return matmul(a, b).mul_(alpha).add_(x, alpha=beta)
    fused = torch.addmm if a.ndim == 2 else torch.baddbmm  # which round once, a bf16 result too
    return fused(x, a, b.mT, beta=beta, alpha=alpha)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024).

    Matrices of one shape go through Newton-Schulz together, each rank of `group` taking its share of them. A parameter
    in `stacked` is several matrices, of so many rows each, and each is orthogonalised on its own.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        group: Group = ALONE,
        stacked: Mapping[Tensor, list[int]] | None = None,
        cautious: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.cautious = cautious
        self.group = group
        self.stacked = stacked or {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    parts = self.stacked.get(p, [len(p)])
                    momentum = self._nesterov(p, group["momentum"])
                    for matrix, part in zip(torch.split(p, parts), torch.split(momentum, parts), strict=True):
                        shapes[tuple(matrix.shape)].append((matrix, part))
            for (rows, columns), pairs in shapes.items():
                matrices = [matrix for matrix, _ in pairs]
                update_NRC = self.group.divide(orthogonalise, torch.stack([momentum for _, momentum in pairs]))
                step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
                updates = list(update_NRC.unbind())
                if self.cautious:  # Chen et al., arXiv 2510.12402, algorithm 1
                    decayed = [
                        matrix * (matrix * update >= 0) for matrix, update in zip(matrices, updates, strict=True)
                    ]
                    torch._foreach_add_(matrices, decayed, alpha=-group["lr"] * group["weight_decay"])
                else:
                    torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates, alpha=-step_size)

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, group: Group = ALONE
) -> tuple[torch.optim.Optimizer, torch.optim.AdamW]:
    """Muon (or AdamW) over the decoder layers' matrices, AdamW over embeddings and norms."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (hidden if p.ndim == 2 and ".layers." in name else rest).append(p)

    def adamw(params: list[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(params, learning_rate, betas, eps=1e-10, weight_decay=weight_decay, fused=True)

    others = adamw(rest, config.adamw_learning_rate, 0.0)
    if config.matrices == "adamw":
        return adamw(hidden, config.learning_rate, config.weight_decay), others
    stacked = {m.weight: list(m.rows.values()) for m in model.modules() if isinstance(m, StackedLinear)}
    settings = (config.learning_rate, config.momentum, config.weight_decay)
    return Muon(hidden, *settings, group, stacked, config.cautious_weight_decay), others


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * factor
