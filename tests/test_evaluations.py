"""The deployment `evaluate` as a flow on a real server: measured once, compared, recorded, and a fall reported."""

import json
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.flow_engine import run_flow
from prefect.states import Pending

from flows.evaluations import _compare, evaluate_run, table
from flows.handle import FELL
from flows.reports.report import write_report
from flows.tracking.histories import HISTORIES
from flows.tracking.registry import EVALUATIONS, Registry, RegistryError, Result, series
from tests.services.curricula import Recorded, copied
from tests.services.platform import until
from tests.tracking.test_registry import measured
from vectorclm.comparison.config import Limits
from vectorclm.errors import DataError
from vectorclm.evaluation.statistics import Figure
from vectorclm.runtime.devices import Runtime
from vectorclm.store.artifact import Store

CANDIDATE = "models:/vectorclm-chat@candidate"
LIMITS = Limits(items=5, documents=2, prompts=1, max_new_tokens=4)
ALONE = Runtime(threads=1, retries=0)


@pytest.fixture(scope="module")
def store(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return copied(recorded, tmp_path_factory.mktemp("evaluations"))


@pytest.fixture(autouse=True)
def worker(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a worker of this store, whose MLflow is the store's database."""
    monkeypatch.setenv("VECTORCLM_STORE", store.uri)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def rows(client: SyncPrefectClient, key: str) -> list[dict[str, str]]:
    """The newest table with this key."""
    wanted = ArtifactFilter.model_validate({"key": {"any_": [key]}})
    tables = sorted(client.read_artifacts(artifact_filter=wanted), key=lambda found: str(found.created))
    return list(json.loads(str(tables[-1].data)))


def artifacts(client: SyncPrefectClient, key: str) -> list[str]:
    """The artifacts with this key, oldest first."""
    wanted = ArtifactFilter.model_validate({"key": {"any_": [key]}})
    found = sorted(client.read_artifacts(artifact_filter=wanted), key=lambda found: str(found.created))
    return [str(one.data) for one in found]


def report_with_histories(registry: Registry, store: Store) -> str:
    """The report of the base model, as the command writes it."""
    address = registry.find("models:/vectorclm-base@candidate").address
    with tempfile.TemporaryDirectory() as folder:
        write_report(address, store, None, Path(folder) / "page.html")
        return (Path(folder) / "page.html").read_text()


def recorded_runs(store: Store, model: str) -> int:
    client = Registry(store).client
    place = client.get_experiment_by_name(EVALUATIONS)
    return len(client.search_runs([place.experiment_id], f"tags.title = '{model}'"))


def test_a_model_is_measured_once_and_shown_and_recorded(prefect_client: SyncPrefectClient, store: Store) -> None:
    first = evaluate_run(CANDIDATE, "tiny", LIMITS, "", ALONE, return_state=True)
    assert first.name == "Completed" and str(first.message).startswith(f"measured: {store.uri}/measure/")
    found: dict[str, Any] = first.result()
    assert found["scores"]["tasks"]["world"]["items"] == 5
    (row,) = rows(prefect_client, "evaluation-vectorclm-chat-candidate-tiny")
    assert row["model"] == "vectorclm-chat 1" and row["acc.world"].startswith(
        f"{found['scores']['tasks']['world']['acc']:.4f} ± "
    )
    again = evaluate_run(CANDIDATE, "tiny", LIMITS, "", ALONE, return_state=True)
    assert (again.name, again.message) == ("Reused", f"measured already: {found['uri']}")
    assert again.result() == found and rows(prefect_client, "evaluation-vectorclm-chat-candidate-tiny") == [row]
    assert recorded_runs(store, "vectorclm-chat 1") == 1


@pytest.mark.usefixtures("prefect_client")
def test_a_model_that_is_nowhere_fails_the_run() -> None:
    with pytest.raises(DataError, match="there is no folder /nowhere/at/all"):
        evaluate_run("/nowhere/at/all", "tiny", LIMITS, "", ALONE)


def test_a_schedule_of_a_model_that_was_removed_is_named_by_its_failed_run(prefect_client: SyncPrefectClient) -> None:
    made = prefect_client.create_deployment(prefect_client.create_flow_from_name("evaluate"), "of a removed model")
    every = IntervalSchedule(interval=timedelta(days=1), anchor_date=datetime.now(UTC) + timedelta(minutes=1))
    gone = {"model": "models:/vectorclm-chat@gone", "suite": "tiny"}
    prefect_client.create_deployment_schedules(made, [(every, True)], parameters=gone, slug="nightly of gone")
    prefect_client.request("POST", "/deployments/{id}/schedule", path_params={"id": made}, json={})
    mine = FlowRunFilter.model_validate({"deployment_id": {"any_": [made]}})
    run = min(prefect_client.read_flow_runs(flow_run_filter=mine), key=lambda run: str(run.expected_start_time))
    prefect_client.set_flow_run_state(run.id, Pending(), force=True)
    state = run_flow(evaluate_run, flow_run=run, parameters={**gone, "runtime": ALONE}, return_type="state")
    assert state.is_failed() and prefect_client.read_flow_run(run.id).state_name == "Failed"
    message = str(state.message)
    assert "has no models:/vectorclm-chat@gone" in message and "\n" not in message
    assert message.endswith("end the schedule that evaluates it with `vectorclm schedule remove 'nightly of gone'`")
    prefect_client.delete_deployment(made)


def fell(client: SyncPrefectClient, model: str) -> list[dict[str, Any]]:
    """The events that scores of a model on the suite `s` fell."""
    wanted = {"event": {"name": [FELL]}, "resource": {"id": [f"vectorclm.evaluation-{model}-s"]}}
    answer = client.request("POST", "/events/filter", json={"filter": wanted})
    return [event["payload"] for event in answer.json()["events"]]


def test_a_fall_beyond_the_noise_is_reported_and_recorded_once(
    prefect_client: SyncPrefectClient, recorded: Recorded, store: Store
) -> None:
    registry = Registry(store)
    subject = registry.find("models:/vectorclm-base@candidate")

    @flow
    def compares(accuracy: float, digit: str) -> None:
        _compare(registry, subject, measured(recorded, accuracy, digit), needed=True)

    for accuracy, digit in ((0.9, "a"), (0.88, "b"), (0.2, "c"), (0.2, "c")):
        compares(accuracy, digit)
    newest, middle, oldest = rows(prefect_client, "evaluation-vectorclm-base-candidate-s")
    assert newest["acc.world"].endswith("(-0.6800, worse, beyond noise)") and newest["acc.code"] == "not run"
    assert middle["acc.world"].endswith("(-0.0200, within noise)") and oldest["acc.world"] == "0.9000 ± 0.0500"
    assert recorded_runs(store, "vectorclm-base 1") == 3
    (event,) = until(lambda: fell(prefect_client, "vectorclm-base-candidate"), "the fall is an event", 60)
    assert event["title"] == "vectorclm-base 1 scores worse than vectorclm-base 1 on s"
    assert [fall["task"] for fall in event["falls"]] == ["acc.world"]
    assert "acc.world: 0.8800 -> 0.2000 (noise " in event["text"]

    charts = artifacts(prefect_client, "scores-vectorclm-base-candidate-s")
    assert len(charts) == 4 and "| acc.world | 0.2000 | 0.1020 to 0.2980 | 0.8800 |" in charts[-1]
    assert "![vectorclm-base@candidate on s: scores over time](data:image/svg+xml;base64," in charts[-1]
    page = (store.read(f"reports/{series('vectorclm-base@candidate', {'suite': 's'})}.html") or b"").decode()
    assert page.count("<tr>") == 4 and "0.1020 to 0.2980" in page
    client = registry.client
    place = client.get_experiment_by_name(HISTORIES).experiment_id
    (run,) = client.search_runs([place], "attributes.run_name = 'vectorclm-base@candidate on s'")
    points = client.get_metric_history(run.info.run_id, "acc.world")
    assert [point.value for point in sorted(points, key=lambda point: point.step)] == [0.9, 0.88, 0.2]
    report = report_with_histories(registry, store)
    assert ">Scores over time<" in report and 'aria-label="vectorclm-base@candidate on s: scores over time"' in report


def test_a_result_is_kept_without_mlflow_unless_the_model_came_from_there(
    prefect_client: SyncPrefectClient, recorded: Recorded, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Registry(store)
    subject = registry.find("/some/folder")

    @flow
    def compares(needed: bool) -> None:
        _compare(registry, subject, measured(recorded, 0.5, "d"), needed=needed)

    compares(False)
    (row,) = rows(prefect_client, "evaluation-some-folder-s")
    assert (row["model"], row["acc.world"]) == ("/some/folder", "0.5000 ± 0.0503")
    with pytest.raises(RegistryError, match="does not answer"):
        compares(True)


def test_an_evaluation_is_done_also_where_its_chart_cannot_be_kept(
    prefect_client: SyncPrefectClient, recorded: Recorded, tmp_path: Path
) -> None:
    own = copied(recorded, tmp_path)
    registry = Registry(own)
    subject = registry.find("models:/vectorclm-base@candidate")
    shutil.rmtree(Path(own.root) / "reports", ignore_errors=True)
    (Path(own.root) / "reports").write_text("a file in the place of the folder of reports")

    @flow
    def compares() -> None:
        _compare(registry, subject, measured(recorded, 0.5, "e"), needed=True)

    state = compares(return_state=True)
    assert state.is_completed()
    assert recorded_runs(own, "vectorclm-base 1") == 1
    mine = LogFilter.model_validate({"flow_run_id": {"any_": [state.state_details.flow_run_id]}})
    until(
        lambda: any(
            "adds this result to the scores over time" in line.message for line in prefect_client.read_logs(mine)
        ),
        "the log says so",
        30,
    )


def test_a_task_that_could_not_run_stands_in_the_table_as_such() -> None:
    scores = {"acc.world": Figure(0.5, 0.1)}
    result = Result("m", datetime(2026, 1, 2, tzinfo=UTC), "f", scores)
    (row,) = table([result], ["code"])
    assert row["acc.code"] == "not run" and row["acc.world"] == "0.5000 ± 0.1000"
