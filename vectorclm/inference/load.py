"""Open a model directory: the model and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from vectorclm.errors import DataError
from vectorclm.model import CausalLM
from vectorclm.tokenizer import load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer, and the folder that both come from."""

    folder: Path
    model: CausalLM
    tokenizer: Tokenizer
    chat: bool  # whether the model answers in the chat template

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.model.model.embed_tokens.weight.device


def open_model(folder: Path, address: str | None = None) -> tuple[CausalLM, Tokenizer]:
    """Load the model in a folder and its tokenizer; `address` is the model's name in messages.

    Raises DataError where a file is invalid, or the tokenizer belongs to another model.
    """
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    known, expected = tokenizer.get_vocab_size(), model.config.vocab_size
    if known != expected:
        raise DataError(
            f"{address or folder}: the tokenizer has {known:,} tokens, the model {expected:,}: copy both from one "
            "training"
        )
    return model, tokenizer


def load_model(folder: Path, device: torch.device, *, chat: bool, address: str | None = None) -> LoadedModel:
    """Load the model in a folder, and move it to a device. Raises DataError as `open_model` does."""
    model, tokenizer = open_model(folder, address)
    return LoadedModel(folder, model.to(device), tokenizer, chat)
