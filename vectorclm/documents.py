"""Several documents in one window, each as if it stood alone: positions that restart, attention that stays inside.

Where they begin is read off the tokens: at BOS, after EOS (there also stands the rest of a document that is longer
than a window), and where padding begins. No text can forge these tokens.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.torch_version import TorchVersion

from vectorclm.attention import causal_attention
from vectorclm.loss import IGNORE_INDEX
from vectorclm.train_tokenizer import BOS_ID, EOS_ID, PAD_ID

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


def position_ids(input_ids: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The place of each token of the windows [B, T] in its document, or in the part of it that the window holds."""
    begins = input_ids == BOS_ID
    begins[:, 0] = True
    before, here = input_ids[:, :-1], input_ids[:, 1:]
    begins[:, 1:] |= (before == EOS_ID) | ((here == PAD_ID) & (before != PAD_ID))
    places = np.broadcast_to(np.arange(input_ids.shape[1], dtype=np.int32), input_ids.shape)
    return np.subtract(places, np.maximum.accumulate(places * begins, axis=1), dtype=np.int64)


def unlearnt(input_ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which tokens of windows of text [B, T] are never labels.

    That is padding, and the rest of a long document after another's EOS, which nothing announces.
    """
    tokens, length = input_ids.reshape(-1), input_ids.shape[1]  # flat: row after row takes twice as long
    found, other = np.empty((2, len(tokens)), np.bool_)
    np.equal(tokens[:-1], EOS_ID, out=found[1:])
    np.not_equal(tokens, BOS_ID, out=other)
    found &= other
    found[::length] = False  # before the first token of a window there is none
    np.equal(tokens, PAD_ID, out=other)
    found |= other
    return found.reshape(input_ids.shape)


def document_labels(input_ids: NDArray[np.integer[Any]], positions: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Labels [B, T], as transformers has them, for windows of text; IGNORE_INDEX where nothing is to be learnt.

    That is what is `unlearnt`, and where documents are apart (`positions`) the first token of each of them; where they
    are not, EOS predicts the next BOS, as in GPT.
    """
    ignored = unlearnt(input_ids)
    if positions is not None:
        ignored |= positions == 0
    labels = input_ids.astype(np.int64)
    labels[ignored] = IGNORE_INDEX
    return labels


class Visibility(NamedTuple):
    """Which keys a query sees: all up to its own position, or what one of these says.

    Queries are the last of the positions that the keys have, so that they continue what a cache holds.
    """

    documents: Documents | None = None  # only keys of the query's own document
    mask_B1TS: Tensor | None = None  # true where a key is seen; it decides alone


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


def has_flash(device: torch.device) -> bool:
    """Whether torch's FlashAttention runs here: on an Ampere GPU or a later one, in half precision."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
