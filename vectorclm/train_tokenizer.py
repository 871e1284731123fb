"""Trains a byte-level BPE tokenizer, lossless on every string, with GPT-2's pre-tokenizer, which llama.cpp supports."""

import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vectorclm.corpus.sample_reader import SampleFiles
from vectorclm.errors import ConfigError, PreemptedError
from vectorclm.runtime.library_calls import interruptibly
from vectorclm.runtime.progress import Progress
from vectorclm.store.artifact import Artifact
from vectorclm.tokenizer import (
    BOS,
    BOS_ID,
    EOS,
    SPECIAL_TOKENS,
    TokenizerConfig,
    load_tokenizer,
    write_tokenizer_config,
)

# Bytes of text for a token, by the size of the vocabulary, in languages of one byte a letter.
BYTES_PER_TOKEN = ((600, 2.2), (1500, 2.7), (3000, 3.2), (6000, 3.6), (12_000, 4.0), (70_000, 4.2))
LONGEST = 1000  # characters of a word used for training; the rest is cut
SPACE, NO_SPACE = (
    re.compile(r"[^\S\x1c-\x1f]"),
    re.compile(r"[\S\x1c-\x1f]"),
)  # the pre-tokenizer does not count \x1c to \x1f as spaces


def train_tokenizer(
    config: TokenizerConfig, sample: Path | Artifact, model_max_length: int, out: Path
) -> dict[str, Any]:
    """Learn the merges from the training text in `sample` and write `tokenizer.json` and `tokenizer_config.json`.

    Every source contributes the same number of bytes, or all its bytes. Words longer than LONGEST are cut, because the
    training time is quadratic in their length. Returns counts, and bytes per token on this text. Raises ConfigError
    where the text does not yield `vocab_size` tokens.
    """
    cut: Counter[str] = Counter()
    texts = list(balanced_texts(SampleFiles(sample), config.bytes, cut))
    size = sum(len(text.encode()) for text in texts)
    with Progress("tokenizer", size, "bytes") as progress:

        def work(left: threading.Event) -> Tokenizer:
            return learn(_reported(texts, progress, left), config.vocab_size)

        def meanwhile(seconds: float) -> None:
            if progress.tick.done == size:
                progress.at(size, f"merging for {seconds:.0f} s")

        tokenizer = interruptibly(work, meanwhile)
    if tokenizer.get_vocab_size() < config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size is {config.vocab_size}, but {size:,} bytes of text yield only "
            f"{tokenizer.get_vocab_size()} tokens: lower tokenizer.vocab_size and model.vocab_size, or sample more text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    write_tokenizer_config(out, model_max_length, eos_token=EOS)
    encoded = load_tokenizer(out).encode_batch_fast(texts[:1000], add_special_tokens=False)
    tokens = sum(len(item.ids) for item in encoded)
    return {
        "vocab_size": config.vocab_size,
        "trained_on_bytes": size,
        "trained_on_documents": len(texts),
        "bytes_per_token": round(sum(len(text.encode()) for text in texts[:1000]) / tokens, 4),
        **({"long_words": dict(cut)} if cut else {}),
    }


def learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with at most `vocab_size` tokens: special tokens first, then bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's pattern without a normalizer: llama.cpp knows it as "gpt-2", and decode(encode(x)) == x.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def balanced_texts(sample: SampleFiles, total_bytes: int, cut: "Counter[str]") -> Iterator[str]:
    """Training documents, the same number of bytes from every source; `cut` counts the long words that are cut."""
    for label in sample.labels:
        left = total_bytes // len(sample.labels)
        for document in sample.texts(label, "train"):
            text = cut_long_words(document, cut) if may_have_long_words(document) else document
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def may_have_long_words(text: str) -> bool:
    """Whether a text may have a word of more than LONGEST characters: a fast check with few false positives.

    Such a word covers a whole chunk of LONGEST / 2 characters, which then has only spaces or no space.
    """
    half = LONGEST // 2
    return any(
        not SPACE.search(text, start, start + half) or not NO_SPACE.search(text, start, start + half)
        for start in range(0, len(text) - half + 1, half)
    )


def cut_long_words(text: str, cut: "Counter[str]") -> str:
    """Cut every word after LONGEST characters; `cut` counts these words and the bytes left out.

    A word is a run of characters that the pre-tokenizer keeps together: letters, numbers, spaces, or others.
    """
    kept = []
    for _, characters in groupby(text, key=_kind):
        word = "".join(characters)
        if len(word) > LONGEST:
            cut.update({"cut": 1, "bytes_left_out": len(word[LONGEST:].encode())})
        kept.append(word[:LONGEST])
    return "".join(kept)


@cache
def _kind(character: str) -> str:
    """The pre-tokenizer's class of a character: L (letter), N (number), Z (space), or empty for others."""
    if SPACE.match(character):
        return "Z"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else ""


def _reported(texts: Iterable[str], progress: Progress, left: threading.Event) -> Iterator[str]:
    for text in texts:
        if left.is_set():
            raise PreemptedError("the tokenizer training was cancelled")
        yield text
        progress.advance(len(text.encode()))


def usual_bytes_per_token(vocabulary: int) -> float:
    """Bytes of text that a token usually stands for, in languages of one byte a letter."""
    return next(figure for size, figure in BYTES_PER_TOKEN if vocabulary <= size)


def bytes_per_token(texts: Iterable[str], vocab_size: int) -> float:
    """Bytes of text for each token of a vocabulary that is learned from these texts; a few kilobytes suffice."""
    kept = [cut_long_words(text, Counter()) if may_have_long_words(text) else text for text in texts]
    encoded = learn(kept, vocab_size).encode_batch_fast(kept, add_special_tokens=False)
    return max(1.0, sum(len(text.encode()) for text in kept) / max(1, sum(len(item.ids) for item in encoded)))
