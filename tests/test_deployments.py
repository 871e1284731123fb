"""The deployments `curriculum` and `stage` as flows on a real server: what a worker does of a form."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import State
from prefect.states import AwaitingRetry, Completed, Crashed, Pending, Running, Scheduled

from flows.deployments import curriculum_run, opened_store, stage_run
from flows.execution.launch import StageFailedError
from flows.form import Changes
from flows.handle import MAX_RESCUES, RESCUED
from flows.terminal import attached
from tests.services.curricula import Recorded, copied
from vectorclm.errors import ConfigError, StoreError
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans
from vectorclm.store.artifact import Store
from vectorclm.store.layout import EXPORT, STAGES

ALONE = Runtime(threads=1, retries=0)


@pytest.fixture(scope="module")
def store(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return copied(recorded, tmp_path_factory.mktemp("deployments"))


@pytest.fixture
def changes(recorded: Recorded) -> Changes:
    """The form by which `tiny` becomes the recorded experiment, but for its name."""
    return Changes(settings=recorded.experiment.model_dump(mode="json", exclude={"name"}))


@pytest.fixture(autouse=True)
def worker(store: Store, prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a worker of this store; the pool `gpu` has a worker on another machine."""
    monkeypatch.setenv("VECTORCLM_STORE", store.uri)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    prefect_client.create_work_pool(WorkPoolCreate(name="gpu", type="process"), overwrite=True)
    prefect_client.send_worker_heartbeat("gpu", "another-machine-gpu", heartbeat_interval_seconds=60)


