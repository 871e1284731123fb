"""The operator is notified by mail and by a webhook: a real Prefect server with its attendant sends the messages."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.events import Event, Resource
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed, Failed, Scheduled
from pydantic import SecretStr

from flows.handle import MISSED, RESCUED, RUN_FAILED, RUN_RECOVERED
from flows.net import free_port
from flows.platform import machine_checks
from flows.platform.config import PlatformConfig
from flows.platform.incidents import Incidents
from flows.platform.notify import NOTIFICATION, OWN, WHAT, about, undelivered
from flows.platform.provision import _notification
from tests.services.inbox import Inbox, open_inbox
from tests.services.mailbox import Mailbox, open_mailbox
from tests.services.platform import Platform, until
from vectorclm.store.artifact import Store

DEPLOYMENT = "tiny-by-night"
PROBLEM = 'the loss is <far> above its "first" values & won\'t fall: lower the rate'


@pytest.fixture(scope="module")
def mailbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mailbox]:
    with open_mailbox(tmp_path_factory.mktemp("mail")) as kept:
        yield kept


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    with open_inbox() as kept:
        yield kept


@pytest.fixture(scope="module")
def platform(mailbox: Mailbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The Prefect server of a platform, without MLflow and workers, which a mail server knows."""
    config = PlatformConfig(
        vectorclm_store=str(tmp_path_factory.mktemp("notified") / "store"),
        prefect_port=free_port(),
        prefect_auth=SecretStr("me:of-this-test"),
        vectorclm_notify=SecretStr("mailto:team@example.org,night@example.org"),
        vectorclm_smtp_host="localhost",
        vectorclm_smtp_port=mailbox.port,
        vectorclm_smtp_user=mailbox.user,
        vectorclm_smtp_password=SecretStr(mailbox.password),
    )
    made, (server, _) = Platform(config, []), config.servers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(mailbox.certificate))  # for the server alone
        server.start()
    try:
        server.wait()
        with SyncPrefectClient(f"{config.prefect_url}/api", auth_string="me:of-this-test") as client:
            made.client = client
            yield made
    finally:
        server.stop()


@pytest.fixture
def deployment(platform: Platform) -> Iterator[UUID]:
    """A deployment whose runs no other test has."""
    made = platform.client.create_deployment(platform.client.create_flow_from_name("curriculum"), DEPLOYMENT)
    yield made
    platform.client.delete_deployment(made)


def ended(platform: Platform, deployment: UUID, *states: State[Any], name: str) -> UUID:
    """A run of the deployment that went through these states."""
    run_id = platform.client.create_flow_run_from_deployment(deployment, name=name).id
    for state in states:
        platform.client.set_flow_run_state(run_id, state, force=True)
    return run_id


def install(platform: Platform, receiver: str | None = None) -> tuple[list[str], str | None]:
    """Have a receiver notified, by default that of the settings; the changes, and the problem if there is one."""
    changes: list[str] = []
    update = {"vectorclm_notify": SecretStr(receiver)} if receiver is not None else {}
    with platform.addressed():
        problem = _notification(platform.client, platform.config.model_copy(update=update), changes.append)
    return changes, problem


def of_another_shell(platform: Platform) -> PlatformConfig:
    """The settings of a command without VECTORCLM_NOTIFY and the mail server in its environment."""
    fields = {"vectorclm_store", "prefect_port", "prefect_auth"}
    return PlatformConfig(**{name: getattr(platform.config, name) for name in fields})


def test_a_command_without_the_setting_leaves_whoever_is_notified(
    platform: Platform, mailbox: Mailbox, inbox: Inbox, deployment: UUID
) -> None:
    bare, changes = of_another_shell(platform), list[str]()
    install(platform, "none")
    assert _notification(platform.client, bare, changes.append) is None and changes == []
    assert about(platform.client, bare).startswith("nobody is notified")
    for receiver, shown, title, arrived in (
        (None, "team@example.org, night@example.org", "by mail", lambda: len(mailbox.messages) == 2),
        (
            f"webhook:{inbox.url}/a-t0ken",
            f"the webhook at {inbox.url.removeprefix('http://')}",
            "by web",
            lambda: inbox.messages,
        ),
    ):
        install(platform, receiver)
        assert _notification(platform.client, bare, changes.append) is None and changes == []
        assert about(platform.client, bare) == f"{shown} is notified of {WHAT}, as set at `vectorclm up`"
        (automation,) = platform.client.read_automations_by_name(NOTIFICATION)
        platform.client.delete_automation(automation.id)
        assert _notification(platform.client, bare, changes.append) is None
        assert changes == [f"automation created: {NOTIFICATION}"]
        changes.clear()
        ended(platform, deployment, Failed(message=PROBLEM), name=title)
        until(arrived, "the message arrives", 60)

    block = platform.client.read_block_document_by_name(OWN, "webhook")
    platform.client.delete_block_document(block.id)
    assert "the block of the receiver is gone" in str(_notification(platform.client, bare, changes.append))
    install(platform, "none")
    assert platform.client.read_automations_by_name(NOTIFICATION) == []
    mailbox.messages.clear()
    inbox.messages.clear()


