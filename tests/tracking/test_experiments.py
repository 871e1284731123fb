"""MLflow's experiments are opened by name, also after a person has deleted one."""

from pathlib import Path

from flows.tracking.client import NOTE
from flows.tracking.experiments import KIND, TRAINING, open_experiment
from tests.services.curricula import Recorded
from tests.tracking.conftest import client


def test_an_experiment_is_created_once_and_opens_on_runs(recorded: Recorded, tmp_path: Path) -> None:
    found = client(recorded.store)
    first = open_experiment(found, "opened", tmp_path, "what it is about")
    assert open_experiment(found, "opened", None) == first and first.name == "opened" and first.deleted is None
    kept = found.get_experiment(first.experiment_id)
    assert (kept.tags[KIND], kept.tags[NOTE]) == (TRAINING, "what it is about")
    assert str(tmp_path) in kept.artifact_location
    older = found.create_experiment("older")  # by a version that did not set the kind
    assert open_experiment(found, "older", None).experiment_id == older
    assert found.get_experiment(older).tags[KIND] == TRAINING


def test_a_deleted_experiment_stays_deleted_and_another_takes_its_place(recorded: Recorded) -> None:
    found = client(recorded.store)
    first = open_experiment(found, "deleted", None)
    found.delete_experiment(first.experiment_id)
    second = open_experiment(found, "deleted", None)
    assert (second.name, second.deleted) == ("deleted 2", first.experiment_id)
    again = open_experiment(found, "deleted", None)
    assert (again.experiment_id, again.name, again.deleted) == (second.experiment_id, "deleted 2", None)
    assert found.get_experiment(first.experiment_id).lifecycle_stage == "deleted"
