"""Look up models in MLflow, if there is one. MLflow takes seconds to import, so functions import it on demand."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flows.paths import local_folder
from vectorclm.lineage.chain import Lineage, lineage
from vectorclm.store.artifact import Store

if TYPE_CHECKING:
    from flows.tracking.recorded_lineage import Record


def opened(address: str, store: Store) -> Lineage:
    """The lineage of a model in the store or in MLflow's registry (`models:/NAME@ALIAS`)."""
    if address.startswith("models:/"):
        from flows.tracking.registry import Registry

        address = Registry(store).find(address).address
    return lineage(address, store)


def has_record(store: Store) -> bool:
    """Whether there is an MLflow server or database that may know the models of a store."""
    return "MLFLOW_TRACKING_URI" in os.environ or (local_folder(store) / "mlflow.db").is_file()


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