def test_a_failure_arrives_by_mail_once_and_so_does_the_recovery(
    platform: Platform, mailbox: Mailbox, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arrived() -> list[str]:
        return [str(message["Subject"]) for message in mailbox.messages if "disk" not in message["Subject"]]

    changes = ["messages go to team@example.org, night@example.org", f"automation created: {NOTIFICATION}"]
    assert install(platform) == (changes, None) and install(platform) == ([], None)
    failed = ended(platform, deployment, Failed(message=PROBLEM), name="tiny, seed=7")
    until(lambda: len(arrived()) == 2, "the mail arrives at each of two", 60)
    one, other = (message for message in mailbox.messages if message["Subject"] == "tiny, seed=7 failed")
    assert {one["To"], other["To"]} == {"team@example.org", "night@example.org"}
    assert one["From"] == "VectorCLM <operator@example.org>"
    text = one.get_content()
    assert PROBLEM in text and f"{platform.config.prefect_url}/runs/flow-run/{failed}" in text

    ended(platform, deployment, Cancelled(), name="unwanted")
    ended(platform, deployment, Crashed(), Scheduled(name=RESCUED), name="rescued")
    ended(platform, deployment, Completed(), name="the next one")
    until(lambda: len(arrived()) >= 4, "the recovery arrives", 60)
    assert arrived()[2:] == [f"{DEPLOYMENT} runs again"] * 2  # and nothing of the runs in between
    ended(platform, deployment, Completed(), name="and one more")

    monkeypatch.setattr(machine_checks, "FREE_GIGABYTES", 10**9)
    incidents = Incidents(platform.client, Store(platform.config.vectorclm_store), platform.config.home)
    incidents.look_at_disks()  # as the server does where its disk is full

    def told_of_disk() -> str:
        return "".join(message.get_content() for message in mailbox.messages if "disk" in message["Subject"])

    until(lambda: "`vectorclm store gc --older-than 1h --delete" in told_of_disk(), "the full disk arrives", 60)
    assert len(arrived()) == 4


def test_the_password_of_the_mail_server_is_nowhere_in_plain_text(platform: Platform, mailbox: Mailbox) -> None:
    install(platform)
    found = platform.client.read_block_document_by_name(OWN, "vectorclm-mail", include_secrets=False)
    assert set(found.data["password"]) == {"*"} and mailbox.password not in str(found)
    written = [file for file in platform.config.home.rglob("*") if file.is_file()]
    assert any(file.name == "prefect.db" for file in written)
    assert [file for file in written if mailbox.password.encode() in file.read_bytes()] == []
    assert mailbox.password not in repr(platform.config)


def test_a_message_that_cannot_be_sent_is_named_until_one_is_sent(
    platform: Platform, mailbox: Mailbox, deployment: UUID
) -> None:
    install(platform)
    mailbox.is_full = True
    ended(platform, deployment, Failed(message="first"), name="unsent")
    reason = until(lambda: undelivered(platform.client), "the server says so", 60)
    assert "Notification failed" in str(reason) and "Sending email to" in str(reason)
    _, problem = install(platform)
    assert str(problem).startswith("the last message to team@example.org, night@example.org was not sent (Notif")
    mailbox.is_full = False
    ended(platform, deployment, Failed(message="second"), name="sent")
    until(lambda: undelivered(platform.client) is None, "the next message was sent", 60)
    titles = [f"{name} failed" for name in ("sent", "unsent")]

    def arrived() -> list[str]:
        return sorted(str(message["Subject"]) for message in mailbox.messages if message["Subject"] in titles)

    until(lambda: arrived() == sorted(titles * 2), "the lost one follows, to each of two receivers", 60)


def test_a_webhook_is_sent_json_and_the_mail_block_with_its_password_is_gone(
    platform: Platform, inbox: Inbox, mailbox: Mailbox, deployment: UUID
) -> None:
    install(platform)
    before = len(mailbox.messages)
    changes, problem = install(platform, f"webhook:{inbox.url}/a-t0ken")
    assert problem is None and f"messages go to the webhook at {inbox.url.removeprefix('http://')}" in changes
    assert "a-t0ken" not in "".join(changes)
    assert install(platform, f"webhook:{inbox.url}/a-t0ken") == ([], None)
    with pytest.raises(ObjectNotFound):
        platform.client.read_block_document_by_name(OWN, "vectorclm-mail")
    (automation,) = platform.client.read_automations_by_name(NOTIFICATION)
    assert "a-t0ken" not in automation.description
    run_id = ended(platform, deployment, Failed(message=PROBLEM), name="tiny, seed=8")
    platform.client.set_flow_run_state(run_id, Failed(message="the same again"), force=True)
    found = until(lambda: [each for each in inbox.messages if each["message"] == "the same again"], "it arrives", 60)[0]
    assert (found["event"], found["title"]) == (RUN_FAILED, "tiny, seed=8 failed")
    assert found["links"] == [f"{platform.config.prefect_url}/runs/flow-run/{run_id}"]
    platform.client.set_flow_run_state(run_id, Completed(), force=True)  # by Retry
    again = until(lambda: [each for each in inbox.messages if each["event"] == RUN_RECOVERED], "it recovers", 60)[0]
    assert again["title"] == f"{DEPLOYMENT} runs again"

    missed = Event(
        occurred=datetime.now(UTC),
        event=MISSED,
        resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run_id}"}),
        payload={"title": "no worker took it", "text": "no worker took it", "message": ""},
    )
    platform.client.request("POST", "/events", json=[missed.model_dump(mode="json")])
    until(lambda: [each for each in inbox.messages if each["title"] == "no worker took it"], "it arrives", 60)
    assert len(mailbox.messages) == before
    inbox.is_full = True
    ended(platform, deployment, Failed(message="third"), name="unsent")
    until(lambda: undelivered(platform.client) == "the receiver answered 507", "the server says so", 60)

    changes, problem = install(platform, "none")
    assert problem is None and f"automation removed: {NOTIFICATION}" in changes
    assert platform.client.read_automations_by_name(NOTIFICATION) == []
    with pytest.raises(ObjectNotFound):
        platform.client.read_block_document_by_name(OWN, "webhook")
