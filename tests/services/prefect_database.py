"""An empty database of Prefect that is made once: its migrations take longer than many a test."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

PLACE = "VECTORCLM_TEST_DATABASE"  # the folder of this session and its workers


def reserve() -> None:
    """Make the folder in which the processes of this session share the database."""
    os.environ[PLACE] = tempfile.mkdtemp(prefix="vectorclm-tests-")


def release() -> None:
    """Remove the folder."""
    shutil.rmtree(os.environ.pop(PLACE, ""), ignore_errors=True)


def prepare(home: Path) -> None:
    """Give a PREFECT_HOME the database that a server would make there when it starts for the first time.

    Outside of a session, as for the pictures, the server makes it.
    """
    if PLACE not in os.environ:
        return
    place = Path(os.environ[PLACE])
    with FileLock(place / "lock"):
        made = place / "prefect.db"
        if not made.exists():
            clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            subprocess.run(command, env={**clean, "PREFECT_HOME": str(place)}, check=True, capture_output=True)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (home / "prefect.db").exists():  # else a server has its records there
        shutil.copyfile(made, home / "prefect.db")
