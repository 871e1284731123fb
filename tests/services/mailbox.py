"""A mail server that keeps what it is sent, with STARTTLS and a password: where mail of tests arrives."""

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword

from flows.net import free_port
from tests.conftest import skip_or_fail


@dataclass
class Mailbox:
    """A mail server on this machine."""

    port: int
    certificate: Path  # by which a client knows the server
    user: str = "operator@example.org"
    password: str = "p@ss:w%C3%A4rd/+ s3cr3t"  # with what an address would encode
    messages: list[EmailMessage] = field(default_factory=list)
    is_full: bool = False  # refuses further mail


@contextmanager
def open_mailbox(folder: Path) -> Iterator[Mailbox]:
    """A mailbox that is served while the block runs; its key and certificate are in the folder."""
    if shutil.which("openssl") is None:
        skip_or_fail("no openssl here: apt-get install openssl")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    kept = Mailbox(free_port(), certificate)

    class Keep:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            if kept.is_full:
                return "452 no room"
            message = message_from_bytes(envelope.content, policy=policy.default)
            assert isinstance(message, EmailMessage)
            kept.messages.append(message)
            return "250 kept"

    def knows(server: Any, session: Any, envelope: Any, mechanism: str, given: Any) -> AuthResult:
        return AuthResult(success=given == LoginPassword(kept.user.encode(), kept.password.encode()))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = Controller(
        Keep(),
        hostname="127.0.0.1",
        port=kept.port,
        tls_context=context,
        require_starttls=True,
        auth_required=True,
        authenticator=knows,
    )
    server.start()
    try:
        yield kept
    finally:
        server.stop()
