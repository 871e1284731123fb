"""Matrix multiplication of float32 on CPUs through oneDNN where it beats MKL.

torch uses MKL by default, which uses AVX-512 on Intel CPUs only. oneDNN uses AVX-512 on all CPUs that have it, and is
twice as fast on AMD CPUs.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def onednn_is_faster() -> bool:
    """Whether this CPU has AVX-512 and torch uses it; ATEN_CPU_CAPABILITY=avx2 switches it off."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_onednn and has_avx512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes_onednn(x: Tensor) -> bool:
    """Whether `matmul` of this tensor uses oneDNN, whose operator has no gradient in autograd or torch's compiler."""
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling() and onednn_is_faster()
    )


def matmul(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Matrix product `a @ b.T` [M, N] without a gradient.

    `a` may have more dimensions before its last, and `b` may be a transposed view. For few rows of `a` the product is
    computed as `(b @ a.T).T`, which is faster in both libraries; MKL is the faster one below 8 rows.
    """
    rows = a_MK.shape[:-1].numel()
    onednn = takes_onednn(a_MK)
    if a_MK.is_cuda or not 2 <= rows <= (64 if onednn else 32):
        return _onednn(a_MK, b_NK) if onednn else F.linear(a_MK, b_NK)
    rows_MK = a_MK.flatten(0, -2)
    turned_NM = _onednn(b_NK, rows_MK) if onednn and rows >= 8 else b_NK @ rows_MK.T
    return turned_NM.T.reshape(*a_MK.shape[:-1], -1)


def _onednn(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    if not (b_NK.is_contiguous() or b_NK.T.is_contiguous()):
        b_NK = b_NK.contiguous()  # a gap between rows makes it a hundred times slower
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")
    return out


def matmul_tn(a_NM: Tensor, b_NK: Tensor) -> Tensor:
    """Matrix product `a.T @ b` [M, K] without a gradient; it sums a weight's gradient over N tokens."""
    if not takes_onednn(a_NM):
        return a_NM.T @ b_NK
    # oneDNN wants the first operand contiguous along N: the smaller operand is the one to copy.
    if a_NM.shape[1] <= b_NK.shape[1]:
        return matmul(a_NM.T, b_NK.T)
    return matmul(b_NK.T, a_NM.T).T


class _Projection(torch.autograd.Function):
    """`matmul` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return matmul(x_ND, weight_ED)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        x_ND, weight_ED = ctx.saved_tensors
        (grad_NE,) = grads
        return matmul(grad_NE, weight_ED.T), matmul_tn(grad_NE.flatten(0, -2), x_ND.flatten(0, -2))


def project(x_BTD: Tensor, weight_ED: Tensor) -> Tensor:
    """Linear projection `x @ weight.T`, with a gradient where autograd records."""
    if not torch.is_grad_enabled():
        return matmul(x_BTD, weight_ED)
    if not takes_onednn(x_BTD):
        return F.linear(x_BTD, weight_ED)
    out: Tensor = _Projection.apply(x_BTD, weight_ED)  # type: ignore[no-untyped-call]
    return out
