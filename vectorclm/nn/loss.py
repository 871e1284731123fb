"""Chunked cross-entropy over a large vocabulary, without all logits in memory. Shape letters: model.py."""

from typing import Any

import torch
from torch import Tensor

from vectorclm.nn.matmul import matmul, matmul_tn, takes_onednn

IGNORE_INDEX = -100  # the label of a token that carries no loss
CHUNK = 256  # tokens in a chunk on a CPU: their logits fit its cache
GPU_CHUNK = 16_384  # tokens in a chunk on a GPU


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose forward pass also computes the gradients, one chunk of tokens at a time.

    Only one chunk's logits are in memory, and they stay in the CPU's cache.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        grad_weight_VD: Tensor | None = None
        weight_cast_VD = weight_VD.to(hidden_ND.dtype)
        weight_cast_DV = weight_cast_VD.T
        if takes_onednn(hidden_ND):  # oneDNN reads a contiguous weight a third faster, once a chunk
            weight_cast_DV = weight_cast_DV.contiguous()
        chunk = GPU_CHUNK if hidden_ND.is_cuda else CHUNK
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD, targets_C1 = hidden_ND[rows], targets_N[rows, None]
            kept_C1 = targets_C1 != IGNORE_INDEX
            index_C1 = targets_C1.where(kept_C1, 0)
            losses_C1, grad_CV = _scored(matmul(hidden_CD, weight_cast_VD), index_C1, total.dtype)
            # Not in place: torch 2.11's compiler loses the gradient of a tensor changed in place.
            total = total + (losses_C1 * kept_C1).sum()
            if grad_hidden_ND is None:
                continue
            grad_CV = grad_CV.to(hidden_CD.dtype)
            torch.mul(matmul(grad_CV, weight_cast_DV), kept_C1, out=grad_hidden_ND[rows])
            grad_here_VD = matmul_tn(grad_CV, hidden_CD * kept_C1)  # in half precision; the sum is in full precision
            grad_weight_VD = (
                grad_here_VD.to(weight_VD.dtype) if grad_weight_VD is None else grad_weight_VD.add_(grad_here_VD)
            )
            del grad_CV, grad_here_VD  # frees them before the next chunk's logits
        if grad_weight_VD is None:  # no tokens
            grad_weight_VD = torch.zeros_like(weight_VD) if needs_gradient else None
        ctx.gradients = grad_hidden_ND, grad_weight_VD
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        grad_hidden_ND, grad_weight_VD = ctx.gradients
        (scale,) = grads
        if torch.compiler.is_compiling():
            return grad_hidden_ND * scale, grad_weight_VD * scale, None
        del ctx.gradients  # scaled in place: a second backward must fail, and autograd need not copy them
        return grad_hidden_ND.mul_(scale), grad_weight_VD.mul_(scale), None


def _scored(logits_CV: Tensor, index_C1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cross-entropy [C, 1] of each row's target index, and its gradient [C, V] by the logits."""
    if torch.compiler.is_compiling():  # fuses this form into two passes, but would not fuse the scatter below
        logits_CV = logits_CV.to(dtype)
        log_sum_C1 = logits_CV.logsumexp(1, keepdim=True)
        hit_CV = index_C1 == torch.arange(logits_CV.shape[1], device=logits_CV.device)
        return log_sum_C1 - logits_CV.gather(1, index_C1), (logits_CV - log_sum_C1).exp() - hit_CV.to(dtype)
    p_CV = torch.softmax(logits_CV, dim=1, dtype=dtype)
    # p may underflow to 0, so log p comes from the normaliser: the largest logit less the log of the largest p.
    log_sum_C1 = logits_CV.amax(1, keepdim=True) - p_CV.amax(1, keepdim=True).log()
    losses_C1 = log_sum_C1 - logits_CV.gather(1, index_C1)
    return losses_C1, p_CV.scatter_add_(1, index_C1, -torch.ones_like(log_sum_C1))


def chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of the cross-entropies (nats) of the logits `hidden @ weight.T` for `targets` [N], without IGNORE_INDEX."""
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N)  # type: ignore[no-untyped-call]
    return loss
