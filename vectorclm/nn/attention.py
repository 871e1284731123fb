"""Grouped-query attention: over a window, inside its documents, and with a KV cache. Shape letters: model.py.

nn/attention_kinds.py has the kinds of attention and their settings. The causal kind has fast forms without a mask; the
other kinds run under a dense mask.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from vectorclm.nn.attention_kinds import ATTENTION_KINDS, AttentionConfig

# torch 2.11 has no such argument: its varlen_attn accepts fewer key heads than query heads without it.
VARLEN_GROUPED_HEADS: Any = {"enable_gqa": True} if TorchVersion(torch.__version__) >= "2.12" else {}


class Documents(NamedTuple):
    """The boundaries of the documents in a batch of windows."""

    position_ids: Tensor  # int64 [B, T], 0 at the first token of each document
    cu_seqlens: Tensor  # int32 [documents + 1], each document's start in the concatenated windows, then B * T
    flash: bool = False  # whether the device has FlashAttention; a compiled model cannot query the device

    @classmethod
    def at(cls, position_ids: Tensor | None, device: torch.device) -> "Documents | None":
        """The documents of `position_ids` [B, T] in host memory, copied to `device`."""
        if position_ids is None:
            return None
        starts = (position_ids.flatten() == 0).nonzero().flatten()
        cu_seqlens = F.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
        if device.type == "cuda":
            cu_seqlens = cu_seqlens.pin_memory()  # a copy of pageable memory waits for the device
        moved = cls(
            position_ids.to(device, non_blocking=True), cu_seqlens.to(device, non_blocking=True), has_flash(device)
        )
        if device.type == "cuda":
            from torch._dynamo import maybe_mark_dynamic  # its import takes seconds

            maybe_mark_dynamic(moved.cu_seqlens, 0)  # one compiled model for every number of documents
        return moved


class AttentionMask(NamedTuple):
    """The attention mask of a forward pass, as its inputs; `dense_mask` computes the mask of a layer from them.

    A query attends to the keys that the rule of the kind allows, in its own document, and where `given_B1TS` is true.
    Without position ids, keys have the positions from 0, and the queries are the last of the keys.
    """

    documents: Documents | None = None  # attention stays inside the query's own document
    given_B1TS: Tensor | None = None  # the caller's mask, true where a query may attend to a key, never to a later one
    position_ids_BT: Tensor | None = None  # of the queries
    key_position_ids_BS: Tensor | None = None  # of the keys; without them, the keys are the queries' tokens
    config: AttentionConfig = AttentionConfig()


def dense_mask(mask: AttentionMask, layer: int, tokens: int, keys: int, device: torch.device) -> Tensor:
    """The attention mask of a layer, true where a query attends to a key.

    Its shape is [T, S], or [B, 1, T, S] with position ids, documents or a mask of the caller.
    """
    documents = mask.documents
    query_positions = documents.position_ids if documents is not None else mask.position_ids_BT
    key_positions = query_positions if mask.key_position_ids_BS is None else mask.key_position_ids_BS
    if query_positions is None or key_positions is None:
        key_positions = torch.arange(keys, device=device)
        query_positions = key_positions[keys - tokens :]
    rule = ATTENTION_KINDS[mask.config.kind].mask_rule
    dense = rule(mask.config, layer, query_positions[..., :, None], key_positions[..., None, :])
    if documents is not None:
        document_BT = (documents.position_ids == 0).cumsum(1)
        dense = dense & (document_BT[:, :, None] == document_BT[:, None])
    dense = dense.unsqueeze(1) if dense.ndim == 3 else dense
    return dense if mask.given_B1TS is None else dense & mask.given_B1TS


def plain_attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: AttentionMask, layer: int) -> Tensor:
    """Plain reference of `attention`, without dropout: softmax of masked products, as in the papers."""
    dense = dense_mask(mask, layer, q_BHTE.shape[2], k_BKSE.shape[2], q_BHTE.device)
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHSE, v_BHSE = k_BKSE.repeat_interleave(groups, 1), v_BKSE.repeat_interleave(groups, 1)
    scores_BHTS = q_BHTE @ k_BHSE.mT / q_BHTE.shape[-1] ** 0.5
    out: Tensor = scores_BHTS.masked_fill(~dense, -torch.inf).softmax(-1) @ v_BHSE
    return out


class LeftPadded(NamedTuple):
    """Positions and attention mask of the newest tokens in rows that are padded at the left."""

    position_ids_BT: Tensor  # of the queries; 0 for padding
    key_position_ids_BS: Tensor  # of the keys; 0 for padding
    mask_BTS: Tensor  # true where a query may attend to a key


def left_padded(padding_B: Tensor, tokens: int, keys: int) -> LeftPadded:
    """Position ids and causal mask for left-padded prompts: of the last `tokens` of `keys` tokens in each row.

    `padding_B` is the number of padding tokens at the beginning of each row.
    """
    key_S = torch.arange(keys, device=padding_B.device)
    query_T, is_text_BS = key_S[-tokens:], key_S >= padding_B[:, None]
    mask_BTS = (query_T[:, None] >= key_S) & is_text_BS[:, None]
    mask_BTS |= query_T[:, None] == key_S  # padding attends to itself: a row without keys gives NaN
    position_ids_BS = (key_S - padding_B[:, None]).clamp(min=0)
    return LeftPadded(position_ids_BS[:, -tokens:], position_ids_BS, mask_BTS)


def has_flash(device: torch.device) -> bool:
    """Whether the device runs torch's FlashAttention: an Ampere GPU or a later one, in half precision."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


