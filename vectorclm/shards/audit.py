"""What was written, read back and counted: no shard is published that does not hold its documents and nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS

PART = 1 << 20  # tokens counted at a time
_MEND = "run the stage again, and where it stays so, check this machine's memory and disk"


def audit(
    shards: Iterable[NDArray[Any]], documents: int, size: int, lengths: Sequence[int], where: str
) -> NDArray[np.int64]:
    """How often each id [V] stands in the windows ([n, T] each) that hold `documents` of `size` UTF-8 bytes in all.

    `lengths` are the bytes that each token stands for [V]. Raises CorruptArtifactError, naming `where`, for an id
    that is no token's, a BOS in the middle of a document, padding before the end of a window, where BOS and EOS do
    not enclose each document once, and where the tokens stand for another number of bytes.
    """
    counts = np.zeros(len(lengths), np.int64)
    for rows in _cut(shards):
        if rows.max() >= len(lengths):
            raise CorruptArtifactError(f"{where}: the id {rows.max()} is none of {len(lengths)} tokens; {_MEND}")
        counts += np.bincount(rows.reshape(-1), minlength=len(lengths))
        before, here = rows[:, :-1], rows[:, 1:]
        if ((here == BOS_ID) & (before != EOS_ID)).any():
            raise CorruptArtifactError(f"{where}: a BOS and the EOS of the document before it are apart; {_MEND}")
        if ((before == PAD_ID) & (here != PAD_ID)).any():
            raise CorruptArtifactError(f"{where}: padding before the end of a window; {_MEND}")
    bos, eos = int(counts[BOS_ID]), int(counts[EOS_ID])
    others = sum(int(counts[i]) for i in range(len(SPECIAL_TOKENS)) if i not in (BOS_ID, EOS_ID, PAD_ID))
    if not bos == eos == documents or others:
        raise CorruptArtifactError(
            f"{where}: {documents} documents, but {bos} BOS, {eos} EOS and {others} other special tokens; {_MEND}"
        )
    if (found := int(counts @ np.array(lengths))) != size:
        raise CorruptArtifactError(f"{where}: the documents have {size} bytes, their tokens stand for {found}; {_MEND}")
    return counts


def _cut(shards: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for windows in shards:
        rows = max(1, PART // windows.shape[1])
        for first in range(0, len(windows), rows):
            yield windows[first : first + rows]


def split_documents(pieces: NDArray[np.int64], longest: int) -> tuple[int, int]:
    """How many documents stand in more than one window, and how many of those are no longer than `longest` tokens.

    `pieces` [P, 3] are document, window and end of each piece, in the order of the windows.
    """
    document, window, end = pieces.T
    follows = np.concatenate([[False], window[1:] == window[:-1]])
    sizes = end - np.where(follows, np.concatenate([[0], end[:-1]]), 0)
    parts, tokens = np.bincount(document), np.bincount(document, weights=sizes)
    return int((parts > 1).sum()), int(((parts > 1) & (tokens <= longest)).sum())


def check_round_trip(tokenizer: Tokenizer, texts: Sequence[str], ids: Sequence[NDArray[Any]], where: str) -> int:
    """Decode each text's ids and return how many there are. Raises DataError where one does not give its text back."""
    decoded = tokenizer.decode_batch([one.tolist() for one in ids], skip_special_tokens=False)
    for text, found in zip(texts, decoded, strict=True):
        if text != found:
            place = next((i for i, (a, b) in enumerate(zip(text, found, strict=False)) if a != b), len(found))
            raise DataError(
                f"{where}: the tokenizer does not give a document back: {text[place : place + 40]!r} becomes "
                f"{found[place : place + 40]!r}. Use one without a normalizer and with all 256 bytes in its vocabulary"
            )
    return len(texts)
