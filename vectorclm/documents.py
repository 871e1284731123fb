"""Several documents in one window, each as if it stood alone: positions that restart, attention that stays inside.

Where they begin is read off the tokens: at BOS, after EOS (there also stands the rest of a document that is longer
than a window), and where padding begins. No text can forge these tokens.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vectorclm.attention import causal_attention
from vectorclm.loss import IGNORE_INDEX
from vectorclm.train_tokenizer import BOS_ID, EOS_ID, PAD_ID


class Documents(NamedTuple):
    """Where the documents of a batch of windows lie."""

    position_ids: Tensor  # int64 [B, T], 0 at the first token of each document
    cu_seqlens: Tensor  # int32 [N + 1], where each begins in the windows one after the other, and B * T

    @classmethod
    def at(cls, position_ids: Tensor | None, device: torch.device) -> "Documents | None":
        """The documents of `position_ids` [B, T], which lie in host memory, on `device`."""
        if position_ids is None:
            return None
        starts = (position_ids.flatten() == 0).nonzero().flatten()
        cu_seqlens = F.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
        return cls(position_ids.to(device, non_blocking=True), cu_seqlens.to(device, non_blocking=True))


def position_ids(input_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each token of the windows [B, T] in its document, or in the part of it that the window holds."""
    begins = input_ids == BOS_ID
    begins[:, 0] = True
    before, here = input_ids[:, :-1], input_ids[:, 1:]
    begins[:, 1:] |= (before == EOS_ID) | ((here == PAD_ID) & (before != PAD_ID))
    places = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def document_labels(input_ids: NDArray[np.int64], positions: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Labels [B, T], as transformers has them, for windows of text; IGNORE_INDEX where nothing is to be learnt.

    That is padding, and the rest of a long document after another's EOS, which nothing announces. Where documents
    are apart (`positions`), it is the first token of each of them; where they are not, EOS predicts the next BOS, as
    in GPT.
    """
    ignored = input_ids == PAD_ID
    ignored[:, 1:] |= (input_ids[:, :-1] == EOS_ID) & (input_ids[:, 1:] != BOS_ID)
    if positions is not None:
        ignored |= positions == 0
    return np.where(ignored, IGNORE_INDEX, input_ids)


def document_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, cu_seqlens: Tensor, dropout: float) -> Tensor:
    """Causal attention [B, H, T, E] inside each document: no query meets a key of another one.

    By FlashAttention's kernel for sequences of different lengths where the GPU has it, else document by document,
    which on a CPU takes less time than one causal attention over the whole window.
    """
    batch, heads, tokens, head_dim = q_BHTE.shape
    q_NHE, k_NKE, v_NKE = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
    if has_varlen(q_NHE) and not dropout:
        from torch.nn.attention.varlen import varlen_attn  # which imports torch's compiler

        y_NHE = varlen_attn(
            q_NHE, k_NKE, v_NKE, cu_seqlens, cu_seqlens, tokens, tokens, window_size=(-1, 0), enable_gqa=True
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


def has_varlen(x: Tensor) -> bool:
    """Whether FlashAttention takes this tensor: half precision on an Ampere GPU or later."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability() >= (8, 0)
