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
