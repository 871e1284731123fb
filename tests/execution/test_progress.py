"""The progress of a stage on a real Prefect server: a chip that follows it, lines in its log, a run that waits."""

import threading
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter
from prefect.runtime import flow_run
from prefect.states import Cancelling

from flows.execution import progress
from flows.execution.progress import live, show_waiting
from tests.services.platform import until
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
    assert shown()[0] == 51.6
    say(Tick("of_a_test", 1000, 1000, "tokens"))  # after the block
    assert shown()[0] == 51.6


def test_a_slow_stage_writes_lines_into_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CHIP_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    monkeypatch.setattr(progress, "create_progress_artifact", lambda *_, **__: 1 / 0)  # of any kind: the stage goes on
    lines, first = list[str](), threading.Event()

    def log(line: str) -> None:
        lines.append(line)
        first.set()

    with live("slow", log):
        say(Tick("slow", 1, 1_000_000, "tokens"))
        assert first.wait(60)
        say(Tick("slow", 2, 1_000_000, "tokens"))
    assert lines[0] == "slow: 1 of 1,000,000 tokens" and lines[1].startswith("slow: 2 of 1,000,000 tokens, ")
    assert lines[1].endswith(" left")
    say(Tick("slow", 3, 1_000_000, "tokens"))
    assert len(lines) == 2  # after the block nobody listens


def test_a_run_that_waits_for_the_devices_is_queued_unless_it_is_cancelled(prefect_client: SyncPrefectClient) -> None:
    names: list[str | None] = []

    def state() -> str | None:
        return prefect_client.read_flow_run(UUID(flow_run.id)).state_name

    @flow
    def waits() -> None:
        for waiting in (True, False):
            show_waiting(waiting)
            names.append(state())
        prefect_client.set_flow_run_state(UUID(flow_run.id), Cancelling(), force=True)
        show_waiting(True)
        names.append(state())

    waits(return_state=True)
    assert names == ["Queued", "Running", "Cancelling"]
