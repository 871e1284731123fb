"""Fast text encoding with gigatoken, checked against Hugging Face `tokenizers`, which replaces it on any difference.

gigatoken must agree with `tokenizers` on adversarial strings, on the text of every token, and on a sample of every
group of documents. After one difference, `tokenizers` encodes everything from the beginning.
"""

import json
import logging
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vectorclm.tokenizer import SPECIAL_TOKENS, token_lengths

logger = logging.getLogger(__name__)

JUDGE_EVERY = 128  # one in so many documents of a group, and at least one, is encoded by both encoders
REOPEN_CHARACTERS = 64_000_000  # gigatoken caches every word; reopening it after so many frees the memory

HARD = (
    "",
    " ",
    "\x00",
    "a\x00b \x00\x00",
    "a\r\nb\rc\n\r\n\n  d \r\n",
    "1234567890" * 50 + " 3.14 1,000,000 ²³ ½ Ⅷ ١٢٣",
    "naïve café e\u0301\u0301 a\u0300\u0316\u20dd \u0301",
    "日本語のテキスト。한국어 العربية עברית ไทย हिन्दी ἀρχή",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽 1️⃣ \U0010ffff\ufffd\ufeff",
    "'s 't 're 've 'm 'll 'd ' '' 'S 'T 'RE I'm I'M x's don't 'tis ''s 's's 'll've",
    "snake_case camelCase a-b a--b ... !!! ?!?! <|> <| |> <|im_",
    "supercalifragilistic" * 2000,
    "a" * 10_001,
    "\u200b\u200d\u2028\u2029\u0085\u180e\u00ad\u00a0\u3000",
)
SPACES = (" ", "\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u00a0", "\u2003", "\u2028", "\u3000")


class EncoderMismatch(Exception):
    """The fast encoder does not encode as `tokenizers` does, on a number of texts."""

    def __init__(self, message: str, differing: int = 1) -> None:
        super().__init__(message, differing)  # both, so that it can be pickled
        self.message, self.differing = message, differing

    def __str__(self) -> str:
        return self.message


class Gigatoken:
    """gigatoken with the model of a tokenizer; special tokens in a text are encoded as ordinary text.

    Raises ImportError where the package is missing, and gigatoken's own errors for an unsupported tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        record = {**json.loads(tokenizer.to_str()), "added_tokens": [], "post_processor": None}
        self.name = f"gigatoken {version('gigatoken')}"
        self._record = json.dumps(record)
        self._open()

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text."""
        if self._characters > REOPEN_CHARACTERS:
            self._open()
        self._characters += len(text)
        ids: NDArray[np.uint32] = self._tokenizer.encode(text)
        return ids

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The BPE merges in order."""
        return [(left, right) for left, right in self._tokenizer.merges]

    def _open(self) -> None:
        import gigatoken

        self._tokenizer: Any = gigatoken.Tokenizer.from_json(self._record)
        self._characters = 0


class Encoder:
    """Encodes texts by `fast` as long as it agrees with `reference`, and then by `reference` alone."""

    def __init__(self, reference: Tokenizer, fast: Gigatoken | None = None) -> None:
        self.reference, self.fast = reference, fast
        self.judged = self.differed = 0  # texts compared, and texts that differed
        self.rejected: str | None = None  # why `fast` is no longer used

    @property
    def name(self) -> str:
        """Package and version of the encoder in use."""
        return f"tokenizers {version('tokenizers')}" if self.fast is None else self.fast.name

    @cached_property
    def token_lengths(self) -> list[int]:
        """UTF-8 bytes of each token [V]."""
        return token_lengths(self.reference)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Encode texts without BOS and EOS. Raises EncoderMismatch where the encoders differ on a compared text."""
        if self.fast is None:
            return self._by_reference(texts)
        try:
            found = [self.fast.encode(text) for text in texts]
        except Exception as error:  # a text that the reference refuses, too, raises the reference's error
            self._by_reference(texts)
            raise EncoderMismatch(f"{self.name} fails on a text that tokenizers encodes ({error})") from error
        self._compare(texts[::JUDGE_EVERY], found[::JUDGE_EVERY])
        return found

    def prove(self) -> None:
        """Compare both encoders on adversarial strings. Raises EncoderMismatch where they differ."""
        if self.fast is None:
            return
        texts = list(adversarial(self.reference))
        self._compare(texts, [self.fast.encode(text) for text in texts])
        self.judged = 0

    def fall_back(self, why: object) -> None:
        """Encode by `tokenizers` from now on, and log the reason."""
        logger.warning("%s: tokenizers encodes everything", why)
        if isinstance(why, EncoderMismatch):  # perhaps of another process
            self.differed += why.differing
        self.fast, self.rejected = None, str(why)

    def _by_reference(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        found = self.reference.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.uint32) for item in found]

    def _compare(self, texts: Sequence[str], found: Sequence[NDArray[np.uint32]]) -> None:
        self.judged += len(texts)
        different = [
            text
            for text, ours, theirs in zip(texts, found, self._by_reference(texts), strict=True)
            if not np.array_equal(ours, theirs)
        ]
        if different:
            raise EncoderMismatch(
                f"{self.name} encodes {len(different)} of {len(texts)} texts differently from tokenizers, "
                f"for example {different[0][:60]!r}",
                len(different),
            )


def open_encoder(tokenizer: Tokenizer) -> Encoder:
    """Open the fastest encoder that agrees with `tokenizer`. Logs a warning where this is `tokenizers` itself."""
    encoder = Encoder(tokenizer)
    try:
        encoder.fast = Gigatoken(tokenizer)
        encoder.prove()
    except ImportError as error:
        encoder.fall_back(f"gigatoken cannot be imported ({error}; pip install gigatoken)")
    except EncoderMismatch as difference:
        encoder.fall_back(difference)
    except Exception as error:  # gigatoken raises various types for an unsupported tokenizer
        encoder.fall_back(f"gigatoken does not support this tokenizer ({error})")
    return encoder


def adversarial(tokenizer: Tokenizer) -> Iterator[str]:
    """Strings on which encoders tend to differ: all kinds of characters and spaces, special tokens, and every token."""
    yield from HARD
    yield from characters()
    for token in (*SPECIAL_TOKENS, *(added.content for added in tokenizer.get_added_tokens_decoder().values())):
        yield from (token, f"a{token}b", f" {token} {token}\n", token[:-1], token * 3)
    for space in SPACES:
        for count in (1, 2, 3, 17, 200):
            yield from (space * count, f"a{space * count}b", f"{space * count}1{space}!{space * count}")
    tokens = tokenizer.decode_batch([[i] for i in range(tokenizer.get_vocab_size())], skip_special_tokens=False)
    for first in range(0, len(tokens), 64):
        part = tokens[first : first + 64]
        yield from ("".join(part), "\n".join(part), "".join(f"{token}{token}s {token}" for token in part))


def characters() -> Iterator[str]:
    """Strings with characters of every Unicode category, 256 each, with and without a letter and digit around each.

    All assigned characters are included, but only a sample of ideographs, private and unassigned characters.
    """
    alike = ("Lo", "Co", "Cn")
    numbers = (*range(0x30000), *range(0x30000, sys.maxunicode, 97))  # includes the tags and selectors of plane 14
    kinds = [(chr(number), unicodedata.category(chr(number))) for number in numbers]
    some = [one for one, kind in kinds if kind not in (*alike, "Cs")] + [one for one, kind in kinds if kind in alike][
        ::37
    ]
    for first in range(0, len(some), 256):
        part = some[first : first + 256]
        yield from ("".join(part), "".join(f"a{one}1 {one}" for one in part))
