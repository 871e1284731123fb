"""The unit that starts the platform at boot, judged by systemd's own checker, and how it is installed."""

import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.platform import autostart
from flows.platform.autostart import install, uninstall, unit, unit_file
from flows.platform.config import PlatformConfig
from flows.platform.options import PlatformOptions
from tests.conftest import skip_or_fail
from tests.services.platform import unit_command
from vectorclm.errors import ConfigError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*(name.upper() for name in PlatformConfig.model_fields), *autostart.READ_BY_LIBRARIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with characters that mean something to systemd."""
    (found := tmp_path / 'a $HOME 100% "quoted" \\ folder').mkdir()
    monkeypatch.chdir(found)
    monkeypatch.setenv("VECTORCLM_HOME", str(tmp_path / "home"))  # of databases, which take no %
    return found


def settings(unit_text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in unit_text.splitlines() if line.startswith(f"{key}=")]


def test_systemd_finds_no_fault_in_the_unit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("systemd-analyze") is None:
        skip_or_fail("no systemd-analyze here: apt-get install systemd")
    options = PlatformOptions(store=str(folder), env_file=folder / "platform.env", prefect_port=4300)
    text = unit(PlatformConfig(vectorclm_store=str(folder)), options)
    (file := tmp_path / "vectorclm.service").write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", "--user", "--recursive-errors=no", str(file)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text(text.replace("RemainAfterExit=yes", "RemainAfterExit=perhaps"), encoding="utf-8")
    wrong = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Failed to parse boolean value" in wrong.stderr


def test_the_unit_has_the_options_and_the_settings_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTORCLM_EXPERIMENTS", "my experiments")
    text = unit(PlatformConfig(), PlatformOptions(env_file=Path("platform.env"), mlflow_port=5300))
    words = f"{sys.executable} -P -m flows.cli VERB --env-file=platform.env --mlflow-port=5300"
    assert settings(text, "ExecStart") == [words.replace("VERB", "up")]
    assert settings(text, "ExecStop") == [words.replace("VERB", "down")]
    home = os.environ["VECTORCLM_HOME"]
    assert settings(text, "Environment") == [f"VECTORCLM_HOME={home}", '"VECTORCLM_EXPERIMENTS=my experiments"']
    words = unit_command(unit(PlatformConfig(), PlatformOptions(store=str(folder))), "ExecStart")
    assert words[-1] == f"--store={folder}"
    assert settings(text, "WorkingDirectory") == [str(folder).replace("%", "%%")]


def test_the_unit_has_what_libraries_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "SSL_CERT_FILE": "/etc/own.pem",
        "TMPDIR": "/scratch/tmp",
        "XDG_CACHE_HOME": "/scratch/cache",
        "HTTP_PROXY": "http://proxy.example.org:3128",
        "https_proxy": "proxy.example.org:3128",
        "NO_PROXY": "localhost",
        "HF_HOME": "/scratch/hub",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_REGION": "eu-central-1",
        "AWS_PROFILE": "training",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = settings(unit(PlatformConfig(), PlatformOptions()), "Environment")
    assert sorted(found) == sorted(f"{name}={value}" for name, value in given.items())


READ_BY_LIBRARIES, A_SETTING = "EnvironmentFile=FILE", "give it as --env-file"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("HTTPS_PROXY", "http://me:hunter2@proxy.example.org:3128", READ_BY_LIBRARIES),
        ("http_proxy", "me:hunter2@proxy.example.org:3128", READ_BY_LIBRARIES),
        ("ALL_PROXY", "socks5h://me:a/hunter2@proxy.example.org", READ_BY_LIBRARIES),
        ("HF_ENDPOINT", "https://me:hunter2@hub.example.org", READ_BY_LIBRARIES),
        ("PREFECT_AUTH", "me:hunter2", A_SETTING),
        ("VECTORCLM_NOTIFY", "webhook:https://example.org/hunter2", A_SETTING),
        ("AWS_ENDPOINT_URL", "https://me:hunter2@s3.example.org", A_SETTING),
    ],
)
def test_a_secret_of_the_environment_is_refused_and_not_shown(
    name: str, value: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} must not be in a systemd unit.* {remedy}") as refused:
        unit(PlatformConfig(), PlatformOptions())
    assert "hunter2" not in str(refused.value)


class Written:
    """A console that keeps what is written there."""

    def __init__(self) -> None:
        self.console = Console(file=StringIO(), width=400)

    def lines(self) -> list[str]:
        file = self.console.file
        assert isinstance(file, StringIO)
        found = file.getvalue().splitlines()
        file.truncate(file.seek(0))
        return found


def test_without_systemd_one_line_says_so_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autostart, "BOOTED", tmp_path / "none")
    config, written = PlatformConfig(vectorclm_store=str(tmp_path)), Written()
    install(config, PlatformOptions(), written.console)
    (line,) = written.lines()
    assert line.startswith("no systemd runs here, so nothing starts the platform at boot")
    assert not unit_file(config).exists()
    uninstall(config, written.console)
    (line,) = written.lines()
    assert line == f"no systemd unit of the platform of {tmp_path} is installed"


def test_the_unit_is_enabled_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script stands for systemd, which runs in no container: it keeps what it is asked, and refuses when told to."""
    (tmp_path / "bin").mkdir()
    for program in ("systemctl", "loginctl"):
        lines = ["#!/bin/sh", f'echo {program} "$@" >> asked', "! cat refusal >&2", ""]
        (tmp_path / "bin" / program).write_text("\n".join(lines))
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.setenv("AWS_PROFILE", "training")  # a name, which the unit has
    monkeypatch.setattr(autostart, "BOOTED", tmp_path)
    monkeypatch.chdir(tmp_path)
    config, written = PlatformConfig(vectorclm_store=str(tmp_path / "store")), Written()
    file = unit_file(config)

    install(config, PlatformOptions(), written.console)
    name = file.name
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:2] == ["systemctl --user daemon-reload", f"systemctl --user enable --now {name}"]
    assert file.read_text() == unit(config, PlatformOptions()) and "hunter2" not in file.read_text()
    starts, credentials, lingers = written.lines()
    assert "`vectorclm down --uninstall` removes it" in starts and "run `loginctl enable-linger` once" in lingers
    assert credentials == f"the unit has no HF_TOKEN: add them by `systemctl --user edit {name}`"

    (tmp_path / "asked").unlink()
    uninstall(config, written.console)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"systemctl --user disable --now {name}", "systemctl --user daemon-reload"]
    assert not file.exists() and written.lines() == [f"{name} removed: nothing starts the platform at boot"]

    (tmp_path / "refusal").write_text("Failed to connect to bus")
    with pytest.raises(ConfigError, match="`systemctl --user daemon-reload` failed: Failed to connect to bus"):
        install(config, PlatformOptions(), written.console)
