"""Open a model directory: the model and its tokenizer."""

from pathlib import Path

from tokenizers import Tokenizer

from vectorclm.errors import DataError
from vectorclm.model import CausalLM
from vectorclm.tokenizer import load_tokenizer


def open_model(folder: Path, address: str | None = None) -> tuple[CausalLM, Tokenizer]:
    """The model in a folder, known to a person by its address, and its tokenizer.

    Raises DataError where a file is not what it should be, or the tokenizer is another model's.
    """
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    known, expected = tokenizer.get_vocab_size(), model.config.vocab_size
    if known != expected:
        raise DataError(
            f"{address or folder}: the tokenizer has {known:,} tokens, the model {expected:,}: copy both from one "
            "training"
        )
    return model, tokenizer
