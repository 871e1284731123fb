"""Load a model with its tokenizer: by the names that commands take, or from a model directory."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from vectorclm.errors import DataError
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.store.artifact import default_store
from vectorclm.store.model_names import resolve_model
from vectorclm.store.model_ref import find_model
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


def load(name: str | Path | None = None, *, store: str | None = None, runtime: Runtime | None = None) -> LoadedModel:
    """Load a model for use: by an experiment's name, the digits of a fingerprint, or its folder, as commands take it.

    Without a name, it is the newest chat model of `store` (default: VECTORCLM_STORE, or ./store). `runtime` has the
    device and the threads. Raises VectorCLMError where there is no such model, or its files are damaged.
    """
    runtime = runtime or Runtime()
    runtime.check()
    address = resolve_model(None if name is None else str(name), store or default_store())
    found = find_model(address)
    loaded = load_model(found.local(), runtime.configure_torch(), chat=found.chat, address=address)
    loaded.model.eval()
    return loaded


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
