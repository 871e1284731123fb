"""Causal attention from the first token on; shape letters as in model.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries of one call on a CPU


def causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, dropout: float) -> Tensor:
    """Attention [B, H, T, E] where each query sees the keys up to its own place.

    torch's kernel for CPUs takes keys 512 at a time, also those that no query sees; so there each block of queries is
    given the keys it sees. Four dimensions are what that kernel wants: of three, torch holds all the weights.
    """
    if q_BHTE.is_cuda:
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, dropout_p=dropout, is_causal=True, enable_gqa=q_BHTE.shape[1] != k_BKTE.shape[1]
        )
    tokens = q_BHTE.shape[2]
    parts = []
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        size = end - start
        unseen = q_BHTE.new_full((size, size), -torch.inf).triu_(1) if start else None
        parts.append(
            F.scaled_dot_product_attention(
                q_BHTE[:, :, start:end],
                k_BKTE[:, :, :end],
                v_BKTE[:, :, :end],
                attn_mask=None if unseen is None else F.pad(unseen, (start, 0)),
                dropout_p=dropout,
                is_causal=unseen is None,
                enable_gqa=True,
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1).transpose(1, 2)  # token by token, as the projection reads it
