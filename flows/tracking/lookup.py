"""Look up models in MLflow, if there is one. MLflow takes seconds to import, so functions import it on demand."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from flows.paths import local_folder
from vectorclm.errors import ConfigError
from vectorclm.lineage.chain import Lineage, lineage
from vectorclm.store.artifact import Store
from vectorclm.store.model_names import REGISTERED, UnknownModelError, existing_store, resolve_model

if TYPE_CHECKING:
    from flows.tracking.recorded_lineage import Record
    from flows.tracking.registry import Result


def opened(address: str, store: Store) -> Lineage:
    """The lineage of a model in the store or in MLflow's registry (`models:/NAME@ALIAS`)."""
    return lineage(named_model(address, store), store)


def named_model(name: str | None, store: Store) -> str:
    """The address of the model that a person names, as `resolve_model`, or by a registered name.

    A registered name may leave out `models:/`; without an alias or version, the champion is meant, or where there is
    none, the candidate. Raises ConfigError where the registry does not know the name or where the files of what it
    names are gone, and nothing is created.
    """
    if name and name.startswith(REGISTERED):
        return _registered(name, store)
    try:
        return resolve_model(name, store.uri)
    except UnknownModelError:
        if not name or re.fullmatch(r"[\w.-]+(@[\w.-]+|/[0-9]+)?", name) is None or not has_record(store):
            raise
        for address in [name] if "@" in name or "/" in name else [f"{name}@champion", f"{name}@candidate"]:
            if _is_registered(REGISTERED + address, store):
                return _registered(REGISTERED + address, store)
        raise


def _is_registered(address: str, store: Store) -> bool:
    from flows.tracking.registry import Registry

    with suppress(ConfigError):
        return bool(Registry(store).version(address))
    return False


def _registered(address: str, store: Store) -> str:
    from flows.tracking.registry import Registry

    if not has_record(store):
        existing_store(store.uri)
        raise ConfigError(f"{address}: {store.uri} has no record in MLflow; name a server with MLFLOW_TRACKING_URI")
    return Registry(store).find(address).address


def has_record(store: Store) -> bool:
    """Whether there is an MLflow server or database that may know the models of a store."""
    if "MLFLOW_TRACKING_URI" in os.environ:
        return True
    with suppress(ConfigError):  # a folder that cannot hold databases has none
        return (local_folder(store) / "mlflow.db").exists()
    return False


def recorded(found: Lineage, store: Store) -> "tuple[Record | None, str]":
    """MLflow's record of a lineage; or None, and the reason."""
    if not has_record(store):
        return None, "no MLflow: set MLFLOW_TRACKING_URI for links to its runs"
    from flows.tracking.recorded_lineage import record_of
    from flows.tracking.registry import Registry, RegistryError

    try:
        return record_of(Registry(store), found), ""
    except RegistryError as error:
        return None, str(error)


def versions(fingerprints: Iterable[str], store: Store) -> tuple[dict[str, list[str]], str]:
    """The registered versions of artifacts by fingerprint; where there are none to be known, also the reason."""
    if not has_record(store):
        return {}, "no MLflow: set MLFLOW_TRACKING_URI for registered versions"
    from flows.tracking.recorded_lineage import registered_versions
    from flows.tracking.registry import Registry, RegistryError

    try:
        return registered_versions(Registry(store), fingerprints), ""
    except RegistryError as error:
        return {}, str(error)


def score_histories(fingerprint: str, store: Store) -> "dict[str, list[Result]]":
    """The scores over time of a registered model, by subject and suite; empty where MLflow knows none."""
    if not has_record(store):
        return {}
    from flows.tracking.histories import histories
    from flows.tracking.registry import Registry, RegistryError

    with suppress(RegistryError):
        return histories(Registry(store), fingerprint)
    return {}
