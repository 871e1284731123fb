"""Two curricula in one store, recorded by a real MLflow server."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from tests.services.curricula import curriculum
from tests.services.mlflow_server import MLflowServer
from tests.test_curriculum import mini
from vectorclm.config import ExperimentConfig, override
from vectorclm.lineage.pinning import pin
from vectorclm.store.artifact import Store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server
    server.stop()


def pinned(*changes: str) -> ExperimentConfig:
    """The experiment of these tests."""
    return pin(override(mini(), changes), Path("mini.toml"), None, resolve=False)[0]


@pytest.fixture(scope="module")
def world(server: MLflowServer, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two curricula that differ in the epochs of fine-tuning, built for the first module that asks."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "lineage-store"
    store = Store(str(tmp_path_factory.mktemp("lineage") / "store"))
    with FileLock(f"{shared}.lock"):
        if built := shared.exists():
            shutil.copytree(shared, store.root)
        first = curriculum(pinned(), store)
        second = curriculum(pinned(f"finetune.epochs={pinned().finetune.epochs / 2}"), store)
        if not built:
            shutil.copytree(store.root, f"{shared}.part")
            Path(f"{shared}.part").rename(shared)
    return SimpleNamespace(store=store, first=first, second=second)
