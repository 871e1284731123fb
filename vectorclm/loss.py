"""Cross-entropy over a large vocabulary without ever holding all the logits."""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of a token that carries no loss
CHUNK = 1024  # tokens whose logits exist at one time


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are formed in the forward pass, chunk by chunk, while the chunk's logits are still there.

    Memory is CHUNK x V instead of N x V, and the logits are read once instead of three times.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if needs_gradient else None
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_gradient else None
        for start in range(0, hidden_ND.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
            kept_C = targets_C != IGNORE_INDEX
            index_C1 = targets_C.where(kept_C, 0).unsqueeze(1)
            logits_CV = (hidden_CD @ weight_VD.to(hidden_CD.dtype).T).to(total.dtype)
            lse_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            total += ((lse_C1 - logits_CV.gather(1, index_C1)).squeeze(1) * kept_C).sum()
            if grad_hidden_ND is None or grad_weight_VD is None:
                continue
            grad_CV = logits_CV.sub_(lse_C1).exp_()
            grad_CV.scatter_add_(1, index_C1, -torch.ones_like(lse_C1))
            grad_CV *= kept_C.unsqueeze(1)
            grad_CV = grad_CV.to(hidden_CD.dtype)
            grad_hidden_ND[rows] = grad_CV @ weight_VD.to(hidden_CD.dtype)
            grad_weight_VD.addmm_(grad_CV.T.to(weight_VD.dtype), hidden_CD.to(weight_VD.dtype))
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        (scale,) = grads
        return (
            grad_hidden_ND * scale.to(grad_hidden_ND.dtype),
            grad_weight_VD * scale.to(grad_weight_VD.dtype),
            None,
        )


def chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of the cross-entropy (nats) of `hidden @ weight.T` against `targets` [N]; IGNORE_INDEX carries none."""
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N)  # type: ignore[no-untyped-call]
    return loss
