"""A running server for the tests of this folder, and a uvicorn server in this process."""

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from openai import OpenAI
from starlette.types import ASGIApp

from tests.conftest import ANSWERS
from vectorclm.inference import serve

SECRET = "a-key-of-this-test-0123"
QUESTION = [{"role": "user", "content": "Who swims?"}]
ANSWER = ANSWERS["Who swims?"]
PAGE = "https://chat.example.com"  # the origin of another site's page, which may use the server
LOG_LINE = re.compile(
    r"[-0-9]+ [:,0-9]+ (WARNING Invalid HTTP request received\.|"
    r"INFO 127\.0\.0\.1 (GET|HEAD|POST|OPTIONS|other) (other|/[a-z0-9/{}:_]*) \d{3}"
    r"(, \d+ prompt and \d+ new tokens)?, \d+\.\d{3} s(, the client left)?)"
)


@dataclass
class Served:
    """A running server."""

    url: str
    process: "subprocess.Popen[str]"
    output: Path  # what it wrote to stderr

    def client(self, key: str = SECRET) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(self, **options: Any) -> Any:
        return self.client().chat.completions.create(**{"model": "otter", "messages": QUESTION, **options})

    def complete(self, **options: Any) -> Any:
        return self.client().completions.create(**{"model": "otter", **options})

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {SECRET}"}


@pytest.fixture(scope="session")
def served(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    output = tmp_path_factory.mktemp("serve") / "output"
    (output.parent / "runtime.toml").write_text("threads = 1")
    command = [sys.executable, "-m", "flows.cli", "serve", str(chat_folder), "--port", "0"]
    command += ["--runtime", str(output.parent / "runtime.toml"), "--cors", "http://localhost:1", "--cors", PAGE]
    with output.open("w") as file:
        process = subprocess.Popen(
            command, env={**os.environ, serve.KEY: SECRET}, stdout=subprocess.PIPE, stderr=file, text=True
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("otter at http://127.0.0.1:"), line + output.read_text()
    yield Served(line.split()[2].rstrip("/"), process, output)
    process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert rest == "" and SECRET not in line
    check_log(output.read_text())


def check_log(text: str) -> None:
    """Nothing failed: a server wrote a line for each request, and its key in none of them."""
    assert SECRET not in text
    assert [line for line in text.splitlines() if not LOG_LINE.fullmatch(line)] == []


def serve_while(app: ASGIApp, client: Callable[[tuple[str, int]], None], **options: Any) -> None:
    """Serve an application by uvicorn in this thread while a client, in another, uses its address."""

    async def serving(listening: socket.socket) -> None:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none", **options))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            await asyncio.to_thread(client, listening.getsockname())
        finally:
            server.should_exit = True
            async with asyncio.timeout(60):
                await task

    with serve.listen("127.0.0.1", 0) as listening:
        asyncio.run(serving(listening))
