"""The options that name a platform: they override the environment, which overrides the file."""

from pathlib import Path

import pytest

from flows.platform.options import PlatformOptions


def test_an_option_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VECTORCLM_STORE", "PREFECT_PORT", "MLFLOW_PORT"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "platform.env"
    file.write_text(f"VECTORCLM_STORE={tmp_path}/of-the-file\nPREFECT_PORT=4301\nMLFLOW_PORT=5301\n")
    found = PlatformOptions(env_file=file, prefect_port=4302).config()
    assert (found.vectorclm_store, found.prefect_port, found.mlflow_port) == (f"{tmp_path}/of-the-file", 4302, 5301)
    assert PlatformOptions(store=str(tmp_path), env_file=file).config().vectorclm_store == str(tmp_path)


def test_a_store_of_the_environment_names_no_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, where PREFECT_API_URL names the server."""
    monkeypatch.setenv("VECTORCLM_STORE", "s3://bucket/store")
    assert not PlatformOptions().is_given and not PlatformOptions(store="s3://bucket/store").is_given
    assert PlatformOptions(store="./store").is_given
    assert PlatformOptions(store="s3://bucket/store", prefect_port=4300).is_given
