"""The loader of registered models for `mlflow.pyfunc.load_model`: find the artifact in a store, verify it, answer.

MLflow keeps no copy of the weights: a logged model names an artifact by its fingerprint and its content. The artifact
is looked up in the store at hand (VECTORCLM_STORE, `./store`, the folder of MLflow's database), then at the address
where it was built. Nothing is unpickled.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
from tokenizers import Tokenizer

from flows.tracking.database import sqlite_path
from vectorclm.errors import CorruptArtifactError, DataError, StoreError
from vectorclm.inference.config import SamplingParams
from vectorclm.runtime.devices import Runtime
from vectorclm.settings import digest, validate
from vectorclm.store.artifact import Artifact, StageSpec, Store, default_store
from vectorclm.store.model_ref import content_of, find_model
from vectorclm.tokenizer import encode, load_tokenizer

if TYPE_CHECKING:  # with torch, which only a model in use needs
    from vectorclm.inference.load import LoadedModel

REFERENCE = "artifact.json"  # stage, fingerprint and content of the artifact, and the store where it was built
MAX_NEW_TOKENS = 128


class TextModel:
    """A model with the method that MLflow calls: text in, text out."""

    def __init__(self, loaded: "LoadedModel") -> None:
        self.loaded = loaded

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Answer each prompt; a base model continues it.

        `params` are `max_new_tokens` and the sampling settings of `vectorclm chat`. Raises DataError for an empty
        question, and ConfigError for a setting outside its bounds.
        """
        from vectorclm.inference.generate import answer_text, continuation

        settings = dict(params or {})
        length = int(settings.pop("max_new_tokens", MAX_NEW_TOKENS))
        sampling = validate(SamplingParams, settings, "params")
        loaded, write = self.loaded, answer_text if self.loaded.chat else continuation
        prompts = texts(model_input)
        for number, prompt in enumerate(prompts):
            if loaded.chat and not prompt.strip():
                raise DataError(f"prompt {number} is empty")
        return [write(loaded.model, loaded.tokenizer, prompt, length, sampling) for prompt in prompts]


class TokenizerModel:
    """A tokenizer with the method that MLflow calls: text in, token ids out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[list[int]]:
        """The token ids of each text."""
        return [encode(self.tokenizer, text) for text in texts(model_input)]


def texts(model_input: Any) -> list[str]:
    """The texts in any of the inputs that MLflow passes: a table's first column, a series, an array, a list, a text."""
    if isinstance(model_input, str):
        return [model_input]
    cells = np.asarray(model_input, dtype=object)
    return [str(text) for text in (cells[:, 0] if cells.ndim == 2 else cells.ravel())]


def _load_pyfunc(data_path: str) -> TextModel | TokenizerModel:
    """The model that a logged model refers to; the function that MLflow calls.

    Raises DataError where no store at hand has the artifact, and CorruptArtifactError where its files differ from those
    that were recorded.
    """
    reference = json.loads((Path(data_path) / REFERENCE).read_text(encoding="utf-8"))
    artifact = find_artifact(reference, _stores(reference))
    verify_reference(artifact, reference)
    if artifact.stage == "tokenizer":
        return TokenizerModel(load_tokenizer(artifact.local(remembered=True)))
    from vectorclm.inference.load import load_model

    found = find_model(artifact.uri)
    return TextModel(load_model(found.local(), Runtime().torch_device(), chat=found.chat, address=artifact.uri))


def _stores(reference: Mapping[str, str]) -> Iterator[str]:
    """The addresses of the stores to search, the store at hand first."""
    if os.environ.get("VECTORCLM_STORE") or Path(default_store()).is_dir():
        yield default_store()
    if (database := sqlite_path(mlflow.get_tracking_uri())) is not None:
        yield str(database.parent)
    yield reference["store"]


def find_artifact(reference: Mapping[str, str], stores: Iterator[str] | Sequence[str]) -> Artifact:
    """The artifact of a reference in the first store that has it. Raises DataError where none has."""
    searched = list[str]()
    for address in dict.fromkeys(stores):
        try:
            found = Store(address).look_up(reference["stage"], reference["fingerprint"])
        except StoreError as error:
            searched.append(f"{address} ({error})")
            continue
        if found is not None:
            return found
        searched.append(address)
    raise DataError(
        f"no store at hand has {reference['stage']}/{reference['fingerprint']}: searched {', '.join(searched)}; set "
        "VECTORCLM_STORE to the store that has it"
    )


def content(artifact: Artifact) -> str:
    """SHA-256 over the files that decide what a model or a tokenizer answers."""
    files = artifact.manifest["files"]
    return content_of(artifact) or digest({"tokenizer.json": files["tokenizer.json"]["sha256"]})


def verify_reference(artifact: Artifact, reference: Mapping[str, str]) -> None:
    """Raise CorruptArtifactError unless an artifact is the one that was recorded, by its fingerprint and content."""
    manifest = artifact.manifest
    spec = StageSpec(artifact.stage, manifest["format_version"], manifest["config"], manifest["inputs"])
    if spec.fingerprint != reference["fingerprint"] or content(artifact) != reference["content"]:
        raise CorruptArtifactError(f"{artifact.uri} is not the model that MLflow recorded: its manifest was changed")
