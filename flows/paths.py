"""The local folder that belongs to a store."""

import os
from pathlib import Path

from vectorclm.store.artifact import Store


def local_folder(store: Store) -> Path:
    """Where what belongs to a store but must be on this machine is kept: databases, logs, locks.

    VECTORCLM_HOME, else a local store itself, else a folder of the user's; root's is one that services reach, too.
    """
    if named := os.environ.get("VECTORCLM_HOME"):
        return Path(named).absolute()
    if store.is_local:
        return Path(store.root).absolute()
    return Path("/var/lib/vectorclm") if os.getuid() == 0 else Path.home() / ".local" / "share" / "vectorclm"
