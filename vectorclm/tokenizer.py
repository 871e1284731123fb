"""The model's tokenizer: its settings, special tokens, chat template, loading and encoding."""

import copyreg
import json
from collections.abc import Callable
from pathlib import Path

from pydantic import Field
from tokenizers import Tokenizer

from vectorclm.errors import DataError
from vectorclm.formats.tokenizer_files import load_tokenizer_file
from vectorclm.runtime.library_calls import interruptibly
from vectorclm.settings import Settings

BOS, EOS, IM_START, IM_END, PAD = SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)


BOS_ID, EOS_ID, IM_START_ID, IM_END_ID, PAD_ID = range(len(SPECIAL_TOKENS))


# ChatML after a BOS. Each turn is `<|im_start|>role\ncontent<|im_end|>\n`; conversations.py builds the same tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The same text for transformers, whose `generation` marks the tokens that carry loss: TRL trains on these alone. A
# content may come in parts. What the model does not know is refused; otherwise it would be left out without a word.
TRANSFORMERS_TEMPLATE = """{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type != 'text' -%}{{ raise_exception('only text is supported, not ' + part.type) }}{%- endif -%}
{{ part.text }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}{{ raise_exception('this model calls no tools') }}{%- endif -%}
{{ bos_token }}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ text(message.content) + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}{{ text(message.content) + '<|im_end|>' }}{%- endif -%}
{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


LONG_TEXT = 500_000  # characters; encoding them takes some tenths of a second


class TokenizerConfig(Settings):
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909; on bytes: GPT-2, section 2.2)."""

    vocab_size: int = Field(default=16_384, ge=300, le=65_536, description="Tokens, special tokens included")
    bytes: int = Field(gt=0, description="UTF-8 bytes of sampled text for training, divided equally among the sources")


def write_tokenizer_config(directory: Path, model_max_length: int, eos_token: str) -> None:
    """Write `tokenizer_config.json` for transformers. `eos_token` ends a document, or a turn of a chat model."""
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
    """Load `tokenizer.json` from a directory; special tokens written in a text are encoded as ordinary text.

    Raises DataError where the file is missing or invalid, or has other special tokens.
    """
    path = directory / "tokenizer.json"
    tokenizer = load_tokenizer_file(path)
    found = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    if found != list(range(len(SPECIAL_TOKENS))):
        raise DataError(f"{path}: the special tokens {', '.join(SPECIAL_TOKENS)} must have the ids 0 to 4, not {found}")
    tokenizer.no_truncation()  # transformers saves the last setting, and a truncated text would score far too well
    tokenizer.no_padding()
    return _of_texts(tokenizer)


def read_tokenizer(record: str) -> Tokenizer:
    """A tokenizer from its JSON, as `Tokenizer.to_str` writes it in another process."""
    return _of_texts(Tokenizer.from_str(record))


def _of_texts(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, which encodes special tokens in a text as text; its JSON does not record this setting."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def _reduced(tokenizer: Tokenizer) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
    return read_tokenizer if tokenizer.encode_special_tokens else Tokenizer.from_str, (tokenizer.to_str(),)


copyreg.pickle(Tokenizer, _reduced)  # its own pickle loses the setting


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode `text` without a BOS; special tokens written in the text are encoded as ordinary text."""
    if len(text) < LONG_TEXT:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids
    # encode_batch_fast releases the GIL and records no offsets.
    (long,) = interruptibly(lambda left: tokenizer.encode_batch_fast([text], add_special_tokens=False))
    return list(long.ids)


def token_lengths(tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes of each token [V], 0 for special tokens; they convert nats to bits per byte."""
    special = set(range(len(SPECIAL_TOKENS)))
    # A byte-level token has one character for each byte.
    lengths = {i: len(token) for token, i in tokenizer.get_vocab().items()}
    return [0 if i in special else lengths[i] for i in range(len(lengths))]
