"""Cross-entropy over a large vocabulary without ever holding all the logits."""

from typing import Any

import torch
from torch import Tensor

from vectorclm.nn.matmul import matmul, matmul_tn, takes_onednn

IGNORE_INDEX = -100  # the label of a token that carries no loss
CHUNK = 256  # tokens whose logits exist at one time on a CPU: few enough for its cache
GPU_CHUNK = 16_384


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are formed in the forward pass, chunk by chunk, while the chunk's logits are still there.

    Memory is a chunk's logits instead of all, and they stay in the cache while they are passed over.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        grad_weight_VD: Tensor | None = None
        weight_cast_VD = weight_VD.to(hidden_ND.dtype)
        weight_cast_DV = weight_cast_VD.T
        if takes_onednn(hidden_ND):  # which reads it a third faster so, many times
            weight_cast_DV = weight_cast_DV.contiguous()
        chunk = GPU_CHUNK if hidden_ND.is_cuda else CHUNK
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD, targets_C1 = hidden_ND[rows], targets_N[rows, None]
            kept_C1 = targets_C1 != IGNORE_INDEX
            index_C1 = targets_C1.where(kept_C1, 0)
            losses_C1, grad_CV = _scored(matmul(hidden_CD, weight_cast_VD), index_C1, total.dtype)
            # Not in place: of a tensor that was changed, torch 2.11's compiler passes no gradient on.
            total = total + (losses_C1 * kept_C1).sum()
            if grad_hidden_ND is None:
                continue
            grad_CV = grad_CV.to(hidden_CD.dtype)
            torch.mul(matmul(grad_CV, weight_cast_DV), kept_C1, out=grad_hidden_ND[rows])
            grad_here_VD = matmul_tn(grad_CV, hidden_CD * kept_C1)  # in half precision; their sum in full
            grad_weight_VD = (
                grad_here_VD.to(weight_VD.dtype) if grad_weight_VD is None else grad_weight_VD.add_(grad_here_VD)
            )
            del grad_CV, grad_here_VD  # before the next chunk's logits
        if grad_weight_VD is None:  # of no token at all
            grad_weight_VD = torch.zeros_like(weight_VD) if needs_gradient else None
        ctx.gradients = grad_hidden_ND, grad_weight_VD
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        grad_hidden_ND, grad_weight_VD = ctx.gradients
        (scale,) = grads
        if torch.compiler.is_compiling():
            return grad_hidden_ND * scale, grad_weight_VD * scale, None
        del ctx.gradients  # scaled in place, so there is no second time; and held by nobody else, they are not copied
        return grad_hidden_ND.mul_(scale), grad_weight_VD.mul_(scale), None


def _scored(logits_CV: Tensor, index_C1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cross-entropy [C, 1] of each row's index, and its gradient [C, V]."""
    if torch.compiler.is_compiling():  # which makes two passes of all this, and fuses no scatter with what is before
        logits_CV = logits_CV.to(dtype)
        log_sum_C1 = logits_CV.logsumexp(1, keepdim=True)
        hit_CV = index_C1 == torch.arange(logits_CV.shape[1], device=logits_CV.device)
        return log_sum_C1 - logits_CV.gather(1, index_C1), (logits_CV - log_sum_C1).exp() - hit_CV.to(dtype)
    p_CV = torch.softmax(logits_CV, dim=1, dtype=dtype)
    # log p, where p itself may be 0: the likeliest token's logit less its log p normalises every other's too
    log_sum_C1 = logits_CV.amax(1, keepdim=True) - p_CV.amax(1, keepdim=True).log()
    losses_C1 = log_sum_C1 - logits_CV.gather(1, index_C1)
    return losses_C1, p_CV.scatter_add_(1, index_C1, -torch.ones_like(log_sum_C1))


def chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of the cross-entropy (nats) of `hidden @ weight.T` against `targets` [N]; IGNORE_INDEX carries none."""
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N)  # type: ignore[no-untyped-call]
    return loss
