"""Byte-level BPE: lossless on every string, with a pre-tokenizer that llama.cpp knows, and the chat template."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vectorclm.artifact import Artifact
from vectorclm.errors import ConfigError, DataError
from vectorclm.progress import Progress
from vectorclm.sample_files import SampleFiles
from vectorclm.settings import Settings

BOS, EOS, IM_START, IM_END, PAD = SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)
BOS_ID, EOS_ID, IM_START_ID, IM_END_ID, PAD_ID = range(len(SPECIAL_TOKENS))

# ChatML after a BOS. Each turn is `<|im_start|>role\ncontent<|im_end|>\n`; conversations.py builds the same of tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class TokenizerConfig(Settings):
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909; on bytes: GPT-2, section 2.2)."""

    vocab_size: int = Field(16_384, ge=300, le=65_536, description="Tokens, the special ones included")
    bytes: int = Field(gt=0, description="UTF-8 bytes of sampled text to learn from, the same from every source")


def train_tokenizer(
    config: TokenizerConfig, sample: Path | Artifact, model_max_length: int, out: Path
) -> dict[str, Any]:
    """Learn the merges from the training text in `sample` and write `tokenizer.json` and `tokenizer_config.json`.

    Every source gives the same number of bytes, or all it has. Returns counts, and bytes per token on that text.
    Raises ConfigError where the text does not yield `vocab_size` tokens.
    """
    texts = list(balanced_texts(SampleFiles(sample), config.bytes))
    size = sum(len(text.encode()) for text in texts)
    with Progress("tokenizer", size, "bytes") as progress:
        tokenizer = learn(_reported(texts, progress), config.vocab_size)
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
    }


def learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens, the special ones first, then the bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's pattern and no normalizer: recognised by llama.cpp as "gpt-2", and decode(encode(x)) == x.
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


def balanced_texts(sample: SampleFiles, total_bytes: int) -> Iterator[str]:
    """Training documents, the same number of bytes from every source."""
    for label in sample.labels:
        left = total_bytes // len(sample.labels)
        for text in sample.texts(label, "train"):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def _reported(texts: Iterable[str], progress: Progress) -> Iterator[str]:
    for text in texts:
        yield text
        progress.advance(len(text.encode()))


def write_tokenizer_config(directory: Path, model_max_length: int, eos_token: str) -> None:
    """`tokenizer_config.json` as transformers reads it. `eos_token` ends a document, or for a chat model a turn."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": eos_token,
        "pad_token": PAD,
        "additional_special_tokens": [IM_START, IM_END],
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory, set so that special tokens written in a text stay text.

    Raises DataError where there is none, or one whose special tokens are not ours.
    """
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer: {error}") from error
    found = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    if found != list(range(len(SPECIAL_TOKENS))):
        raise DataError(f"{path}: the special tokens {', '.join(SPECIAL_TOKENS)} must have the ids 0 to 4, not {found}")
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()  # transformers saves what was last used, and a text cut short would score far too well
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` alone: no BOS, and special tokens written in it stay text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def token_lengths(tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes that each token stands for [V]; special tokens stand for none. Makes bits per byte out of nats."""
    special = set(range(len(SPECIAL_TOKENS)))
    # A byte-level token is written with one character for each byte.
    lengths = {i: len(token) for token, i in tokenizer.get_vocab().items()}
    return [0 if i in special else lengths[i] for i in range(len(lengths))]
