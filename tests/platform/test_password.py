"""Where the password of Prefect is kept, who reads it, and when it is replaced."""

import stat
import subprocess
from pathlib import Path

import pytest
from pydantic import SecretStr

from flows.platform import password
from flows.platform.config import PlatformConfig
from vectorclm.errors import ConfigError


def test_the_password_stays_and_the_user_s_own_wins(tmp_path: Path) -> None:
    url = "http://127.0.0.1:4200/api"
    config = PlatformConfig(vectorclm_store=str(tmp_path))
    assert (
        config.prefect_password is None and password.about(tmp_path, config.prefect_auth, shown=True) == password.OPEN
    )
    password.ensure(tmp_path, url)
    made = config.prefect_password
    assert made is not None and made.startswith("admin:") and made != password.make()
    password.ensure(tmp_path, url)
    password.settle(tmp_path, "http://127.0.0.1:4201/api", own=True)
    assert config.prefect_password == made == config.client_environment()["PREFECT_API_AUTH_STRING"]
    assert (password.read(tmp_path, url), password.read(tmp_path, "http://127.0.0.1:4201/api")) == (None, made)
    assert made in password.about(tmp_path, config.prefect_auth, shown=True) and made not in password.about(
        tmp_path, config.prefect_auth, shown=False
    )
    file = password.place(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and list(file.parent.iterdir()) == [file]
    command = ["sh", "-c", f"set -a; . '{file}'; echo $PREFECT_API_URL $PREFECT_API_AUTH_STRING"]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert read == f"http://127.0.0.1:4201/api {made}\n"
    own, off = (config.model_copy(update={"prefect_auth": SecretStr(text)}) for text in ("me:mine", "None"))
    assert (own.prefect_password, off.prefect_password) == ("me:mine", None)
    assert "PREFECT_API_AUTH_STRING" not in off.client_environment() and "mine" not in password.about(
        tmp_path, own.prefect_auth, shown=True
    )
    password.settle(tmp_path, url, own=False)
    assert config.prefect_password is None
    for wrong in ("admin", "admin:", ":x"):
        with pytest.raises(ValueError, match="PREFECT_AUTH must be user:password, or none"):
            PlatformConfig(prefect_auth=SecretStr(wrong))


def test_a_file_that_is_none_is_told_and_kept(tmp_path: Path) -> None:
    password.ensure(tmp_path, "http://127.0.0.1:4200/api")
    file = password.place(tmp_path)
    file.write_bytes(b"\xff\xfe")
    for use in (password.read, lambda home: password.ensure(home, "http://127.0.0.1:4200/api")):
        with pytest.raises(ConfigError, match=f"the file of Prefect's password, {file}, cannot be read"):
            use(tmp_path)
    assert file.read_bytes() == b"\xff\xfe"
    file.write_text("PREFECT_API_URL=http://127.0.0.1:4200/api\nPREFECT_API_AUTH_STRING=\n")
    assert password.read(tmp_path) is None
