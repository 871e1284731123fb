"""Files of MLflow's runs: find those of a platform's server also while the server is down.

The server names the place of its runs' files `mlflow-artifacts:/…`, which clients anywhere read and write through it.
While it is down, commands use its SQLite database themselves, and MLflow refuses such an address: here it becomes the
place in which the server keeps the files.
"""

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry, get_artifact_repository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.tracking import get_tracking_uri

from flows.paths import local_folder
from flows.tracking.database import artifacts_destination, sqlite_path
from vectorclm.store.artifact import Store

SCHEME = "mlflow-artifacts"
_destinations: dict[str, str] = {}  # address of a database -> where the server on it keeps files


def open_client(uri: str, store: Store) -> MlflowClient:
    """A client of MLflow at `uri`: a server, or the database of the store's home; this one finds a server's files."""
    if sqlite_path(uri) is not None:
        _destinations[uri] = artifacts_destination(store, local_folder(store))
        _artifact_repository_registry.register(SCHEME, _repository)  # type: ignore[no-untyped-call]
    return MlflowClient(uri)


def _repository(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> ArtifactRepository:
    """The files at an address of the scheme: as MLflow has them, or of a known database at their place."""
    destination = _destinations.get(tracking_uri or get_tracking_uri())
    if destination is None:
        return MlflowArtifactsRepository(artifact_uri, tracking_uri, registry_uri)
    path = PurePosixPath(urlsplit(artifact_uri).path.strip("/"))
    if ".." in path.parts:
        raise MlflowException(f"{artifact_uri} leads out of {destination}")
    place = destination if path == PurePosixPath() else f"{destination}/{path}"
    return get_artifact_repository(place, tracking_uri=tracking_uri, registry_uri=registry_uri)
