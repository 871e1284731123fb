"""MLflow's SQLite database beside a store: check that MLflow can use it, and follow a store that was moved."""

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from flows.tracking.client import RegistryError
from vectorclm.store.artifact import Store

BUSY_SECONDS = 5.0  # that another program may hold a lock
ARTIFACTS = "mlartifacts"  # the folder beside the database with the files of runs and models
OWN_TABLES = {"experiments", "alembic_version"}  # in every database of MLflow
PLACES = (  # tables and columns in which MLflow keeps addresses of files
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


class DatabaseLockedError(RegistryError):
    """Another program holds MLflow's database: a later attempt may succeed."""


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite address such as `sqlite:////data/mlflow.db`; None for any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def check_database(uri: str) -> None:
    """Check that MLflow can use the SQLite database at `uri`; nothing is checked for a server or a new file.

    MLflow itself retries for an hour where the file cannot be opened, and adds its tables to any database. Raises
    DatabaseLockedError where another program holds it, and RegistryError where it is unreadable or not MLflow's.
    """
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return
    try:
        with closing(_connect(path)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            if tables and not tables >= OWN_TABLES:
                raise RegistryError(
                    f"{path} is not MLflow's database: it holds {', '.join(sorted(tables)[:3])}; move it away, or set "
                    "MLFLOW_TRACKING_URI"
                )
            if _is_writable(path):
                database.execute("begin immediate")
    except sqlite3.Error as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: sqlite3.Error) -> RegistryError:
    if error.sqlite_errorname in ("SQLITE_BUSY", "SQLITE_LOCKED"):
        return DatabaseLockedError(f"{path} is locked by another program: end that program, or try again later")
    if error.sqlite_errorname in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return RegistryError(
            f"{path} is not a readable SQLite database ({error}): restore it from a backup, or move it away and rerun"
        )
    return RegistryError(f"{path} cannot be used ({error}): check its owner and its permissions")


def _is_writable(path: Path) -> bool:
    """Whether this process may write; a read-only store is for reading."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={'rw' if _is_writable(path) else 'ro'}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
    )


def artifact_place(folder: Path) -> str:
    """The address of the files of MLflow's runs and models in the local folder of a store."""
    return (folder / ARTIFACTS).as_uri()


def artifacts_destination(store: Store, home: Path) -> str:
    """The address at which a platform's MLflow server keeps the files of its runs and models."""
    return artifact_place(home) if store.is_local else f"{store.uri}/mlflow"


def relocate(uri: str, folder: Path) -> None:
    """Point a database that was moved or copied with its folder to the files that lie beside it now.

    MLflow records the absolute address of the files of each run and model.
    """
    path = sqlite_path(uri)
    if path is None or not path.is_file() or path.parent != folder or not _is_writable(path):
        return
    here = artifact_place(folder)
    with suppress(sqlite3.OperationalError), closing(_connect(path)) as database:  # an older database lacks tables
        found = database.execute("select distinct artifact_location from experiments").fetchall()
        for (before,) in found:
            if before and before.startswith("file:") and before.endswith(f"/{ARTIFACTS}") and before != here:
                with database:
                    for table, column in PLACES:
                        moved = (
                            f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?"
                        )
                        database.execute(moved, (here, len(before) + 1, len(before), before))
