"""Evaluations on the platform, for real: the form, the table, MLflow, and a fall that reaches a web server."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import yaml
from mlflow import MlflowClient
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.objects import State
from prefect.events import Event, Resource
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import AwaitingRetry, Cancelling, Crashed, Running
from pydantic import SecretStr
from selenium.webdriver.remote.webdriver import WebDriver

from flows.deployments import opened_store
from flows.execution.launch import StageFailedError
from flows.form import Changes, chosen
from flows.handle import FELL, MAX_RESCUES, RUN_FAILED
from flows.platform import provision
from flows.platform.deployment_file import PREFECT_FILE
from flows.platform.notify import NOTIFICATION, WHAT
from flows.platform.provision import _notification
from flows.tracking.registry import EVALUATIONS
from tests.conftest import chromium, in_turn
from tests.services.browser import says
from tests.services.evaluations import (
    LIMITS,
    RUNTIME,
    history_page,
    register_untrained,
    rows,
    schedule_ends,
    scheduled,
    set_schedule,
    shows_history,
    start,
)
from tests.services.inbox import Inbox, open_inbox
from tests.services.platform import Platform, listening, platform_at, until
from vectorclm.runtime.devices import Runtime

CANDIDATE, OWN = "models:/vectorclm-chat@candidate", "vectorclm-chat@candidate on tiny"
SMALL = {
    "pretrain": {"tokens": 32_768},
    "finetune": {"epochs": 0.02},
    "evaluate": {"chat_prompts": 3},
    # of its own evaluation; the suite is that of the file
    "settings": {"evaluate.tasks.0.limit": 8, "evaluate.tasks.1.limit": 8},
}
QUICK = {"model": CANDIDATE, "suite": "tiny", "limits": LIMITS, "runtime": RUNTIME}  # of a scheduled evaluation


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    with open_inbox() as kept:
        yield kept


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform on which a very small curriculum has ended."""
    with platform_at(tmp_path_factory.mktemp("schedules") / "store", by_unit=True) as made:
        run_id = made.start(experiment="tiny", changes=SMALL, runtime=RUNTIME)
        assert made.ended(run_id) == "Completed"
        yield made


@in_turn(0, 2)
def test_schedules_are_as_in_the_file_and_what_the_ui_switched_or_added_stays(platform: Platform, inbox: Inbox) -> None:
    file = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))
    (wanted,) = (item["schedules"] for item in file["deployments"] if item["name"] == "evaluate")
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    found = {schedule.slug: schedule for schedule in deployment.schedules}
    assert set(found) == {item["slug"] for item in wanted} == {"nightly-chat", "weekly-base"}
    for item in wanted:
        schedule = found[item["slug"]]
        assert (schedule.schedule.cron, schedule.schedule.timezone) == (item["cron"], item["timezone"])
        assert (schedule.active, schedule.parameters) == (item["active"], item["parameters"])

    platform.client.update_deployment_schedule(deployment.id, found["weekly-base"].id, active=True)
    new_year = ("--suite", "tiny", "--cron", "0 0 1 1 *")
    made = platform.command("schedule", "evaluate", "vectorclm-chat@candidate", *new_year)
    assert made.stdout.startswith(f"{OWN}: next runs "), made.stderr
    nobody = platform.command("doctor", environment={"VECTORCLM_NOTIFY": "webhook/team"})
    assert nobody.returncode == 1 and "Prefect has no block webhook/team" in nobody.stdout
    with platform.addressed():
        Webhook(url=inbox.url).save("team")
    done = platform.command("doctor", environment={"VECTORCLM_NOTIFY": "webhook/team"})
    assert done.returncode == 0 and f"automation created: {NOTIFICATION}" in done.stdout
    assert f"the block webhook/team is notified of {WHAT}" in done.stdout
    again = platform.client.read_deployment_by_name("evaluate/evaluate").schedules
    active = {schedule.slug: schedule.active for schedule in again}
    assert active == {"nightly-chat": False, "weekly-base": True, OWN: True}
    (added,) = (schedule.id for schedule in again if schedule.slug == OWN)
    platform.client.delete_deployment_schedule(deployment.id, added)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "models:/vectorclm-chat"}, "model"),
        ({"model": "a/relative/path"}, "model"),
        ({"suite": "huge"}, "suite"),
        ({"limits": {"documents": 1}}, "limits.documents"),
        ({"limits": {"item": 3}}, "item"),
    ],
)
def test_bad_values_are_refused_at_the_form(platform: Platform, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefectHTTPStatusError) as refused:
        start(platform, **parameters)
    assert message in refused.value.response.text


