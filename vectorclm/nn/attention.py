"""Grouped-query attention: over a window, inside its documents, and with a cache. Shape letters: model.py.

A variant of attention is a kind, its row in ATTENTION, and its settings in AttentionConfig. Without a fast form of its
own, a variant runs under a mask.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.torch_version import TorchVersion

from vectorclm.settings import Settings

# torch 2.11 groups heads without this argument.
GROUPED: Any = {"enable_gqa": True} if TorchVersion(torch.__version__) >= "2.12" else {}


class Documents(NamedTuple):
    """The boundaries of the documents in a batch of windows."""

    position_ids: Tensor  # int64 [B, T], 0 at the first token of each document
    cu_seqlens: Tensor  # int32 [N + 1], each document's start in the concatenated windows, then B * T
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


AttentionKind = Literal["causal"]


class AttentionConfig(Settings):
    """The kind of attention, and the settings of each kind that has some."""

    kind: AttentionKind = Field("causal", description="Which keys a query attends to")


@dataclass(frozen=True)
class AttentionVariant:
    """One row of the table: the keys that a query attends to, and the variant's names in other programs."""

    # Whether queries attend to keys, from the config, the queries' positions [..., T, 1] and the keys' [..., 1, S].
    attends: Callable[[AttentionConfig, Tensor, Tensor], Tensor]
    model_type: str  # in config.json; where transformers lacks the variant, a name that transformers refuses
    architecture: str  # transformers' class of the model
    gguf: str | None  # llama.cpp's name of the architecture; None where llama.cpp lacks the variant
    names: Mapping[str, str] = field(default_factory=dict)  # settings of AttentionConfig, and their keys in config.json


def _causal(config: AttentionConfig, query_T1: Tensor, key_1S: Tensor) -> Tensor:
    return key_1S <= query_T1


ATTENTION: Mapping[AttentionKind, AttentionVariant] = {
    "causal": AttentionVariant(_causal, "llama", "LlamaForCausalLM", "llama"),
}


class Visibility(NamedTuple):
    """The keys that each query attends to: those of the variant, in its own document, where the mask is true.

    The queries are the last of the keys, so they continue a cache. Without position ids, positions start at 0.
    """

    documents: Documents | None = None  # attention stays inside the query's own document
    mask_B1TS: Tensor | None = None  # true where a query attends to a key; contains causality
    position_ids_BT: Tensor | None = None  # of the queries
    is_cached: bool = False  # whether the keys are those of a cache, at consecutive positions
    config: AttentionConfig = AttentionConfig()


def attends(visible: Visibility, tokens: int, keys: int, device: torch.device) -> Tensor:
    """True where a query attends to a key: [T, S], or [B, 1, T, S] with position ids, documents or a mask."""
    documents, positions_BT = visible.documents, visible.position_ids_BT
    positions = torch.arange(keys, device=device)
    if documents is not None:
        positions = documents.position_ids
    elif positions_BT is not None:
        positions = positions + positions_BT[:, -1:] - keys + 1 if visible.is_cached else positions_BT
    query, key = positions[..., keys - tokens :, None], positions[..., None, :]
    mask = ATTENTION[visible.config.kind].attends(visible.config, query, key)
    if documents is not None:
        document_BT = (documents.position_ids == 0).cumsum(1)
        mask = mask & (document_BT[:, :, None] == document_BT[:, None])
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    return mask if visible.mask_B1TS is None else mask & visible.mask_B1TS


def plain_attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, visible: Visibility) -> Tensor:
    """Plain reference of `attention`, without dropout: softmax of masked products, as in the papers."""
    mask = attends(visible, q_BHTE.shape[2], k_BKSE.shape[2], q_BHTE.device)
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHSE, v_BHSE = k_BKSE.repeat_interleave(groups, 1), v_BKSE.repeat_interleave(groups, 1)
    scores_BHTS = q_BHTE @ k_BHSE.mT / q_BHTE.shape[-1] ** 0.5
    out: Tensor = scores_BHTS.masked_fill(~mask, -torch.inf).softmax(-1) @ v_BHSE
    return out


def padded_visibility(padding_B: Tensor, tokens: int, keys: int) -> tuple[Tensor, Tensor]:
    """Position ids [B, T] and attention mask [B, T, S] of the last `tokens` of `keys` positions in left-padded rows.

    `padding_B` is the number of padding tokens at the beginning of each row.
    """
    key_S = torch.arange(keys, device=padding_B.device)
    query_T, is_text_BS = key_S[-tokens:], key_S >= padding_B[:, None]
    mask_BTS = (query_T[:, None] >= key_S) & is_text_BS[:, None]
    mask_BTS |= query_T[:, None] == key_S  # padding attends to itself: a row without keys gives NaN
    return (query_T - padding_B[:, None]).clamp(min=0), mask_BTS


def has_flash(device: torch.device) -> bool:
    """Whether the device runs torch's FlashAttention: an Ampere GPU or a later one, in half precision."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


BLOCK = 128  # queries in one call on a CPU


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
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
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


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, visible: Visibility, dropout: float) -> Tensor:
    """Grouped-query attention [B, H, T, E] (Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245).

    Each key head serves H / K query heads. `dropout` is the probability of dropping an attention weight.
    """
    tokens, keys, mask = q_BHTE.shape[2], k_BKSE.shape[2], visible.mask_B1TS
    if ATTENTION[visible.config.kind].attends is not _causal:
        mask = attends(visible, tokens, keys, q_BHTE.device)
    elif visible.documents is not None:
        return document_attention(q_BHTE, k_BKSE, v_BKSE, visible.documents, dropout)
    elif mask is None and 1 < tokens == keys:
        return causal_attention(q_BHTE, k_BKSE, v_BKSE, dropout)
    elif mask is None and tokens > 1:
        mask = q_BHTE.new_ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)


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
