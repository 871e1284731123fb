"""Start the platform at each boot by a systemd unit of this user: `vectorclm up --install`, `down --uninstall`."""

import getpass
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from flows.platform import credentials
from flows.platform.config import SECRETS, PlatformConfig
from flows.platform.options import PlatformOptions
from vectorclm.errors import ConfigError
from vectorclm.settings import digest

BOOTED = Path("/run/systemd/system")  # there where systemd runs
START_SECONDS = 900  # `up` waits for each service, and a first start migrates databases
STOP_SECONDS = 120
# Variables that libraries and programs read. None is a secret, except the password in the address of a proxy.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
READ_BY_LIBRARIES = (
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"),  # whom mail, S3 and downloads trust
    *("TMPDIR", "XDG_CACHE_HOME"),  # temporary folders; the work folder of an S3 store
    *(name for proxy in PROXIES for name in (proxy, proxy.lower())),
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE"),  # the hub and its cache
    *("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),  # S3
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),  # the devices and threads of trainings
)
PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)  # a word that needs no quotes


def unit_file(config: PlatformConfig) -> Path:
    """The file of the unit of this platform."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return folder / "systemd" / "user" / f"vectorclm-{digest(str(config.home))[:8]}.service"


def unit(config: PlatformConfig, options: PlatformOptions) -> str:
    """The text of a systemd unit that runs `vectorclm up` with these options, and `vectorclm down` at its stop.

    Settings in the environment become part of the unit. Raises ConfigError where one of them is a secret.
    """
    names = _variables(unit_file(config).name)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if value is not None]
    command = [sys.executable, "-P", "-m", "flows.cli"]
    lines = [
        "[Unit]",
        f"Description=VectorCLM platform of {_escaped(str(config.home))}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        f"WorkingDirectory={_escaped(str(Path.cwd()))}",
        *(f"Environment={_word(f'{name}={os.environ[name]}')}" for name in names),
        f"ExecStart={' '.join(_argument(word) for word in [*command, 'up', *words])}",
        f"ExecStop={' '.join(_argument(word) for word in [*command, 'down', *words])}",
        "Restart=on-failure",
        "RestartSec=30",
        f"TimeoutStartSec={START_SECONDS}",
        f"TimeoutStopSec={STOP_SECONDS}",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    return "\n".join(lines)


def _variables(unit_name: str) -> list[str]:
    """The variables of this process that the unit needs. Raises ConfigError where one of them is a secret."""
    settings = [name.upper() for name in PlatformConfig.model_fields if os.environ.get(name.upper())]
    others = [name for name in READ_BY_LIBRARIES if os.environ.get(name)]
    if secret := [name for name in settings if name.lower() in SECRETS or _has_secret(os.environ[name])]:
        raise ConfigError(
            f"{', '.join(secret)} must not be in a systemd unit, which others can read: write it into a file and give "
            "it as --env-file"
        )
    # The address of a proxy needs no scheme.
    if secret := [name for name in others if _has_secret(f"{'//' * (name.upper() in PROXIES)}{os.environ[name]}")]:
        raise ConfigError(
            f"{', '.join(secret)} must not be in a systemd unit with a password, which others can read: unset it for "
            f"this command, and name a file of yours that sets it by `systemctl --user edit {unit_name}`, as "
            "EnvironmentFile=FILE below [Service]"
        )
    return [*settings, *others]


def _has_secret(value: str) -> bool:
    """Whether a value is the address of a webhook, or has the user or password of a URL."""
    return value.startswith("webhook:") or re.search(r"//.*@", value) is not None


def install(config: PlatformConfig, options: PlatformOptions, console: Console) -> None:
    """Install the unit and start it, so that the services belong to it. Raises ConfigError where it does not start.

    Where no systemd runs, nothing is installed, and one line says so.
    """
    text, file = unit(config, options), unit_file(config)
    if not BOOTED.is_dir():
        _say(console, "no systemd runs here, so nothing starts the platform at boot; `vectorclm up` starts it by hand")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    _systemctl("daemon-reload")
    _systemctl("enable", "--now", file.name)
    _say(console, f"{file.name} starts the platform at boot; `vectorclm down --uninstall` removes it")
    if lacking := [name for name in credentials.names() if name not in READ_BY_LIBRARIES]:
        _say(console, f"the unit has no {', '.join(lacking)}: add them by `systemctl --user edit {file.name}`")
    if not _lingers():
        _say(console, "until you log in, systemd starts nothing of yours at boot: run `loginctl enable-linger` once")


def uninstall(config: PlatformConfig, console: Console) -> None:
    """Stop and remove the unit. Raises ConfigError where systemd refuses."""
    file = unit_file(config)
    if not file.exists():
        _say(console, f"no systemd unit of the platform of {config.home} is installed")
        return
    if BOOTED.is_dir():
        _systemctl("disable", "--now", file.name)
    file.unlink()
    if BOOTED.is_dir():
        _systemctl("daemon-reload")
    _say(console, f"{file.name} removed: nothing starts the platform at boot")


def _systemctl(*arguments: str) -> None:
    """Run `systemctl --user`. Raises ConfigError with what it says."""
    command = ["systemctl", "--user", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("systemctl is not installed: run `vectorclm up` without --install") from error
    if done.returncode:
        raise ConfigError(
            f"`{shlex.join(command)}` failed: {done.stderr.strip()}; `journalctl --user --unit {arguments[-1]}` shows "
            "the lines of `vectorclm up`"
        )


def _lingers() -> bool:
    """Whether systemd starts the units of this user at boot, before a login."""
    if shutil.which("loginctl") is None:
        return False
    command = ["loginctl", "show-user", getpass.getuser(), "--property=Linger", "--value"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == "yes"


def _argument(word: str) -> str:
    """A word of a command in a unit; systemd would replace variables in it."""
    return _word(word).replace("$", "$$")


def _word(word: str) -> str:
    if PLAIN.fullmatch(word):
        return word
    quoted = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_escaped(quoted)}"'


def _escaped(text: str) -> str:
    """Text in a unit, in which systemd replaces what begins with %. Raises ConfigError for a line break."""
    if "\n" in text or "\r" in text:
        raise ConfigError(f"a systemd unit cannot have a line break, as in {text!r}")
    return text.replace("%", "%%")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