def test_a_wrong_address_fails_and_says_why(platform: Platform, inbox: Inbox) -> None:
    runs = {
        "models:/vectorclm-chat@champion": "has no models:/vectorclm-chat@champion",
        "/nowhere/at/all": "there is no folder /nowhere/at/all",
    }
    ids = {start(platform, model=model): message for model, message in runs.items()}
    for run_id, message in ids.items():
        assert platform.ended(run_id) == "Failed"
        state = platform.run(run_id).state
        assert state is not None and message in (state.message or "")
        told = lambda: [each for each in inbox.messages if each.get("run_id") == str(run_id)]  # noqa: B023, E731
        assert [each["event"] for each in until(told, "the failure is told")] == [RUN_FAILED]


def test_a_model_is_measured_once_shown_recorded_and_its_fall_is_told(
    platform: Platform, inbox: Inbox, tmp_path: Path
) -> None:
    assert platform.ended(start(platform, model=CANDIDATE)) == "Completed"
    (first,) = rows(platform)
    assert first["model"] == "vectorclm-chat 1"
    names = {"acc.world", "acc.world-two-step", "bits_per_byte.stories", "bits_per_byte.lessons", "in_template"}
    assert set(first) == {"model", "measured", *names}
    again = start(platform, model=CANDIDATE)
    assert platform.ended(again) == "Reused"
    assert platform.tasks(again) == {"measure": ["Reused"]}
    assert rows(platform) == [first]

    mlflow = MlflowClient(platform.config.mlflow_url)
    version = mlflow.get_model_version_by_alias("vectorclm-chat", "candidate")
    tiny = mlflow.get_experiment_by_name("tiny").experiment_id
    (chat,) = mlflow.search_logged_models([tiny], f"tags.fingerprint = '{version.tags['fingerprint']}'")
    model = mlflow.get_logged_model(chat.model_id)
    on_model = {metric.key: metric.value for metric in model.metrics}
    assert first["acc.world"].startswith(f"{on_model['acc.world']:.4f} ± {on_model['stderr.acc.world']:.4f}")
    experiment = mlflow.get_experiment_by_name(EVALUATIONS)
    (run,) = mlflow.search_runs([experiment.experiment_id])  # a reused result is not recorded again
    assert names <= set(run.data.metrics)
    assert [item.model_id for item in mlflow.get_run(run.info.run_id).inputs.model_inputs] == [chat.model_id]

    register_untrained(platform, mlflow, tmp_path / "untrained")
    assert platform.ended(start(platform, model=CANDIDATE)) == "Completed"
    (message,) = until(lambda: [each for each in inbox.messages if each["event"] == FELL], "the fall is told")
    assert message["title"] == "vectorclm-chat 2 scores worse than vectorclm-chat 1 on tiny"
    falls = {fall["task"]: fall for fall in message["falls"]}
    assert {"bits_per_byte.stories", "bits_per_byte.lessons"} <= set(falls)
    for fall in falls.values():
        assert abs(fall["after"] - fall["before"]) > fall["noise"] >= 0
    assert platform.config.prefect_url in message["links"][0]
    newest, oldest = rows(platform)
    assert oldest == first and newest["model"] == "vectorclm-chat 2"
    assert "worse, beyond noise" in newest["bits_per_byte.stories"]
    assert "vectorclm-chat 1" in (page := history_page(platform)) and "vectorclm-chat 2" in page


def test_a_block_for_messages_tells_a_fall_as_text(platform: Platform, inbox: Inbox) -> None:
    """Prefect sends to each of its kinds, e-mail among them, a subject and a text; this one posts them as they are."""
    told: list[str] = []
    texts = {"subject": "{{subject}}", "text": "{{body}}"}
    with platform.addressed():
        CustomWebhookNotificationBlock(name="team", url=inbox.url, json_data=texts).save("words")
    unknown, words = (
        platform.config.model_copy(update={"vectorclm_notify": SecretStr(name)})
        for name in ("secret/words", "custom-webhook/words")
    )
    assert _notification(platform.client, unknown, told.append) is not None  # no such block: nothing changes
    assert _notification(platform.client, words, told.append) is None
    assert told == [f"automation repaired: {NOTIFICATION}"]
    inbox.messages.clear()
    payload = {"title": "this scores worse", "text": "this scores worse\nacc.world: 0.9 -> 0.4"}
    resource = Resource({"prefect.resource.id": "vectorclm.evaluation-of-a-test"})

    def sent() -> list[dict[str, Any]]:
        """What was posted; the server may take an event for the automation as it was before the repair."""
        event = Event(occurred=datetime.now(UTC), event=FELL, resource=resource, payload=payload)
        platform.client.request("POST", "/events", json=[event.model_dump(mode="json")])
        return [each for each in inbox.messages if each.get("subject") == payload["title"]]

    message = until(sent, "the fall is told")[0]
    assert payload["text"] in message["text"]


