"""Notify the operator by a webhook, by mail or by a block of Prefect: the block that sends, and the automation.

The automation forwards the events of `flows.handle.NOTIFIED`, whose payloads have a title, a text and links. Prefect's
server sends the messages, so the class of the mail block must be known there, too.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from prefect.blocks.core import Block
from prefect.blocks.notifications import AbstractAppriseNotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument
from prefect.events.actions import CallWebhook, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import Field, SecretStr

from flows.handle import NOTIFIED, SENT_AGAIN
from flows.platform.config import PlatformConfig

NOTIFICATION = "vectorclm: notify the operator"
OWN = "vectorclm-notify"  # the name of the block that is created for an address
NOBODY = "none"
AS_SET = "as set at `vectorclm up`"
WHAT = "failed runs, missed runs, full disks and fallen scores"
PAYLOAD = (
    "{{ dict({'event': event.event}, **event.payload) | tojson }}"  # a copy of an event has its name in its payload
)
ACTED, FAILED_TO_ACT = "prefect.automation.action.executed", "prefect.automation.action.failed"
PORTS = {"starttls": 587, "tls": 465, "none": 25}
MODES = {"starttls": "starttls", "tls": "ssl", "none": "insecure"}  # Apprise's names


class Mail(AbstractAppriseNotificationBlock):
    """Sends messages by a mail server (SMTP)."""

    _block_type_name = "VectorCLM Mail"
    _block_type_slug = "vectorclm-mail"
    _description = "Sends messages by a mail server (SMTP)."

    host: str = Field(description="The mail server")
    port: int = Field(description="The port of the mail server")
    tls: Literal["starttls", "tls", "none"] = Field("starttls", description="How the connection is encrypted")
    user: str | None = Field(None, description="The user at the mail server")
    password: SecretStr | None = Field(None, description="The password of the user")
    sender: str = Field(description="The sender's address")
    receivers: list[str] = Field(description="The addresses of the receivers")

    def block_initialization(self) -> None:
        """Set up the client that sends."""
        from apprise import Apprise, AppriseAsset
        from apprise.plugins.email import NotifyEmail

        asset = AppriseAsset(app_id="VectorCLM", app_desc="VectorCLM")
        password = None if self.password is None else self.password.get_secret_value()
        mail = NotifyEmail(
            host=self.host,
            smtp_host=self.host,
            port=self.port,
            user=self.user and quote(self.user, safe=""),  # Apprise decodes both
            password=password and quote(password, safe=""),
            secure=self.tls != "none",
            secure_mode=MODES[self.tls],
            from_addr=f"VectorCLM <{self.sender}>",
            targets=self.receivers,
            format="text",
            asset=asset,
        )
        self._apprise_client = Apprise(asset=asset)
        self._apprise_client.add(mail)


def notification(
    client: SyncPrefectClient, config: PlatformConfig, report: Callable[[str], None]
) -> tuple[AutomationCore | None, str | None]:
    """The automation that notifies whom VECTORCLM_NOTIFY names, else None; creates its block, and removes other ones.

    Where the setting is missing, as in another shell than that of `up`, whoever was notified before still is.
    The second result is a message where Prefect lacks the block that is named, where the block sends no messages, or
    where the last message was not sent.
    """
    if not config.names_receiver:
        if (kept := _kept_block(client)) is not None:
            return _automation(client, kept, _receiver(kept))
        gone = "nobody is notified: the block of the receiver is gone. Set VECTORCLM_NOTIFY, then run `vectorclm up`"
        return None, gone if client.read_automations_by_name(NOTIFICATION) else None
    own = _block_of(config)
    _remove_blocks(client, report, but=own)
    if config.notify == NOBODY:
        return None, None
    kind, _, name = config.notify.partition("/")
    if own is not None:
        kind, name = own.get_block_type_slug(), OWN
        _save(client, own, shown(config), report)
    try:
        block = client.read_block_document_by_name(name, kind, include_secrets=False)
    except ObjectNotFound:
        return None, (
            f"nobody is notified: Prefect has no block {kind}/{name}, which VECTORCLM_NOTIFY names. Create it in the "
            "UI under Blocks, then run `vectorclm doctor`"
        )
    return _automation(client, block, shown(config))


def shown(config: PlatformConfig) -> str:
    """The receiver of messages as text, without what is secret in the address of a webhook."""
    kind, _, address = config.notify.partition(":")
    if kind == "webhook":
        return _host(address)
    return address.replace(",", ", ") if kind == "mailto" else f"the block {config.notify}"


def about(client: SyncPrefectClient, config: PlatformConfig) -> str:
    """A line about who is notified."""
    if not config.names_receiver and (kept := _kept_block(client)) is not None:
        return f"{_receiver(kept)} is notified of {WHAT}, {AS_SET}"
    if config.notify == NOBODY:
        return f"nobody is notified of {WHAT}: VECTORCLM_NOTIFY names no receiver"
    return f"{shown(config)} is notified of {WHAT}"


def undelivered(client: SyncPrefectClient) -> str | None:
    """The reason for which the last message was not sent; None where it was sent, or there was none."""
    for automation in client.read_automations_by_name(NOTIFICATION):
        wanted = {
            "event": {"name": [ACTED, FAILED_TO_ACT]},
            "resource": {"id": [f"prefect.automation.{automation.id}"]},
        }
        asked = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1})
        for event in asked.json()["events"]:
            found = event["payload"]
            if event["event"] == FAILED_TO_ACT:
                return " ".join(f"{found.get('reason', 'failed')} {found.get('notification_log', '')}".split())
            if (status := found.get("status_code", HTTPStatus.OK)) >= HTTPStatus.BAD_REQUEST:
                return f"the receiver answered {status}"
    return None


def _block_of(config: PlatformConfig) -> Block | None:
    """The block for an address; None where VECTORCLM_NOTIFY names nobody, or a block of Prefect."""
    kind, _, address = config.notify.partition(":")
    if kind == "webhook":
        return Webhook(url=SecretStr(address), headers=SecretDict({"Content-Type": "application/json"}))
    if kind != "mailto" or config.vectorclm_smtp_host is None:
        return None
    receivers, user, tls = address.split(","), config.vectorclm_smtp_user, config.vectorclm_smtp_tls
    return Mail(
        host=config.vectorclm_smtp_host,
        port=config.vectorclm_smtp_port or PORTS[tls],
        tls=tls,
        user=user,
        password=config.vectorclm_smtp_password,
        sender=config.vectorclm_smtp_from or (user if user and "@" in user else receivers[0]),
        receivers=receivers,
    )


def _kept_block(client: SyncPrefectClient) -> BlockDocument | None:
    """The block by which somebody is notified already, with its secrets: of the automation, else of an address."""
    for automation in client.read_automations_by_name(NOTIFICATION):
        for action in automation.actions:
            if isinstance(action, CallWebhook | SendNotification):
                with suppress(ObjectNotFound):  # a person deleted it
                    return client.read_block_document(action.block_document_id, include_secrets=True)
    for kind in (Webhook, Mail):
        with suppress(ObjectNotFound):
            return client.read_block_document_by_name(OWN, kind.get_block_type_slug(), include_secrets=True)
    return None


def _receiver(block: BlockDocument) -> str:
    """The receiver of a block's messages as text, without what is secret."""
    kind = _kind(block)
    if block.name == OWN and kind == Mail.get_block_type_slug():
        return ", ".join(block.data["receivers"])
    if block.name == OWN and kind == Webhook.get_block_type_slug():
        return _host(block.data["url"])
    return f"the block {kind}/{block.name}"


