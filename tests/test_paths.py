"""The folder on this machine that belongs to a store: databases and locks never lie in a bucket."""

import os
from pathlib import Path

import pytest

from flows.paths import local_folder
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
