"""Curricula in this process, recorded in MLflow, without Prefect: seconds each."""

import shutil
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient

from flows.handle import Handle, stage_handle
from flows.tracking.tracker import Tracker
from tests.test_curriculum import mini
from vectorclm.config import ExperimentConfig
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store
from vectorclm.store.layout import STAGES


class Recorded(NamedTuple):
    """A curriculum in a store, and the handles of its stages."""

    experiment: ExperimentConfig
    store: Store
    handles: dict[str, Handle]


def curriculum(experiment: ExperimentConfig, store: Store) -> dict[str, str]:
    """Run every stage in this process, recorded in MLflow. Returns the address of each artifact."""
    return {name: handle["uri"] for name, handle in handles_of(experiment, store).items()}


def handles_of(experiment: ExperimentConfig, store: Store) -> dict[str, Handle]:
    """Run every stage in this process, recorded in MLflow. Returns the handle of each."""
    handles, stages = {}, plans(experiment)
    with Tracker(store, experiment, stages) as tracker:
        for name in STAGES:
            if (found := store.find(name, stages[name].fingerprint)) is not None:
                tracker.reused(name, found)
                handles[name] = stage_handle(name, found, "reused", 0.0)
                continue
            with tracker.stage(name, 1, store.work_folder(stages[name], None)) as run:
                artifact, _ = run_stage(name, experiment, store, Runtime(threads=1), None)
                run.finished(artifact)
            handles[name] = stage_handle(name, artifact, "built", 0.0)
    return handles


def record_mini(folder: Path) -> Recorded:
    """A very small curriculum in the store `folder`, recorded in its own database of MLflow."""
    experiment, store = pin(mini(), Path("mini.toml"), None, resolve=False)[0], Store(str(folder))
    return Recorded(experiment, store, handles_of(experiment, store))


def copied(recorded: Recorded, folder: Path) -> Store:
    """A copy of a recorded curriculum's store with its record in MLflow, for tests that change it."""
    shutil.copytree(recorded.store.root, folder / "store")
    store = Store(str(folder / "store"))
    client = MlflowClient(f"sqlite:///{folder}/store/mlflow.db")
    for version in client.search_model_versions():
        if "uri" in version.tags:
            uri = version.tags["uri"].replace(recorded.store.uri, store.uri)
            client.set_model_version_tag(version.name, version.version, "uri", uri)
    return store
