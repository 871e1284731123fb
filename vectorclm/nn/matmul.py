"""Matrix multiplication of float32 on CPUs through oneDNN where it beats MKL.

torch uses MKL by default, which uses AVX-512 on Intel CPUs only. oneDNN uses AVX-512 on all CPUs that have it, and is
twice as fast on AMD CPUs. Shape letters: model.py.
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


def matmul(a_NI: Tensor, b_OI: Tensor) -> Tensor:
    """Matrix product `a @ b.T` [N, O] without a gradient.

    `a` may have more dimensions before its last, and `b` may be a transposed view. For few rows of `a` the product is
    computed as `(b @ a.T).T`, which is faster in both libraries; MKL is the faster one below 8 rows.
    """
    rows = a_NI.shape[:-1].numel()
    onednn = takes_onednn(a_NI)
    if a_NI.is_cuda or not 2 <= rows <= (64 if onednn else 32):
        return _onednn(a_NI, b_OI) if onednn else F.linear(a_NI, b_OI)
    rows_NI = a_NI.flatten(0, -2)
    turned_ON = _onednn(b_OI, rows_NI) if onednn and rows >= 8 else b_OI @ rows_NI.T
    return turned_ON.T.reshape(*a_NI.shape[:-1], -1)


def _onednn(a_NI: Tensor, b_OI: Tensor) -> Tensor:
    if not (b_OI.is_contiguous() or b_OI.T.is_contiguous()):
        b_OI = b_OI.contiguous()  # a gap between rows makes it a hundred times slower
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a_NI, b_OI, None, "none", [], "")
    return out


def matmul_tn(a_NO: Tensor, b_NI: Tensor) -> Tensor:
    """Matrix product `a.T @ b` [O, I] without a gradient; it sums a weight's gradient over N tokens."""
    if not takes_onednn(a_NO):
        return a_NO.T @ b_NI
    # oneDNN wants the first operand contiguous along N: the smaller operand is the one to copy.
    if a_NO.shape[1] <= b_NI.shape[1]:
        return matmul(a_NO.T, b_NI.T)
    return matmul(b_NI.T, a_NO.T).T


class _Projection(torch.autograd.Function):
    """`matmul` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return matmul(x_NI, weight_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        x_NI, weight_OI = ctx.saved_tensors
        (grad_NO,) = grads
        return matmul(grad_NO, weight_OI.T), matmul_tn(grad_NO.flatten(0, -2), x_NI.flatten(0, -2))


def project(x_BTI: Tensor, weight_OI: Tensor) -> Tensor:
    """Linear projection `x @ weight.T`, with a gradient where autograd records."""
    if not torch.is_grad_enabled():
        return matmul(x_BTI, weight_OI)
    if not takes_onednn(x_BTI):
        return F.linear(x_BTI, weight_OI)
    out: Tensor = _Projection.apply(x_BTI, weight_OI)  # type: ignore[no-untyped-call]
    return out
