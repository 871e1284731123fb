"""A database of MLflow for trackers, each in an MLflow experiment of its own."""

import json

import pytest
from mlflow import MlflowClient

from flows.tracking.tracker import Tracker
from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.lineage.pinning import pin
from vectorclm.stages import plans
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


def tracker(store: Store, experiment: ExperimentConfig, name: str) -> Tracker:
    """A tracker in an MLflow experiment of its own."""
    renamed = experiment.model_copy(update={"name": name})
    return Tracker(store, renamed, plans(renamed))


def client(store: Store) -> MlflowClient:
    return MlflowClient(f"sqlite:///{store.root}/mlflow.db")


def step(number: int, loss: float) -> str:
    return json.dumps({"step": number, "tokens": 10 * number, "loss": loss, "learning_rate": 0.1}) + "\n"
