"""The folder on this machine that belongs to a store, and the place of MLflow's files."""

import os
from pathlib import Path

from vectorclm.store.artifact import Store


def local_folder(store: Store) -> Path:
    """The folder for databases, logs and locks, which must be on this machine even if the store is remote.

    VECTORCLM_HOME, else a local store itself, else a folder of the user; for root, one that services can reach.
    """
    if named := os.environ.get("VECTORCLM_HOME"):
        return Path(named).absolute()
    if store.is_local:
        return Path(store.root).absolute()
    return Path("/var/lib/vectorclm") if os.getuid() == 0 else Path.home() / ".local" / "share" / "vectorclm"


def mlflow_destination(store: Store, home: Path) -> str:
    """The address at which a platform's MLflow server keeps the files of its runs."""
    return (home / "mlartifacts").as_uri() if store.is_local else f"{store.uri}/mlflow"
