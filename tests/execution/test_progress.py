"""The progress of a stage on a real Prefect server: a chip that follows it, lines in its log, a run that waits."""

import threading
from contextlib import suppress
from uuid import UUID

import pytest
from prefect import flow, get_run_logger, task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, LogFilter
from prefect.runtime import flow_run, task_run
from prefect.states import Cancelling

from flows.execution import progress
from flows.execution.progress import live, show_waiting
from flows.terminal import flush_logs
from tests.services.platform import until
from vectorclm.errors import DataError
from vectorclm.runtime.progress import Tick, say

pytestmark = pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow")  # the tests are no flows


def chip(client: SyncPrefectClient, stage: str) -> tuple[float, str]:
    """The share and the text that the page shows of a stage."""
    key = ArtifactFilter.model_validate({"key": {"any_": [f"{stage.replace('_', '-')}-progress"]}})
    found = client.read_artifacts(artifact_filter=key)
    return (float(str(found[0].data)), str(found[0].description)) if found else (-1.0, "")


def test_the_chip_follows_a_stage_to_its_end(
    prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "CHIP_SECONDS", 0.05)

    def shown() -> tuple[float, str]:
        return chip(prefect_client, "of_a_test")

    with live("of_a_test", print):
        for done, percent in ((0, 0.0), (500, 50.0), (515, 51.5)):
            say(Tick("of_a_test", done, 1000, "tokens", "loss 2.5  3 tokens/s"))
            say(Tick("of_another", 1, 2, "tokens"))
            until(lambda percent=percent: shown()[0] == percent, f"the chip shows {percent}", 60)
        assert shown()[1].startswith("of_a_test: 515 of 1,000 tokens, loss 2.5, 3 tokens/s, ")
        assert shown()[1].endswith(" s left")
        monkeypatch.setattr(progress, "CHIP_SECONDS", 60)  # only the end shows less than a percent
        say(Tick("of_a_test", 516, 1000, "tokens"))
    assert shown()[0] == 100.0  # the stage is done, however much it had counted
    say(Tick("of_a_test", 1, 1000, "tokens"))  # after the block
    assert shown()[0] == 100.0


def test_the_chip_of_a_stage_that_fails_stays_where_it_was(
    prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "CHIP_SECONDS", 0.05)
    with suppress(DataError), live("of_a_failure", print):
        say(Tick("of_a_failure", 500, 1000, "tokens"))
        until(lambda: chip(prefect_client, "of_a_failure")[0] == 50.0, "the chip shows the half", 60)
        monkeypatch.setattr(progress, "CHIP_SECONDS", 60)  # only the end shows less than a percent
        say(Tick("of_a_failure", 501, 1000, "tokens"))
        raise DataError("no text")
    assert chip(prefect_client, "of_a_failure")[0] == 50.1
    say(Tick("of_a_failure", 1000, 1000, "tokens"))  # after the block
    assert chip(prefect_client, "of_a_failure")[0] == 50.1


def test_a_slow_stage_writes_lines_into_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CHIP_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    monkeypatch.setattr(progress, "create_progress_artifact", lambda *_, **__: 1 / 0)  # of any kind: the stage goes on
    lines, first = list[str](), threading.Event()

    def log(line: str) -> None:
        lines.append(line)
        first.set()

    with suppress(DataError), live("slow", log):
        say(Tick("slow", 1, 1_000_000, "tokens"))
        assert first.wait(60)
        say(Tick("slow", 2, 1_000_000, "tokens"))
        raise DataError("no text")
    assert lines[0] == "slow: 1 of 1,000,000 tokens" and lines[1].startswith("slow: 2 of 1,000,000 tokens, ")
    assert lines[1].endswith(" left")
    say(Tick("slow", 3, 1_000_000, "tokens"))
    assert len(lines) == 2  # after the block nobody listens
    with live("slow", log):
        say(Tick("slow", 2, 1_000_000, "tokens"))
    assert lines[-1] == "slow: 1,000,000 of 1,000,000 tokens"


def test_the_log_of_a_task_in_prefect_says_from_which_step_a_stage_continues(prefect_client: SyncPrefectClient) -> None:
    """Once for each attempt, however often it reports, and not for a stage that begins at its beginning."""
    task_ids: list[UUID] = []

    @task
    def resumed() -> None:
        task_ids.append(UUID(str(task_run.id)))
        with live("train", get_run_logger().info):
            for done in (40, 50, 60):
                say(Tick("train", done, 60, "tokens", resumed="step 40 of 60"))
            say(Tick("another", 1, 60, "tokens", resumed="step 1 of 60"))
        with live("fresh", get_run_logger().info):
            say(Tick("fresh", 60, 60, "tokens"))
        get_run_logger().info("the end")

    def lines() -> list[str]:
        mine = LogFilter.model_validate({"task_run_id": {"any_": task_ids}})
        return [line.message for line in prefect_client.read_logs(log_filter=mine)]

    @flow
    def goes_on() -> None:
        resumed()

    goes_on()
    flush_logs()
    until(lambda: "the end" in lines(), "the log is on the server", 60)
    assert [line for line in lines() if "continues" in line] == ["train continues from step 40 of 60"]


def test_a_run_that_waits_for_the_devices_is_queued_unless_it_is_cancelled(prefect_client: SyncPrefectClient) -> None:
    names: list[tuple[str | None, str | None]] = []

    def state() -> tuple[str | None, str | None]:
        run = prefect_client.read_flow_run(UUID(flow_run.id))
        return run.state_name, run.state and run.state.message

    @flow
    def waits() -> None:
        for holder in ("the first", None):
            show_waiting(holder)
            names.append(state())
        prefect_client.set_flow_run_state(UUID(flow_run.id), Cancelling(), force=True)
        show_waiting("the first")
        names.append(state())

    waits(return_state=True)
    assert names == [
        ("Queued", "waits for the first, which uses the devices of this machine"),
        ("Running", "the devices are free now"),
        ("Cancelling", None),
    ]
