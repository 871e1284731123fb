"""Audits shards after writing: reads them back and checks that they hold their documents and nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS

PART = 1 << 20  # tokens counted at a time
_RERUN = "rerun the stage; if the error returns, check this machine's memory and disk"


def audit(
    shards: Iterable[NDArray[Any]], documents: int, size: int, lengths: Sequence[int], where: str
) -> NDArray[np.int64]:
    """Count each token id [V] in windows ([n, T] each) that must hold `documents` with `size` UTF-8 bytes in total.

    `lengths` are the UTF-8 bytes of each token [V]. Raises CorruptArtifactError, naming `where`, for an id outside
    the vocabulary, a BOS in the middle of a document, padding before the end of a window, BOS and EOS that do not
    enclose each document once, and tokens that add up to another number of bytes.
    """
    counts = np.zeros(len(lengths), np.int64)
    for rows in _chunks(shards):
        if rows.max() >= len(lengths):
            raise CorruptArtifactError(
                f"{where}: the id {rows.max()} is outside the vocabulary of {len(lengths)} tokens; {_RERUN}"
            )
        counts += np.bincount(rows.reshape(-1), minlength=len(lengths))
        before, here = rows[:, :-1], rows[:, 1:]
        if ((here == BOS_ID) & (before != EOS_ID)).any():
            raise CorruptArtifactError(f"{where}: a BOS does not follow the EOS of the previous document; {_RERUN}")
        if ((before == PAD_ID) & (here != PAD_ID)).any():
            raise CorruptArtifactError(f"{where}: padding before the end of a window; {_RERUN}")
    bos, eos = int(counts[BOS_ID]), int(counts[EOS_ID])
    others = sum(int(counts[i]) for i in range(len(SPECIAL_TOKENS)) if i not in (BOS_ID, EOS_ID, PAD_ID))
    if not bos == eos == documents or others:
        raise CorruptArtifactError(
            f"{where}: {documents} documents, but {bos} BOS, {eos} EOS and {others} other special tokens; {_RERUN}"
        )
    if (found := int(counts @ np.array(lengths))) != size:
        raise CorruptArtifactError(f"{where}: the documents have {size} bytes, but their tokens {found}; {_RERUN}")
    return counts


def _chunks(shards: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for windows in shards:
        rows = max(1, PART // windows.shape[1])
        for first in range(0, len(windows), rows):
            yield windows[first : first + rows]


def split_documents(pieces: NDArray[np.int64], longest: int) -> tuple[int, int]:
    """Count the documents split over several windows, and those among them with at most `longest` tokens.

    `pieces` [P, 3] are the document, window and end of each piece, in window order.
    """
    document, window, end = pieces.T
    follows = np.concatenate([[False], window[1:] == window[:-1]])
    sizes = end - np.where(follows, np.concatenate([[0], end[:-1]]), 0)
    parts, tokens = np.bincount(document), np.bincount(document, weights=sizes)
    return int((parts > 1).sum()), int(((parts > 1) & (tokens <= longest)).sum())


def check_round_trip(tokenizer: Tokenizer, texts: Sequence[str], ids: Sequence[NDArray[Any]], where: str) -> int:
    """Decode each text's ids and compare. Returns the number of texts. Raises DataError where a text differs."""
    decoded = tokenizer.decode_batch([one.tolist() for one in ids], skip_special_tokens=False)
    for text, found in zip(texts, decoded, strict=True):
        if text != found:
            place = next((i for i, (a, b) in enumerate(zip(text, found, strict=False)) if a != b), len(found))
            raise DataError(
                f"{where}: the tokenizer does not decode a document to itself: {text[place : place + 40]!r} becomes "
                f"{found[place : place + 40]!r}. Use one without a normalizer and with all 256 bytes in its vocabulary"
            )
    return len(texts)