@in_turn(1, 2)
def test_a_schedule_set_by_the_request_of_the_page_starts_runs(platform: Platform) -> None:
    """Two runs that the scheduler made, on the interval of the schedule, each an evaluation that ends well."""
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    schedule = {"active": True, "slug": "by-request", "schedule": {"interval": 10}, "parameters": QUICK}
    with schedule_ends(platform, "by-request"):
        made = platform.client.request(
            "POST", "/deployments/{id}/schedules", path_params={"id": deployment.id}, json=[schedule]
        )
        assert made.status_code == 201
        until(lambda: len(scheduled(platform, "by-request")) >= 2, "two runs of the schedule end")
        runs = scheduled(platform, "by-request")
    assert all(run.auto_scheduled and QUICK.items() <= run.parameters.items() for run in runs)
    starts = sorted(run.expected_start_time.timestamp() for run in runs if run.expected_start_time is not None)
    assert all(round(later - earlier) % 10 == 0 for earlier, later in pairwise(starts))


@pytest.fixture
def window() -> Iterator[WebDriver]:
    made = chromium(1400, 1500)
    yield made
    made.quit()


@in_turn(1, 2)
@in_turn(0, 2)
def test_a_schedule_set_in_the_page_starts_runs(platform: Platform, window: WebDriver) -> None:
    """A person adds a schedule to the deployment; the page says so, and two runs of it end well."""
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    place = {"id": deployment.id}
    platform.client.request("PATCH", "/deployments/{id}", path_params=place, json={"parameters": QUICK})
    try:
        with schedule_ends(platform, "by-page"):
            set_schedule(platform, window, "by-page")
            until(lambda: says(window, "by-page"), "the page shows the schedule", 60)
            until(lambda: len(scheduled(platform, "by-page")) >= 2, "two runs of the schedule end")
        until(lambda: shows_history(platform, window), "the page shows the scores over time", 60)
    finally:
        before = {"parameters": deployment.parameters}
        platform.client.request("PATCH", "/deployments/{id}", path_params=place, json=before)


def test_no_other_machine_is_listened_to(platform: Platform) -> None:
    found = listening(platform)
    assert {"prefect-server", "mlflow"} <= set(found) and set.union(*found.values()) == {"127.0.0.1"}


def test_a_stage_is_a_deployment_of_its_own_in_the_store_of_the_commands(platform: Platform) -> None:
    """What a form made is found by a command to which the environment names the store."""
    deployment = platform.client.read_deployment_by_name("stage/sample")
    settings = {"sample.bytes": 300_000, "world.documents": 300, "seed": 9}
    parameters = {"changes": {"seed": settings.pop("seed"), "settings": settings}}
    run = platform.client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    assert platform.ended(run.id) == "Completed"
    assert platform.tasks(run.id) == {"sample": ["Completed"]}
    changes = [part for key, value in {**settings, "seed": 9}.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "vectorclm", "sample", "tiny", *changes]
    environment = {**os.environ, "VECTORCLM_STORE": platform.config.vectorclm_store}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"sample reused: {platform.config.vectorclm_store}/sample/"), done.stderr


def test_an_experiment_of_ones_own_shows_on_the_platform_and_reuses_what_was_finished_there(
    platform: Platform, tmp_path: Path
) -> None:
    """Started from the command line, with the platform's addresses."""
    own = chosen("tiny", Changes.model_validate(SMALL))[0].model_copy(update={"name": "own"})
    (tmp_path / "own.json").write_text(own.model_dump_json())
    command = [sys.executable, "-m", "flows.cli", "run", str(tmp_path / "own.json"), "--threads", "1", "--json"]
    command += ["--store", platform.config.vectorclm_store]
    environment = {**os.environ, **platform.config.client_environment()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states = {name: stage["state"] for name, stage in json.loads(done.stdout)["stages"].items()}
    assert states.pop("export") == "built" and set(states.values()) == {"reused"}  # the card bears the name
    (run,) = platform.client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"name": {"like_": "own"}}))
    assert run.name.startswith("own, ") and {"experiment: own", "from: command line"} <= set(run.tags)
    assert run.state_name == "Completed" and platform.tasks(run.id)["pretrain"] == ["Reused"]
    assert MlflowClient(platform.config.mlflow_url).get_experiment_by_name("own") is not None


def test_a_run_has_its_processes_lines_and_links_its_report(platform: Platform) -> None:
    key = ArtifactFilter.model_validate({"key": {"any_": ["page"]}})
    page = min(platform.client.read_artifacts(artifact_filter=key), key=lambda found: str(found.created))
    logs = LogFilter.model_validate({"flow_run_id": {"any_": [page.flow_run_id]}})
    lines = [line.message for line in platform.client.read_logs(log_filter=logs, limit=200)]
    assert any(line.startswith("pretrain reads lessons ") for line in lines)  # as torch's process says it
    (link,) = re.findall(r"\]\((\S+)\)", str(page.data))
    mlflow, place = MlflowClient(platform.config.mlflow_url), re.search(r"/runs/(\w+)/artifacts/(\S+)\?", link)
    assert place is not None
    report = Path(mlflow.download_artifacts(place[1], place[2])).read_text()
    assert report in [file.read_text() for file in Path(platform.config.vectorclm_store).glob("reports/*.html")]
    assert httpx.get(link.partition("#")[0]).status_code == 200


