"""Credentials of `up` are found again in a service that runs, and in no file."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.platform import credentials
from flows.platform.config import PlatformConfig
from flows.platform.ownership import recall_credentials, remember
from flows.platform.process import PREFECT, Service

SECRET = "of-a-test-secret-0123456789"


@pytest.fixture
def config(tmp_path: Path) -> PlatformConfig:
    return PlatformConfig(vectorclm_store=str(tmp_path / "store"))


@pytest.fixture
def service(config: PlatformConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A process in the place of the platform's server for Prefect, started with credentials in the environment."""
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "of-a-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
        made = Service(PREFECT, sleeps, {}, config.home / "platform")
        made.start()
        remember(config)
    yield made
    made.stop()


def test_credentials_of_up_are_found_in_a_service_that_runs_and_are_in_no_file(
    config: PlatformConfig, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "mine")
        assert recall_credentials(config) == "" and "AWS_SECRET_ACCESS_KEY" not in os.environ  # one's own win
    with monkeypatch.context() as patch:
        patch.setenv("AWS_REGION", "of-this-command")
        assert recall_credentials(config) == ""
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET and os.environ["AWS_REGION"] == "of-this-command"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            os.environ.pop(name)
    assert [path for path in config.home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []
    service.stop()
    lost = recall_credentials(config)
    assert "AWS_ACCESS_KEY_ID" in lost and "no service is left that has them" in lost and SECRET not in lost
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ and credentials.names() == []
