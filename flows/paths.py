"""The folder on this machine that belongs to a store."""

import os
import re
from pathlib import Path

from vectorclm.errors import ConfigError
from vectorclm.store.artifact import Store

UNSAFE = re.compile("[?#%]")  # these would end a path in the address of a database, or be replaced there


def local_folder(store: Store) -> Path:
    """The folder for databases, logs and locks, which must be on this machine even if the store is remote.

    VECTORCLM_HOME, else a local store itself, else a folder of the user; for root, one that services can reach.
    Raises ConfigError where the folder's name has characters that no address of a database can have.
    """
    if named := os.environ.get("VECTORCLM_HOME"):
        return check_name(Path(named).absolute())
    if store.is_local:
        return check_name(Path(store.root).absolute())
    return Path("/var/lib/vectorclm") if os.getuid() == 0 else Path.home() / ".local" / "share" / "vectorclm"


def check_name(folder: Path) -> Path:
    """The folder, for databases. Raises ConfigError where its name has `?`, `#` or `%`."""
    if UNSAFE.search(str(folder)):
        raise ConfigError(
            f"{folder} cannot hold databases, because its name has ?, # or %: set VECTORCLM_HOME to another folder; "
            "the store may keep its name"
        )
    return folder
