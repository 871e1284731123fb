"""Log-probabilities of tokens, as OpenAI's API reports them: of each token, and of the likeliest ones beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.tokenizer import SPECIAL_TOKENS


@dataclass(frozen=True)
class TokenLogprob:
    """A token, and the logarithm of its probability after the tokens before it."""

    text: str  # bytes that are no whole characters are written as OpenAI does: `bytes:\\xf0\\x9f`
    data: bytes
    logprob: float | None  # None for the first token of a prompt, which nothing predicts
    top: Sequence["TokenLogprob"] = ()  # the likeliest tokens, the likeliest first


class TokenNames:
    """The bytes and the texts of a byte-level tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._names = {i: name for name, i in tokenizer.get_vocab().items()}
        self._byte_of = {character: value for value, character in enumerate(byte_characters())}

    def of(self, token: int, logprob: float | None) -> TokenLogprob:
        """A token with its log-probability."""
        name = self._names[token]
        data = name.encode() if token < len(SPECIAL_TOKENS) else bytes(self._byte_of[one] for one in name)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{value:02x}" for value in data)
        return TokenLogprob(text, data, logprob)

    def scored(self, logits_TV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
        """The tokens after each position of logits [T, V], with the `top` likeliest tokens at each position."""
        logprobs_TV = logits_TV.float().log_softmax(-1)
        chosen = logprobs_TV.gather(1, torch.tensor(tokens, device=logits_TV.device)[:, None])[:, 0].tolist()
        values_TN, ids_TN = logprobs_TV.topk(min(top, logprobs_TV.shape[1]))
        likeliest = [
            [self.of(i, value) for i, value in zip(ids, values, strict=True)]
            for ids, values in zip(ids_TN.tolist(), values_TN.tolist(), strict=True)
        ]
        return [
            replace(self.of(token, value), top=beside)
            for token, value, beside in zip(tokens, chosen, likeliest, strict=True)
        ]


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(value) if value in printable else chr(next(others)) for value in range(256)]
