"""MLflow's experiments: open one by name, also after a person has deleted it in MLflow's UI."""

from itertools import count
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient

from flows.tracking.client import NOTE
from flows.tracking.database import artifact_place

KIND = "mlflow.experimentKind"  # the tag that decides which of its pages an experiment opens on
TRAINING = "custom_model_development"  # the kind that opens on runs, not on traces


class OpenExperiment(NamedTuple):
    """An active experiment, and the deleted one whose place it takes."""

    experiment_id: str
    name: str
    deleted: str | None = None  # the id of a deleted experiment; set only when the new one was created


def find_experiment(client: MlflowClient, name: str) -> str | None:
    """The id of the active experiment that `open_experiment` would open; None where it would create one."""
    for number in count(1):
        found = client.get_experiment_by_name(name if number == 1 else f"{name} {number}")
        if found is None or found.lifecycle_stage == "active":
            return None if found is None else str(found.experiment_id)
    raise AssertionError("count() has no end")


def open_experiment(client: MlflowClient, name: str, folder: Path | None, about: str = "") -> OpenExperiment:
    """Open the active experiment `name`, or create it; its files are kept in `folder`, or by the server.

    MLflow keeps the name of a deleted experiment, so the next one is called `name 2`. A deleted one stays deleted.
    """
    deleted: str | None = None
    for number in count(1):
        title = name if number == 1 else f"{name} {number}"
        found = client.get_experiment_by_name(title)
        if found is None:
            place = artifact_place(folder) if folder is not None else None
            tags = {KIND: TRAINING, **({NOTE: about} if about else {})}
            return OpenExperiment(str(client.create_experiment(title, place, tags)), title, deleted)
        if found.lifecycle_stage == "active":
            if KIND not in found.tags:
                client.set_experiment_tag(found.experiment_id, KIND, TRAINING)
            return OpenExperiment(str(found.experiment_id), title)
        deleted = str(found.experiment_id)
    raise AssertionError("count() has no end")
