"""The operator is notified by mail and by a webhook: a real Prefect server with its attendant sends the messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed, Failed, Scheduled
from pydantic import SecretStr

from flows.handle import DISK_FULL, RESCUED, RUN_FAILED, RUN_MISSED, RUN_RECOVERED
from flows.net import free_port
from flows.platform import machine_checks
from flows.platform.config import PlatformConfig
from flows.platform.incidents import Incidents
from flows.platform.notify import NOTIFICATION, OWN, undelivered
from flows.platform.provision import _notification
from tests.services.inbox import Inbox, open_inbox
from tests.services.mailbox import Mailbox, open_mailbox
from tests.services.platform import Platform, until
from vectorclm.store.artifact import Store

PROBLEM = "the loss is <far> above its \"first\" values & won't fall: lower the rate"


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
def deployment(platform: Platform, request: pytest.FixtureRequest) -> UUID:
    """A deployment of this test alone."""
    return platform.client.create_deployment(platform.client.create_flow_from_name("curriculum"), request.node.name)


def ended(platform: Platform, deployment: UUID, *states: State[Any], name: str) -> UUID:
    """A run of the deployment that went through these states."""
    run_id = platform.client.create_flow_run_from_deployment(deployment, name=name).id
    for state in states:
        platform.client.set_flow_run_state(run_id, state, force=True)
    return run_id


def install(platform: Platform, receiver: str | None = None) -> tuple[list[str], str | None]:
    """Have the receiver notified, else that of the platform's settings; what changed, and the problem if there is one."""
    changes: list[str] = []
    update = {"vectorclm_notify": SecretStr(receiver)} if receiver is not None else {}
    with platform.addressed():
        problem = _notification(platform.client, platform.config.model_copy(update=update), changes.append)
    return changes, problem


def test_a_failure_arrives_by_mail_once_and_so_does_the_recovery(
    platform: Platform, mailbox: Mailbox, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["messages go to team@example.org, night@example.org", f"automation created: {NOTIFICATION}"]
    assert install(platform) == (changes, None) and install(platform) == ([], None)
    failed = ended(platform, deployment, Failed(message=PROBLEM), name="tiny, seed=7")
    (message,) = until(lambda: mailbox.messages, "the mail arrives", 60)
    assert message["Subject"] == "tiny, seed=7 failed"
    assert "team@example.org" in message["To"] or "night@example.org" in message["To"]
    assert message["From"] == "VectorCLM <operator@example.org>"
    text = message.get_content()
    assert PROBLEM in text and f"{platform.config.prefect_url}/runs/flow-run/{failed}" in text

    ended(platform, deployment, Cancelled(), name="unwanted")
    ended(platform, deployment, Crashed(), Scheduled(name=RESCUED), name="rescued")
    ended(platform, deployment, Completed(), name="the next one")
    ended(platform, deployment, Completed(), name="and one more")
    until(lambda: len(mailbox.messages) >= 4, "the recovery arrives", 60)
    monkeypatch.setattr(machine_checks, "FREE_GIGABYTES", 10**9)
    store = Store(platform.config.vectorclm_store)
    Incidents(platform.client, store, platform.config.home).look()  # as the server does where its disk is full
    until(lambda: len(mailbox.messages) >= 6, "the full disk arrives", 60)
    first, second, third = sorted({str(message["Subject"]) for message in mailbox.messages}, key=len)
    assert second == "tiny, seed=7 failed"