@pytest.fixture
def impatient(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The platform's automations wait ten seconds, the least that Prefect takes, and no worker starts a run."""
    told: list[str] = []

    def automate() -> None:
        for automation in provision.automations():
            provision._automation(platform.client, automation, told.append)

    for name in ("ZOMBIE_SECONDS", "RESCUE_SECONDS", "CANCEL_SECONDS"):
        monkeypatch.setattr(provision, name, 10)
    automate()
    assert len(told) == 3  # the fourth waits for nothing
    platform.client.update_work_pool("cpu", WorkPoolUpdate(is_paused=True))
    yield
    platform.client.update_work_pool("cpu", WorkPoolUpdate(is_paused=False))
    monkeypatch.undo()
    automate()


def running(platform: Platform) -> UUID:
    """A run whose process is gone, as when its machine was switched off."""
    run_id = platform.start(experiment="tiny")
    platform.client.set_flow_run_state(run_id, Running(), force=True)
    beat = Event(
        occurred=datetime.now(UTC),
        event="prefect.flow-run.heartbeat",
        resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run_id}"}),
    )
    platform.client._client.post("/events", json=[beat.model_dump(mode="json")]).raise_for_status()
    return run_id


@pytest.mark.usefixtures("impatient")
def test_the_dead_are_found_and_start_again_twice_at_most(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def becomes(run_id: UUID, name: str) -> State[Any]:
        until(lambda: platform.run(run_id).state_name == name, f"a run is {name}")
        state = platform.run(run_id).state
        assert state is not None
        return state

    run_id, unwanted = running(platform), running(platform)
    platform.client.set_flow_run_state(unwanted, Cancelling())
    assert becomes(run_id, "Crashed").message == "No heartbeat for 10 seconds: its worker or machine is gone."
    assert becomes(unwanted, "Cancelled").message == "No process of it was left."
    again = becomes(run_id, "Rescued")
    assert again.is_scheduled() and again.message == "It crashed, and starts again: finished stages are reused."
    for rescue in range(1, MAX_RESCUES + 1):
        platform.client.set_flow_run_state(run_id, Crashed(), force=True)  # as if its process had been killed each time
        if rescue < MAX_RESCUES:
            becomes(run_id, "Rescued")
    assert "It crashed 3 times within an hour" in str(becomes(run_id, "Failed").message)

    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run_id))
    with platform.addressed():
        with pytest.raises(StageFailedError, match="this run crashed 3 times and was started again each time"):
            opened_store(Runtime())  # where the crashes lie further apart, the run itself says so
        platform.client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        monkeypatch.setenv("VECTORCLM_STORE", platform.config.vectorclm_store)
        assert opened_store(Runtime()).uri == platform.config.vectorclm_store  # by Retry it begins again
    platform.client.delete_flow_run(run_id)


START = """
import sys
from flows.platform.config import read_platform

store, prefect_port, mlflow_port = sys.argv[1:]
server, _ = read_platform(None, vectorclm_store=store, prefect_port=prefect_port, mlflow_port=mlflow_port).servers()
server.start()
server.wait()
"""


def awaited(platform: Platform, run_id: UUID) -> bool:
    """Whether the database holds that an automation waits for an event of the run."""
    file = platform.config.home / ".prefect" / "prefect.db"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=60)) as database:
        query = "SELECT count(*) FROM automation_bucket WHERE bucketing_key LIKE ?"
        return bool(database.execute(query, [f"%{run_id}%"]).fetchone()[0])


@pytest.mark.usefixtures("impatient")
def test_what_fell_due_while_the_server_was_away_is_done_when_it_is_back(platform: Platform) -> None:
    run_id, due = running(platform), time.monotonic() + provision.ZOMBIE_SECONDS
    until(lambda: awaited(platform, run_id), "the automation keeps what it waits for")
    process = platform.config.servers()[0].process()
    assert process is not None
    process.kill()
    process.wait(60)
    time.sleep(max(0.0, due - time.monotonic()))  # it is away for as long as that
    ports = [str(port) for port in (platform.config.prefect_port, platform.config.mlflow_port)]
    subprocess.run([sys.executable, "-c", START, platform.config.vectorclm_store, *ports], check=True)
    until(lambda: platform.run(run_id).state_name == "Crashed", "the run without a heartbeat has crashed")
    platform.client.delete_flow_run(run_id)
