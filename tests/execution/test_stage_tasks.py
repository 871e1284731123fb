"""Stages as tasks of a real flow: reused, built, rebuilt and compared, placed elsewhere, waited for, or failed."""

import errno
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.deployments import curriculum_run, stage_run
from flows.execution import placement, stage_tasks
from flows.execution.launch import StageCancelledError, StageFailedError, StageInterruptedError
from flows.execution.stage_tasks import Stages, _failure, default_workers, may_help
from flows.form import Changes, chosen
from flows.handle import Handle
from tests.services.curricula import Recorded, copied
from tests.services.platform import until
from vectorclm.config import ExperimentConfig, changed
from vectorclm.errors import ConfigError, CorruptArtifactError, DataError, StoreError
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, stages_of
from vectorclm.store.artifact import Store
from vectorclm.store.layout import EXPORT
from vectorclm.store.removal import claimed, plan_removal

ALONE = Runtime(threads=1, retries=0)


@pytest.fixture(scope="module")
def store(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A copy of the finished curriculum, from which tests remove artifacts."""
    return copied(recorded, tmp_path_factory.mktemp("stages"))


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class Ran:
    """The stages that ran as tasks of one flow."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client, self.run_id = client, ""

    def __call__(
        self,
        experiment: ExperimentConfig,
        store: Store,
        *names: str,
        runtime: Runtime = ALONE,
        again: str | None = None,
    ) -> dict[str, Handle]:
        @flow
        def some_stages() -> dict[str, Handle]:
            self.run_id = str(flow_run.id)
            with Stages(experiment, runtime, store.uri, None, again) as stage:
                submitted: dict[str, Any] = {}
                for row in stages_of(experiment):
                    if not names or row.name in names:
                        before = [submitted[name] for name in row.inputs_of(experiment) if name in submitted]
                        submitted[row.name] = stage(row.name, *before)
                return stage.handles()

        return some_stages()

    def states(self) -> dict[str, str | None]:
        mine = FlowRunFilter.model_validate({"id": {"any_": [self.run_id]}})
        return {task.name: task.state_name for task in self.client.read_task_runs(flow_run_filter=mine)}


@pytest.fixture
def ran(prefect_client: SyncPrefectClient) -> Ran:
    return Ran(prefect_client)


def remove(store: Store, experiment: ExperimentConfig, stage: str) -> Path:
    folder = Path(store.root, stage, plans(experiment)[stage].fingerprint)
    shutil.rmtree(folder)
    return folder


def test_finished_stages_are_reused_and_one_is_rebuilt_to_the_byte(ran: Ran, recorded: Recorded, store: Store) -> None:
    handles = ran(recorded.experiment, store, again=EXPORT)
    assert {name: handle["state"] for name, handle in handles.items()} == dict.fromkeys(handles, "reused")
    expected = {**dict.fromkeys(handles, "Reused"), EXPORT: "Reproduced"}
    until(lambda: ran.states() == expected, "the states of all tasks are shown", 30)
    assert list(handles) == [row.name for row in stages_of(recorded.experiment)]
    page = Path(store.root, "reports", f"{handles[EXPORT]['fingerprint']}.html")
    assert "mini: chat model" in page.read_text()
    mine = ArtifactFilter.model_validate({"key": {"any_": ["page"]}, "flow_run_id": {"any_": [ran.run_id]}})
    (link,) = ran.client.read_artifacts(artifact_filter=mine)
    assert str(page) in str(link.data)


def test_what_is_missing_or_damaged_is_built_here_or_in_a_process_of_its_own(
    ran: Ran, recorded: Recorded, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another run builds one of them at first: it is waited for, and what follows reads stays meanwhile."""
    monkeypatch.setattr(stage_tasks, "WAIT_SECONDS", 0.1)
    missing = remove(store, recorded.experiment, "tokenizer")
    scores = Path(store.root, "evaluate_base", plans(recorded.experiment)["evaluate_base"].fingerprint, "scores.json")
    before = scores.read_bytes()
    scores.write_text("{}")
    lease = plans(recorded.experiment)["tokenizer"].lease
    with caplog.at_level(logging.INFO, "flows"), ThreadPoolExecutor(1) as other:
        with store.lease(lease, []):
            done = other.submit(ran, recorded.experiment, store, "sample", "tokenizer", "evaluate_base")
            until(lambda: "another run builds it already, so this one waits" in caplog.text, "it waits", 60)
            with claimed(store, plan_removal("mini", store)) as stays:
                reasons = {folder.partition("/")[0]: why for folder, why in stays.items()}
            assert reasons["pretrain"] == reasons["sample"] == "a running process builds from it"
        handles = done.result(120)
    assert {name: handle["state"] for name, handle in handles.items()} == {
        "sample": "reused", "tokenizer": "built", "evaluate_base": "built"
    }  # fmt: skip
    assert (missing / "tokenizer.json").is_file() and scores.read_bytes() == before
    assert "evaluate_base is built again now" in caplog.text and "tokenizer built in " in caplog.text


def test_a_stage_that_fails_is_named_with_what_to_do(ran: Ran, recorded: Recorded, store: Store) -> None:
    size = 60_000  # more than the text can yield
    large = changed(recorded.experiment, {"tokenizer.vocab_size": size, "model.vocab_size": size})
    with pytest.raises(StageFailedError, match=r"^stage tokenizer failed: .*\nFinished stages are kept") as told:
        ran(large, store, "sample", "tokenizer", "shards")
    assert str(told.value).endswith("; fix it and run the same command again.")
    expected = {"sample": "Reused", "tokenizer": "Failed", "shards": "NotReady"}
    until(lambda: ran.states() == expected, "the states of all tasks are shown", 30)


def test_a_stage_in_a_pool_is_built_by_its_worker(
    ran: Ran, recorded: Recorded, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test plays a worker that ends well, but built nothing; then one that built it; then one that failed."""
    monkeypatch.setattr(placement, "POLL_SECONDS", 0.05)
    flow_id = ran.client.create_flow_from_name("stage")
    ran.client.create_deployment(flow_id, "tokenizer")
    kept = Path(store.root, "kept")
    missing = Path(store.root, "tokenizer", plans(recorded.experiment)["tokenizer"].fingerprint)
    pools = ALONE.model_copy(update={"placement": "pools"})

    def finished(*, built: bool, fails: bool = False) -> dict[str, Handle]:
        with ThreadPoolExecutor(1) as other:
            ran.run_id = ""
            done = other.submit(ran, recorded.experiment, store, "tokenizer", runtime=pools)
            until(lambda: ran.run_id or done.done(), "the flow runs", 60)
            tags = FlowRunFilter.model_validate({"tags": {"all_": [f"part of {ran.run_id}", "stage tokenizer"]}})
            (run,) = until(lambda: ran.client.read_flow_runs(flow_run_filter=tags), "its run is there", 60)
            assert run.parameters["runtime"]["placement"] == "inline" and run.parameters["again"] is False
            changes = Changes.model_validate(run.parameters["changes"])
            assert chosen(run.parameters["experiment"], changes)[0] == recorded.experiment  # which has no file there
            if built:
                kept.rename(missing)
            ran.client.set_flow_run_state(run.id, Failed(message="no disk") if fails else Completed(), force=True)
            return done.result(60)

    missing.rename(kept)
    with pytest.raises(StageFailedError, match=r"tokenizer ended without an error, but .* lacks"):
        finished(built=False)
    with pytest.raises(StageFailedError, match="stage tokenizer failed: no disk"):
        finished(built=False, fails=True)
    assert finished(built=True)["tokenizer"]["state"] == "built"


def task_run(name: str) -> TaskRun:
    return TaskRun(name=name, task_key=name, dynamic_key="0")


def test_a_retry_helps_where_the_store_or_the_machine_failed() -> None:
    passing = (StoreError("s"), OSError("o"), ConnectionError("c"), StageInterruptedError("killed"))
    lasting = (DataError("d"), ConfigError("c"), StageFailedError("f"), StageCancelledError("c"), ValueError("v"))
    damaged = CorruptArtifactError("damaged")
    found = {
        type(error): may_help(None, task_run("sample"), Failed(data=error))  # type: ignore[arg-type]
        for error in (*passing, *lasting, damaged)
    }
    assert found == {type(error): error in passing for error in (*passing, *lasting, damaged)}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("no text"), "no text\nFinished .*; fix it and run the same command again"),
        (StoreError("no bucket"), "no bucket\nFinished .*; fix it and run the same command again"),
        (PermissionError("denied"), "PermissionError: denied\nFinished .*; fix it and run the same command again"),
        (KeyError("x"), "KeyError: 'x'\nFinished .*; this is a bug of the program; --verbose shows where"),
    ],
)
def test_a_failure_says_what_to_do(error: Exception, message: str) -> None:
    with pytest.raises(StageFailedError, match=f"^stage sample failed: {message}.$"):
        raise _failure("sample", error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left", "/store/x"),
            r"^stage sample failed: no space left while writing /store/x: ",
        ),
        (
            DataError("no text"),
            r"Retry on the page of this run in Prefect, or run `vectorclm retry {run} --store '/a store'`;",
        ),
        (
            ConfigError("no such key"),
            r"with another setting, run `vectorclm retry {run} --store '/a store' --set KEY=VALUE`\.$",
        ),
        (KeyError("x"), r"this is a bug of the program; the log of this run shows where\.$"),
    ],
)
def test_a_failure_on_the_platform_names_the_button_and_the_command(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTORCLM_STORE", "/a store")
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4())
    context = FlowRunContext.model_construct(flow=curriculum_run, flow_run=run, parameters={})
    with context, pytest.raises(StageFailedError, match=message.format(run=run.id)):
        raise _failure("sample", error)
    alone = FlowRunContext.model_construct(flow=stage_run, flow_run=run, parameters={})
    with (
        alone,
        pytest.raises(StageFailedError, match="on the page of this run in Prefect, or start a custom run"),
    ):
        raise _failure("sample", DataError("no text"))


def test_two_cores_are_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((None, 1), (1, 1), (2, 1), (8, 4)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert default_workers() == workers