def test_a_worker_loads_a_flow_without_torch() -> None:
    """A stage that runs torch has a process of its own."""
    task = "import sys, flows.deployments; print('prefect' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", task], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True False\n", done.stderr


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The warnings in the log of the runs."""
    with attached(kept := Kept(), {"prefect.flow_runs": logging.WARNING}):
        yield kept.lines
    logging.getLogger("prefect.flow_runs").setLevel(logging.NOTSET)


def test_a_form_reuses_what_is_finished_and_shows_the_results(
    prefect_client: SyncPrefectClient, recorded: Recorded, store: Store, changes: Changes, lines: list[str]
) -> None:
    handles = curriculum_run("tiny", changes=changes, runtime=ALONE)
    states = {name: handle["state"] for name, handle in handles.items()}
    assert states.pop(EXPORT) == "built" and set(states.values()) == {"reused"}  # the card bears the name
    assert (Path(handles[EXPORT]["uri"]) / "chat" / "README.md").is_file()
    same = {name: handle["fingerprint"] for name, handle in handles.items() if name != EXPORT}
    assert same == {name: recorded.handles[name]["fingerprint"] for name in same}
    assert any("with placement pools it runs on another-machine-gpu" in line for line in lines)
    wanted = ArtifactFilter.model_validate({"key": {"any_": ["overview"]}})
    overview = max(prefect_client.read_artifacts(artifact_filter=wanted), key=lambda found: str(found.created))
    text = str(overview.data)
    title = text.partition("\n")[0]
    assert (
        overview.description and title.startswith("## tiny ") and title.endswith(": 100 %") and str(store.root) in text
    )
    assert text.count("| reused | 100 % |") == len(STAGES) - 1 and "| world | 25.0% |" in text


def test_a_stage_is_built_alone_and_again_to_the_byte(recorded: Recorded, store: Store, changes: Changes) -> None:
    elsewhere = ALONE.model_copy(update={"placement": "pools"})  # it is placed already: it runs here
    assert list(stage_run("tokenizer", "tiny", changes, runtime=elsewhere)) == ["tokenizer"]
    again = stage_run("tokenizer", "tiny", changes, runtime=ALONE, again=True)
    assert again["tokenizer"]["fingerprint"] == plans(recorded.experiment)["tokenizer"].fingerprint
    assert again["tokenizer"]["state"] == "reused"


def test_a_wrong_form_or_worker_fails_and_says_why(changes: Changes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        stage_run("sample", "tiny", Changes(settings={"pretrain.batchsize": 3}), runtime=ALONE)
    with pytest.raises(StoreError, match="/nowhere"):
        monkeypatch.setenv("VECTORCLM_STORE", "/proc/nowhere")
        stage_run("sample", "tiny", changes, runtime=ALONE)
    monkeypatch.delenv("VECTORCLM_STORE")
    with pytest.raises(ConfigError, match="this worker has no store: set VECTORCLM_STORE in its environment"):
        stage_run("sample", "tiny", changes, runtime=ALONE)


def test_a_dry_run_shows_the_plan_and_builds_nothing(
    prefect_client: SyncPrefectClient, store: Store, changes: Changes
) -> None:
    before = sorted(Path(store.root).rglob("*"))
    state = curriculum_run("tiny", dry_run=True, changes=changes, settings={"seed": 99}, return_state=True)
    assert (state.name, state.message) == ("DryRun", "nothing was run: the plan is under Artifacts")
    assert sorted(Path(store.root).rglob("*")) == before
    wanted = ArtifactFilter.model_validate({"key": {"any_": ["plan"]}})
    (plan,) = prefect_client.read_artifacts(artifact_filter=wanted)
    assert f"0 of {len(STAGES)} stages are reused." in str(plan.data) and "| sample | **built** |" in str(plan.data)
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        curriculum_run("tiny", dry_run=True, settings={"pretrain.batchsize": 3})


@pytest.fixture
def run_id(prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> UUID:
    """A run of this process on the server."""
    flow_id = prefect_client.create_flow_from_name("curriculum")
    made = prefect_client.create_flow_run_from_deployment(prefect_client.create_deployment(flow_id, "rescued")).id
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(made))
    return made


@task
def a_stage() -> None:
    """Never called: a run of it is made on the server."""


def test_a_run_gives_up_after_its_last_rescue_until_a_person_retries_it(
    prefect_client: SyncPrefectClient, run_id: UUID, store: Store
) -> None:
    def enter(state: Any) -> None:
        prefect_client.set_flow_run_state(run_id, state, force=True)

    for _ in range(MAX_RESCUES):
        enter(Crashed())
        enter(Scheduled(name=RESCUED))
    assert opened_store(Runtime()).uri == store.uri
    enter(Crashed())
    enter(Scheduled(name=RESCUED))
    with pytest.raises(StageFailedError, match="this run crashed 3 times and was started again each time"):
        opened_store(Runtime())
    enter(AwaitingRetry())
    assert opened_store(Runtime()).uri == store.uri


def test_tasks_that_an_earlier_attempt_had_begun_are_shown_as_crashed(
    prefect_client: SyncPrefectClient, run_id: UUID
) -> None:
    """But not one that stands for a run in a pool, which may go on, nor one that never began."""
    prefect_client.set_flow_run_state(run_id, Running(), force=True)

    def made(*states: State[Any], key: str = "") -> UUID:
        of_a_run = a_stage.with_options()
        of_a_run.task_key = key or a_stage.task_key
        task_id = prefect_client.create_task_run(of_a_run, run_id, str(uuid4())).id
        for state in states:
            prefect_client.set_task_run_state(task_id, state, force=True)
        return task_id

    expected = {
        made(Running()): "Crashed",
        made(Running(), AwaitingRetry()): "Crashed",
        made(Running(), Completed()): "Completed",
        made(Running(), key="prefect.a_run"): "Running",
        made(Pending()): "Cancelled",
        made(Pending(name="NotReady")): "Cancelled",  # a stage after one that failed
        made(): "Cancelled",
    }
    before = {task_id: prefect_client.read_task_run(task_id).state_name for task_id in expected}
    opened_store(Runtime())  # by the first attempt itself
    assert {task_id: prefect_client.read_task_run(task_id).state_name for task_id in expected} == before
    prefect_client.set_flow_run_state(run_id, Scheduled(name=RESCUED), force=True)
    prefect_client.set_flow_run_state(run_id, Running(), force=True)
    opened_store(Runtime())
    assert {task_id: prefect_client.read_task_run(task_id).state_name for task_id in expected} == expected