def _host(url: str) -> str:
    return f"the webhook at {urlsplit(url).netloc.rpartition('@')[2]}"


def _kind(block: BlockDocument) -> str:
    assert block.block_type is not None  # the server always names it
    return block.block_type.slug


def _automation(
    client: SyncPrefectClient, block: BlockDocument, receiver: str
) -> tuple[AutomationCore | None, str | None]:
    """The automation that sends messages by a block, and a message where that does not work."""
    if (action := _action(_kind(block), block)) is None:
        return None, (
            f"nobody is notified: the block {_kind(block)}/{block.name}, which VECTORCLM_NOTIFY names, sends no "
            "messages. Name a webhook, or a notification block such as slack-webhook/NAME or sendgrid-email/NAME"
        )
    trigger = EventTrigger(posture=Posture.Reactive, expect={*NOTIFIED, SENT_AGAIN}, threshold=1, within=timedelta(0))
    purpose = f"Sends {WHAT}, and what has recovered, to {receiver}."
    reason = undelivered(client)
    problem = f"the last message to {receiver} was not sent ({reason}): check VECTORCLM_NOTIFY" if reason else None
    return AutomationCore(name=NOTIFICATION, description=purpose, trigger=trigger, actions=[action]), problem


def _save(client: SyncPrefectClient, block: Block, receiver: str, report: Callable[[str], None]) -> None:
    """Save the block of an address, unless it is there with the same values."""
    fields = set(type(block).model_fields)
    values: dict[str, Any] = block.model_dump(mode="json", include=fields, context={"include_secrets": True})
    try:
        found = client.read_block_document_by_name(OWN, block.get_block_type_slug(), include_secrets=True)
    except ObjectNotFound:
        found = None
    if found is None or {name: found.data.get(name) for name in values} != values:
        block.save(OWN, overwrite=True)
        report(f"messages go to {receiver}")


def _remove_blocks(client: SyncPrefectClient, report: Callable[[str], None], but: Block | None) -> None:
    """Remove the blocks of earlier addresses, which hold passwords."""
    for kind in (Webhook, Mail):
        if isinstance(but, kind):
            continue
        try:
            found = client.read_block_document_by_name(OWN, kind.get_block_type_slug(), include_secrets=False)
        except ObjectNotFound:
            continue
        client.delete_block_document(found.id)
        report(f"block {kind.get_block_type_slug()}/{OWN} removed, as VECTORCLM_NOTIFY no longer needs it")


def _action(kind: str, block: BlockDocument) -> CallWebhook | SendNotification | None:
    """The action that sends the payload of an event by a block; None where the block sends no messages."""
    if kind == Webhook.get_block_type_slug():
        return CallWebhook(block_document_id=block.id, payload=PAYLOAD)
    if block.block_schema is None or "notify" not in block.block_schema.capabilities:
        return None
    subject, body = "{{ event.payload.title }}", "{{ event.payload.text }}"
    return SendNotification(block_document_id=block.id, subject=subject, body=body)
