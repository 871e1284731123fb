"""The runs of one curriculum in MLflow: created once, found again, counted as attempts, closed where abandoned."""

import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.tracking.client import NotOpenError, tracking_uri
from flows.tracking.session import PARAM_BATCH, Session
from tests.services.curricula import Recorded
from vectorclm.lineage.chain import score_facts
from vectorclm.stages import plans
from vectorclm.store.artifact import Store


def session(recorded: Recorded, name: str, store: Store | None = None) -> Session:
    """A session in MLflow's experiment `name`, in the database of the recorded curriculum."""
    experiment = recorded.experiment.model_copy(update={"name": name})
    made = Session(store or recorded.store, experiment, plans(experiment), "a flow run")
    made.client = MlflowClient(tracking_uri(recorded.store))
    known = made.client.get_experiment_by_name(name)
    made.experiment_id = known.experiment_id if known is not None else made.client.create_experiment(name)
    return made


def opened(recorded: Recorded, name: str, store: Store | None = None) -> Session:
    made = session(recorded, name, store)
    made.run_ids["curriculum"] = made._create(f"{name}-curriculum", "whole", {**made.common, "stage": "curriculum"})
    return made


def test_a_run_whose_answer_was_lost_is_found_by_its_key(recorded: Recorded) -> None:
    first = opened(recorded, "lost")
    key = first.new_key()
    run_id = first.create_run(key, "sample", {"state": "building"})
    first._created.clear()  # as if the server had created it and its answer had not arrived
    assert first.create_run(key, "sample", {"state": "building"}) == run_id
    assert first.create_run(first.new_key(), "sample", {"state": "building"}) != run_id
    tags = first.client.get_run(run_id).data.tags
    assert tags["mlflow.parentRunId"] == first.parent_id and tags["prefect.flow_run_id"] == "a flow run"
    assert (tags["stage"], tags["fingerprint"]) == ("sample", first.plans["sample"].fingerprint)
    assert (tags["host"], tags["experiment"]) == (socket.gethostname(), "lost")


def test_a_run_of_another_process_is_found_by_its_artifact(recorded: Recorded) -> None:
    first, second = opened(recorded, "found"), session(recorded, "found")
    with pytest.raises(NotOpenError, match="curriculum"):
        assert second.parent_id
    assert second.run_of("sample") is None and second.attempts("sample") == 0
    for attempt, state in enumerate(("building", "failed", "reused")):
        run_id = first.create_run(first.new_key(), "sample", {"state": state})
        assert second.attempts("sample") == min(attempt + 1, 2)  # to reuse an artifact is no attempt
    assert second.run_of("sample") is not None and first.run_of("sample") == run_id
    assert first.opened("sample") == run_id
    with pytest.raises(NotOpenError, match="tokenizer"):
        first.opened("tokenizer")


def test_more_settings_than_a_request_takes_are_all_recorded(recorded: Recorded) -> None:
    made = opened(recorded, "many")
    values = {"part": {f"key{number}": number for number in range(2 * PARAM_BATCH + 5)}}
    made.log_params(made.parent_id, values)
    found = made.client.get_run(made.parent_id).data.params
    assert found == {f"part.{key}": str(value) for key, value in values["part"].items()}


def test_attempts_left_running_are_closed_by_the_machine_that_builds(recorded: Recorded, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    made = opened(recorded, "left", store)
    here = made.create_run("left-here", "sample", {"state": "building"})
    again = made.create_run("left-again", "sample", {"state": "building"})
    elsewhere = made.create_run("left-elsewhere", "sample", {"state": "building", "host": "another"})
    other = made.create_run("left-other", "tokenizer", {"state": "building", "host": "another"})

    def states() -> list[str]:
        return [made.client.get_run(run_id).info.status for run_id in (here, again, elsewhere, other)]

    assert not made.begins("sample", here) and states() == ["RUNNING"] * 4  # nobody has the lease
    with store.lease(made.plans["sample"].lease):
        assert made.begins("sample", here)
    assert states() == ["RUNNING", "RUNNING", "KILLED", "RUNNING"]
    made.end_attempts("sample", here)
    assert states() == ["RUNNING", "KILLED", "KILLED", "RUNNING"]


def test_the_most_important_scores_stand_on_the_curriculums_run(recorded: Recorded) -> None:
    made = opened(recorded, "headlines")
    for name, model in (("evaluate_base", "base"), ("evaluate", "chat")):
        scores = recorded.store.find(name, recorded.handles[name]["fingerprint"])
        assert scores is not None
        made.log_headline_metrics(name, scores)
        found = made.client.get_run(made.parent_id).data.metrics
        assert {f"{model}/{key}": value for key, value in score_facts(scores).items()}.items() <= found.items()
    assert "base/acc.world" in found and "chat/acc.world" in found
