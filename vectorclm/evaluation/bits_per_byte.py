"""Bits per byte of text: of windows of shards, or of any text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.dataset import to_batch
from vectorclm.errors import DataError
from vectorclm.evaluation.item_scores import ItemScores
from vectorclm.inference.model_slices import by_model
from vectorclm.model import CausalLM
from vectorclm.nn.attention import Documents
from vectorclm.nn.loss import IGNORE_INDEX
from vectorclm.runtime.group import ALONE, Group
from vectorclm.runtime.progress import Progress
from vectorclm.shards.reader import ShardReader
from vectorclm.shards.writer import Windows
from vectorclm.tokenizer import BOS_ID, encode


def logits(model: CausalLM, hidden_ND: Tensor, targets_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of hidden states with their targets, in chunks of 2,048 rows."""
    dtype = model.model.embed_tokens.weight.dtype
    for hidden_CD, targets_C in zip(torch.split(hidden_ND, 2048), torch.split(targets_N, 2048), strict=True):
        yield model.logits(hidden_CD.to(dtype)).float(), targets_C


@torch.inference_mode()
def token_losses(model: CausalLM, input_ids: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
    """Loss of each target [B, T] in nats; the target is the token after each input, and IGNORE_INDEX costs 0.

    Logits are computed only where there is a target.
    """
    device = input_ids.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        hidden_BTD = model.model(input_ids, documents=documents)
    kept_BT = targets != IGNORE_INDEX
    losses_BT = torch.zeros(targets.shape, device=device)
    losses_BT[kept_BT] = _nats(model, hidden_BTD[kept_BT], targets[kept_BT])
    return losses_BT


def _nats(model: CausalLM, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of each target."""
    return torch.cat([F.cross_entropy(*part, reduction="none") for part in logits(model, hidden_ND, targets_N)])


class HeldOutWindows(NamedTuple):
    """Windows of held-out tokens, source by source."""

    sources: Mapping[str, ShardReader]
    token_lengths: Sequence[int]  # bytes of text that each token stands for
    document_mask: bool = False  # whether a token sees only the tokens of its own document


class WindowSums(NamedTuple):
    """The loss of some windows, summed up; sums of parts can be added."""

    nats: float
    tokens: float
    text_nats: float  # of tokens that stand for text
    bytes: float


def windows_scores(
    model: CausalLM, held_out: HeldOutWindows, micro_batch: int, limit: int = 0, found: ItemScores | None = None
) -> dict[str, dict[str, float]]:
    """Loss (nats per token) and bits per byte of text on the first `limit` windows of each source; 0 = all windows.

    The score of each window is added to `found`.
    """
    sums = sum_windows(model, held_out, micro_batch, limit, found)
    return {label: scores_of(each) for label, each in sums.items()}


def scores_of(sums: WindowSums) -> dict[str, float]:
    """Loss (nats per token) and bits per byte of text.

    Bits per byte compare across tokenizers, losses do not. Special tokens stand for no text and count in the loss
    alone.
    """
    loss, text = sums.nats / max(1, sums.tokens), sums.text_nats / math.log(2) / max(1, sums.bytes)
    return {"loss": loss, "bits_per_byte": text}


def sum_windows(
    model: CausalLM,
    held_out: HeldOutWindows,
    micro_batch: int,
    limit: int = 0,
    found: ItemScores | None = None,
    group: Group = ALONE,
) -> dict[str, WindowSums]:
    """Sum up the loss of this rank's share of the first `limit` windows of each source; 0 = all windows."""
    model.eval()
    lengths_V = torch.tensor(held_out.token_lengths)
    sums = {}
    for label, reader in held_out.sources.items():
        nats = text_nats = 0.0
        tokens = size = 0
        batches = reader.in_order(micro_batch, limit, (group.rank, group.world_size))
        calls = ((windows, held_out.document_mask) for windows in batches)
        for batch, items in by_model(model, _sum_batch, calls, lengths_V):
            nats, tokens = nats + batch.nats, tokens + batch.tokens
            text_nats, size = text_nats + batch.text_nats, size + batch.bytes
            if found is not None:
                for content, window_nats, window_bytes in items:
                    found.add_text(label, content, window_nats, window_bytes)
            group.moved()
        sums[label] = WindowSums(nats, tokens, text_nats, size)
    return sums


def _sum_batch(
    model: CausalLM, lengths_V: Tensor, windows: Windows, document_mask: bool
) -> tuple[WindowSums, list[tuple[bytes, float, int]]]:
    """The sums over a batch of windows; and of each window its token ids, the nats of its text and its bytes."""
    device = model.model.embed_tokens.weight.device
    batch = to_batch(windows, document_mask)
    targets_BT = batch.labels[:, 1:].to(device)
    documents = Documents.at(None if batch.position_ids is None else batch.position_ids[:, :-1], device)
    losses_BT = token_losses(model, batch.input_ids[:, :-1].to(device), targets_BT, documents)
    bytes_BT = lengths_V.to(device)[targets_BT.clamp(min=0)] * (targets_BT != IGNORE_INDEX)
    text_BT = losses_BT.double() * (bytes_BT > 0)
    nats, tokens = float(losses_BT.double().sum()), int((targets_BT != IGNORE_INDEX).sum())
    ids = [window.tobytes() for window in batch.input_ids.numpy()]
    items = list(zip(ids, text_BT.sum(1).tolist(), bytes_BT.sum(1).tolist(), strict=True))
    return WindowSums(nats, tokens, float(text_BT.sum()), int(bytes_BT.sum())), items


def scoring_windows(ids: Sequence[int], length: int) -> Iterator[tuple[list[int], int]]:
    """Split a text into windows for a model of context `length`; each with the place of the first token to score.

    The first token is scored after BOS. Windows do not overlap; each begins with the last token of the one before (the
    harness's rolling log-likelihood, context 1). The last window is moved back to be full, so that its tokens see the
    text before them.
    """
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        first = max(0, end - length)  # first token of the window
        yield [BOS_ID if first == 0 else ids[first - 1], *ids[first:end]], 1 + start - first


def comparable_length(context: int) -> int:
    """The tokens of a window that every program can score: llama.cpp keeps one token of a model's context free."""
    return max(1, context - 1)


def text_scores(
    model: CausalLM,
    tokenizer: Tokenizer,
    text: str,
    device: torch.device,
    length: int | None = None,
    shown: bool = False,
) -> dict[str, float]:
    """Bits per byte and nats per token of any text, with the counts of tokens and bytes.

    Each token is scored once, see `scoring_windows`; without `length`, windows are as long as the model's context.
    With `shown`, the progress is reported. Raises DataError for an empty text.
    """
    ids = encode(tokenizer, text)
    if not ids:
        raise DataError("there is no text to score: the file is empty")
    model.eval()
    nats = 0.0
    with Progress("evaluate text", len(ids), "tokens") if shown else nullcontext() as progress:
        for ids_of_window, scored in scoring_windows(ids, length or model.config.max_position_embeddings):
            window = torch.tensor(ids_of_window)
            targets = window[1:].clone()
            targets[: scored - 1] = IGNORE_INDEX
            losses = token_losses(model, window[None, :-1].to(device), targets[None].to(device))
            nats += float(losses.double().sum())
            if progress is not None:
                progress.advance(len(ids_of_window) - scored)
    return rates(nats, len(ids), len(text.encode()))


def rates(nats: float, tokens: int, size: int) -> dict[str, float]:
    """Bits per byte and nats per token of a text that costs `nats` in all."""
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / tokens,
        "tokens": tokens,
        "bytes": size,
    }
