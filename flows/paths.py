"""The folder on this machine that belongs to a store."""

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
