"""Causal attention from the first token on; shape letters as in model.py."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

GROUPED: Any = (
    {"enable_gqa": True} if TorchVersion(torch.__version__) >= "2.12" else {}
)  # 2.11 does so without being told


class Documents(NamedTuple):
    """Where the documents of a batch of windows lie."""

    position_ids: Tensor  # int64 [B, T], 0 at the first token of each document
    cu_seqlens: Tensor  # int32 [N + 1], where each begins in the windows one after the other, and B * T
    flash: bool = False  # whether the device has FlashAttention; asked here, as a compiled model cannot ask

    @classmethod
    def at(cls, position_ids: Tensor | None, device: torch.device) -> "Documents | None":
        """The documents of `position_ids` [B, T], which lie in host memory, on `device`."""
        if position_ids is None:
            return None
        starts = (position_ids.flatten() == 0).nonzero().flatten()
        cu_seqlens = F.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
        if device.type == "cuda":
            cu_seqlens = cu_seqlens.pin_memory()  # the copy of other memory waits for the device
        moved = cls(
            position_ids.to(device, non_blocking=True), cu_seqlens.to(device, non_blocking=True), has_flash(device)
        )
        if device.type == "cuda":
            from torch._dynamo import maybe_mark_dynamic  # which takes seconds to import

            maybe_mark_dynamic(moved.cu_seqlens, 0)  # one compiled model for every number of documents
        return moved


class Visibility(NamedTuple):
    """Which keys a query sees: all up to its own position, or what one of these says.

    Queries are the last of the positions that the keys have, so that they continue what a cache holds.
    """

    documents: Documents | None = None  # only keys of the query's own document
    mask_B1TS: Tensor | None = None  # true where a key is seen; it decides alone


def plain_attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, visible: Visibility) -> Tensor:
    """`attention` without dropout, as it is written in the papers: softmax of masked products."""
    tokens, keys = q_BHTE.shape[2], k_BKSE.shape[2]
    key_S = torch.arange(keys, device=q_BHTE.device)
    query_T = key_S[keys - tokens :]
    mask = key_S <= query_T[:, None]
    if visible.documents is not None:
        document_BT = (visible.documents.position_ids == 0).cumsum(1)
        mask = (mask & (document_BT[:, :, None] == document_BT[:, None])).unsqueeze(1)
    if visible.mask_B1TS is not None:
        mask = visible.mask_B1TS
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHSE, v_BHSE = k_BKSE.repeat_interleave(groups, 1), v_BKSE.repeat_interleave(groups, 1)
    scores_BHTS = q_BHTE @ k_BHSE.mT / q_BHTE.shape[-1] ** 0.5
    out: Tensor = scores_BHTS.masked_fill(~mask, -torch.inf).softmax(-1) @ v_BHSE
    return out


def padded_visibility(padding_B: Tensor, tokens: int, keys: int) -> tuple[Tensor, Tensor]:
    """Positions [B, T] and mask [B, T, S] of the last `tokens` of `keys`, where rows begin with so much padding."""
    key_S = torch.arange(keys, device=padding_B.device)
    query_T, is_text_BS = key_S[-tokens:], key_S >= padding_B[:, None]
    mask_BTS = (query_T[:, None] >= key_S) & is_text_BS[:, None]
    mask_BTS |= query_T[:, None] == key_S  # padding sees itself: a row that saw nothing would be no numbers
    return (query_T - padding_B[:, None]).clamp(min=0), mask_BTS


def has_flash(device: torch.device) -> bool:
    """Whether torch's FlashAttention runs here: on an Ampere GPU or a later one, in half precision."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


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


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, visible: Visibility, dropout: float) -> Tensor:
    """Grouped-query attention [B, H, T, E] (Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245).

    Each key head serves H / K query heads. `dropout` is the share of attention weights left out.
    """
    tokens, keys, mask = q_BHTE.shape[2], k_BKSE.shape[2], visible.mask_B1TS
    if visible.documents is not None:
        return document_attention(q_BHTE, k_BKSE, v_BKSE, visible.documents, dropout)
    if mask is None and 1 < tokens == keys:
        return causal_attention(q_BHTE, k_BKSE, v_BKSE, dropout)
    if mask is None and tokens > 1:
        mask = q_BHTE.new_ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)


def document_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, documents: Documents, dropout: float) -> Tensor:
    """Causal attention [B, H, T, E] inside each document: no query meets a key of another one.

    By FlashAttention's kernel for sequences of different lengths where the GPU has it, else document by document,
    which on a CPU takes less time than one causal attention over the whole window.
    """
    batch, heads, tokens, head_dim = q_BHTE.shape
    q_NHE, k_NKE, v_NKE = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
    cu_seqlens = documents.cu_seqlens
    if documents.flash and q_NHE.dtype in (torch.bfloat16, torch.float16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn  # which imports torch's compiler

        y_NHE = varlen_attn(q_NHE, k_NKE, v_NKE, cu_seqlens, cu_seqlens, tokens, tokens, window_size=(-1, 0), **GROUPED)
        assert isinstance(y_NHE, Tensor)
    else:
        sizes = cu_seqlens.diff().tolist()
        parts = [
            causal_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], dropout)[0]
            for q, k, v in zip(*(torch.split(x, sizes) for x in (q_NHE, k_NKE, v_NKE)), strict=True)
        ]
        y_NHE = torch.cat(parts, dim=1).transpose(0, 1)
    return y_NHE.reshape(batch, tokens, heads, head_dim).transpose(1, 2)
