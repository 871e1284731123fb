"""The Muon optimizer: momentum, orthogonalised by Newton-Schulz iterations, for the hidden matrices."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vectorclm.nn.matmul import matmul, takes_onednn
from vectorclm.runtime.group import ALONE, Group

# Coefficients of the quintic iteration: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024
A, B, C = 3.4445, -4.7750, 2.0315


class WeightDecay(NamedTuple):
    """Decoupled weight decay of Muon."""

    rate: float  # per unit of learning rate
    cautious: bool = False  # decay only the weights that the update moves towards zero as well


def orthogonalise(g_NRC: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise each matrix U S Vᵀ in `g_NRC` [N, rows, columns] to about U Vᵀ, by Newton-Schulz iterations.

    A GPU computes all matrices at once, in bf16. A CPU computes one at a time, in its cache and in fp32. Most CPUs
    multiply bf16 in software, 10 to 20 times slower. On the others bf16 saves 5 % of a step, but the bits then depend
    on the number of ranks.
    """
    dtype = product_dtype(g_NRC)
    if g_NRC.is_cuda:
        return _newton_schulz(g_NRC.to(dtype), steps).to(g_NRC.dtype)
    return torch.stack([_newton_schulz(g_RC.to(dtype), steps) for g_RC in g_NRC]).to(g_NRC.dtype)


def product_dtype(g_NRC: Tensor) -> torch.dtype:
    """The type in which `orthogonalise` computes on the tensor's device."""
    return torch.bfloat16 if g_NRC.is_cuda else torch.float32


def _newton_schulz(x_RC: Tensor, steps: int) -> Tensor:
    """Orthogonalise a matrix [R, C], or several in one tensor [N, R, C]."""
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
    fused = torch.addmm if a.ndim == 2 else torch.baddbmm  # these round once, also to bf16
    return fused(x, a, b.mT, beta=beta, alpha=alpha)


class Muon(torch.optim.Optimizer):
    """Muon: momentum, orthogonalised (Jordan et al., 2024).

    Matrices of one shape go through Newton-Schulz together. Each rank of a node of `group` computes its share of them.
    `stacked` maps a parameter that holds several matrices to the number of rows of each. Each is orthogonalised alone.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: WeightDecay,
        group: Group = ALONE,
        stacked: Mapping[Tensor, list[int]] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay.rate})
        self.cautious = weight_decay.cautious
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
                momentum_NRC = torch.stack([momentum for _, momentum in pairs])
                update_NRC = self.group.node.divide(orthogonalise, momentum_NRC, product_dtype(momentum_NRC))
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
