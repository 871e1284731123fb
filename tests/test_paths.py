"""The folder on this machine that belongs to a store: databases and locks never lie in a bucket."""

import os
from pathlib import Path

import pytest

from flows.paths import local_folder
from flows.platform.config import read_platform
from flows.tracking.lookup import has_record
from vectorclm.errors import ConfigError
from vectorclm.store.artifact import Store


def test_databases_lie_in_a_local_store_and_beside_a_remote_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VECTORCLM_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    local, remote = Store("store"), Store("memory://bucket/store")
    assert local_folder(local) == tmp_path / "store"
    for user, folder in ((0, Path("/var/lib/vectorclm")), (1000, tmp_path / "user" / ".local/share/vectorclm")):
        monkeypatch.setattr(os, "getuid", lambda user=user: user)
        assert local_folder(remote) == folder
    monkeypatch.setenv("VECTORCLM_HOME", "home")
    assert local_folder(local) == local_folder(remote) == tmp_path / "home"


@pytest.mark.parametrize("name", ["a ?b", "a%20b", "a#b"])
def test_a_folder_that_no_address_of_a_database_can_name_is_refused_before_anything_is_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("VECTORCLM_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    store = Store(str(tmp_path / name))
    for folder in (lambda: local_folder(store), lambda: read_platform(None, vectorclm_store=store.uri).home):
        with pytest.raises(ConfigError, match="set VECTORCLM_HOME to another folder"):
            folder()
    with pytest.raises(ConfigError, match="set VECTORCLM_HOME to another folder"):
        _ = read_platform(None, vectorclm_store=str(tmp_path), vectorclm_home=str(tmp_path / name)).home
    store.write("probe", b"x")  # the store itself may have the name
    assert not has_record(store) and list(store.files("")) == ["probe"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    monkeypatch.setenv("VECTORCLM_HOME", str(tmp_path / "home"))
    assert local_folder(store) == tmp_path / "home"
