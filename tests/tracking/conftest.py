"""A store with MLflow's database in it, and an experiment to record there."""

import pytest

from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.lineage.pinning import pin
from vectorclm.store.artifact import Store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One database for all tests of this folder: a new one takes seconds to migrate."""
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="session")
def experiment() -> ExperimentConfig:
    tiny, path = load_experiment("tiny")
    pinned, _ = pin(tiny, path, None, resolve=False)
    return pinned


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
