"""An answer as text while its tokens arrive: whole characters, stop strings, and the reason for the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from vectorclm.inference.logprobs import TokenLogprob
from vectorclm.tokenizer import SPECIAL_TOKENS

SPECIAL = range(len(SPECIAL_TOKENS))


@dataclass(frozen=True)
class TextDelta:
    """The next piece of an answer: whole characters of text, and the number of tokens generated for them."""

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None  # the reason for the end, in the last piece
    logprobs: Sequence[TokenLogprob] = ()  # of the tokens, where they were asked for


class TextStream:
    """Turns the tokens of one answer into pieces of text, one for each token.

    The text of a token may be in a later piece, because a piece has whole characters. The answer ends with a special
    token, unless `ignore_eos`, or before the first of the `stop` strings. The pieces together are the text of all
    tokens but the special ones.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, ignore_eos: bool = False) -> None:
        self.tokenizer, self.stop, self.ignore_eos = tokenizer, stop, ignore_eos
        self._pending: list[int] = []  # tokens whose last character is incomplete
        self._held = ""  # text that may be a prefix of a stop string

    def add(self, token: int) -> TextDelta:
        """The piece of text after one more token."""
        if token in SPECIAL:
            return TextDelta("", 1) if self.ignore_eos else TextDelta(self._rest(), 1, "stop")
        self._pending.append(token)
        fresh = self._decode()
        if fresh.endswith("\ufffd"):  # the next tokens may hold the other bytes of a character
            return TextDelta("", 1)
        self._pending, self._held = [], self._held + fresh
        if (end := find_stop(self._held, self.stop)) is not None:
            return TextDelta(self._held[:end], 1, "stop")
        safe = len(self._held) - overlap(self._held, self.stop)
        text, self._held = self._held[:safe], self._held[safe:]
        return TextDelta(text, 1)

    def end(self) -> TextDelta:
        """The last piece of an answer that ends without a token of its own: at its greatest length."""
        return TextDelta(self._rest(), 0, "length")

    def _rest(self) -> str:
        return self._held + self._decode()

    def _decode(self) -> str:
        text: str = self.tokenizer.decode(self._pending, skip_special_tokens=False)
        return text


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """The position of the first stop string in a text; None where there is none."""
    return min((place for one in stop if (place := text.find(one)) >= 0), default=None)


def overlap(text: str, stop: Sequence[str]) -> int:
    """The length of the longest suffix of a text that is a prefix of a stop string."""
    lengths = (size for one in stop for size in range(min(len(one), len(text)), 0, -1) if text.endswith(one[:size]))
    return max(lengths, default=0)
