"""Names of models: resolve what a command takes as MODEL to an address that `find_model` knows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vectorclm.errors import ConfigError, DataError, StoreError, VectorCLMError
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.layout import EXPORT, STAGES, TRAINED
from vectorclm.store.model_ref import ADDRESS, CANDIDATE_DIGITS, SHORT, expand_prefix

NAMES = (
    "an experiment's name, models:/NAME@ALIAS, the first digits of a fingerprint, STAGE/DIGITS, or a folder "
    "[default: the newest chat model]"
)
DIGITS = re.compile(r"[0-9a-f]{3,64}")
REGISTERED = "models:/"


class UnknownModelError(DataError):
    """No model of the store has this name."""


class Candidate(NamedTuple):
    """A model that a name may mean, and why."""

    address: str
    about: str


def existing_store(uri: str) -> Store:
    """Open a store for reading. Raises StoreError where there is none, and creates nothing."""
    store = Store(uri)
    store.check_reachable()
    if store.is_local and not Path(store.root).is_dir():
        raise StoreError(f"there is no store at {store.uri}: name one with --store or VECTORCLM_STORE")
    return store


def is_place(name: str) -> bool:
    """Whether a name of a model states its place: a folder, a file, or an address in a store."""
    folder = Path(name)
    return (
        "://" in name
        or name.startswith((".", "/", "~"))
        or folder.is_file()
        or (folder.is_dir() and ("/" in name or (folder / "config.json").is_file()))
        or (ADDRESS.fullmatch(name.rstrip("/")) is not None)
    )


def resolve_model(name: str | None, uri: str) -> str:
    """The address of the model that a person names; see NAMES. A registered name is returned as it is.

    Of several exports of one experiment, the newest is taken. Raises ConfigError that lists the candidates where the
    name is ambiguous, UnknownModelError where the store at `uri` has no such model, and StoreError where there is no
    store.
    """
    if name and (name.startswith(REGISTERED) or is_place(name)):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    store = existing_store(uri)
    try:
        if not name:
            return _newest_chat_model(store)
        if "/" in name and (match := SHORT.fullmatch(name.rstrip("/"))) and match["stage"] in STAGES:
            return expand_prefix(name, store)
        return _only(name, _candidates(name, store), store)
    except VectorCLMError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise StoreError(f"{store.uri} cannot be read: {str(error) or type(error).__name__}") from error


def _newest_chat_model(store: Store) -> str:
    """The newest artifact of the last training that has any: a chat model, or else a base model."""
    for stage in reversed(TRAINED):
        if found := list(store.finished(stage)):
            return _newest(found).uri
    raise UnknownModelError(f"{store.uri} has no model yet: `vectorclm run` trains one")


def _newest(artifacts: list[Artifact]) -> Artifact:
    return max(artifacts, key=lambda artifact: (str(artifact.manifest.get("created")), artifact.fingerprint))


def _candidates(name: str, store: Store) -> Iterator[Candidate]:
    exports = [item for item in store.finished(EXPORT) if item.manifest["config"].get("name") == name]
    if exports:
        newest = _newest(exports)
        inputs = newest.manifest["inputs"]
        stage = next(stage for stage in reversed(TRAINED) if stage in inputs)
        yield Candidate(store.uri_of(f"{stage}/{inputs[stage]}"), f"the experiment {name}")
    if DIGITS.fullmatch(name):
        for stage in (*TRAINED, EXPORT):
            for fingerprint in (found for found in store.list(stage) if found.startswith(name)):
                if store.look_up(stage, fingerprint) is not None:
                    yield Candidate(store.uri_of(f"{stage}/{fingerprint}"), f"{stage}/{fingerprint[:CANDIDATE_DIGITS]}")


def _only(name: str, candidates: Iterator[Candidate], store: Store) -> str:
    found = list(candidates)
    if len(found) == 1:
        return found[0].address
    if found:
        raise ConfigError(f"{name} may mean {' or '.join(item.about for item in found)}: write one of these")
    known = sorted({str(item.manifest["config"].get("name")) for item in store.finished(EXPORT)})
    there = f"its experiments are {', '.join(known)}" if known else "it has no finished experiment"
    raise UnknownModelError(f"{store.uri} has no model {name!r}: {there}; MODEL is {NAMES.partition(' [')[0]}")