QUERY_BLOCK = 128  # queries in one call of the kernel on a CPU


def causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, dropout: float) -> Tensor:
    """Causal attention [B, H, T, E]: each query attends to the keys up to its own position.

    torch's CPU kernel computes keys in blocks of 512, masked ones included. On a CPU each block of queries therefore
    gets only its visible keys. The kernel needs four dimensions: for three, torch stores all attention weights.
    """
    if q_BHTE.is_cuda:
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, dropout_p=dropout, is_causal=True, enable_gqa=q_BHTE.shape[1] != k_BKTE.shape[1]
        )
    tokens = q_BHTE.shape[2]
    parts = []
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        size = end - start
        mask = q_BHTE.new_full((size, size), -torch.inf).triu_(1) if start else None
        parts.append(
            F.scaled_dot_product_attention(
                q_BHTE[:, :, start:end],
                k_BKTE[:, :, :end],
                v_BKTE[:, :, :end],
                attn_mask=None if mask is None else F.pad(mask, (start, 0)),
                dropout_p=dropout,
                is_causal=mask is None,
                enable_gqa=True,
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1).transpose(1, 2)  # contiguous by token, as the projection reads it


def attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: AttentionMask, layer: int, dropout: float
) -> Tensor:
    """Grouped-query attention [B, H, T, E] (Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245).

    Each key head serves H / K query heads. `layer` is the number of the decoder layer, from 0, for kinds of attention
    that differ between layers. `dropout` is the probability of dropping an attention weight.
    """
    tokens, keys, dense = q_BHTE.shape[2], k_BKSE.shape[2], mask.given_B1TS
    if not ATTENTION_KINDS[mask.config.kind].is_causal:
        dense = dense_mask(mask, layer, tokens, keys, q_BHTE.device)
    elif mask.documents is not None:
        return document_attention(q_BHTE, k_BKSE, v_BKSE, mask.documents, dropout)
    elif dense is None and 1 < tokens == keys:
        return causal_attention(q_BHTE, k_BKSE, v_BKSE, dropout)
    elif dense is None and tokens > 1:
        dense = q_BHTE.new_ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    if grouped and tokens == 1 and not q_BHTE.is_cuda:
        # The heads of a group stand where queries of several positions would: torch's CPU kernel then copies no keys.
        q_BKGE = q_BHTE.reshape(len(q_BHTE), k_BKSE.shape[1], -1, q_BHTE.shape[-1])
        return F.scaled_dot_product_attention(q_BKGE, k_BKSE, v_BKSE, attn_mask=dense, dropout_p=dropout).view_as(
            q_BHTE
        )
    return F.scaled_dot_product_attention(
        q_BHTE, k_BKSE, v_BKSE, attn_mask=dense, dropout_p=dropout, enable_gqa=grouped
    )


def document_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, documents: Documents, dropout: float) -> Tensor:
    """Causal attention [B, H, T, E] inside each document: no query attends to a key of another document.

    A GPU with FlashAttention uses its kernel for sequences of different lengths. Other devices compute one document at
    a time, which on a CPU takes less time than causal attention over the whole window.
    """
    batch, heads, tokens, head_dim = q_BHTE.shape
    q_NHE, k_NKE, v_NKE = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
    cu_seqlens = documents.cu_seqlens
    if documents.flash and q_NHE.dtype in (torch.bfloat16, torch.float16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn  # its import loads torch's compiler

        y_NHE = varlen_attn(
            q_NHE, k_NKE, v_NKE, cu_seqlens, cu_seqlens, tokens, tokens, window_size=(-1, 0), **VARLEN_GROUPED_HEADS
        )
        assert isinstance(y_NHE, Tensor)
    else:
        sizes = cu_seqlens.diff().tolist()
        parts = [
            causal_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], dropout)[0]
            for q, k, v in zip(*(torch.split(x, sizes) for x in (q_NHE, k_NKE, v_NKE)), strict=True)
        ]
        y_NHE = torch.cat(parts, dim=1).transpose(0, 1)
    return y_NHE.reshape(batch, tokens, heads, head_dim).transpose(1, 2)
