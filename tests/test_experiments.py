"""The experiments that a platform offers: the package's, and the files of the user's folder."""

from pathlib import Path

import pytest

from flows.experiments import FOLDER, OWN, clashes, known_files, load_known
from vectorclm.config import EXPERIMENTS
from vectorclm.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def write(folder: Path, file: str, name: str) -> Path:
    text = (EXPERIMENTS / "tiny.toml").read_text(encoding="utf-8")
    path = folder / file
    path.write_text(text.replace('name = "tiny"', f'name = "{name}"'), encoding="utf-8")
    return path


def test_without_a_folder_the_packages_experiments_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    assert list(known_files()) == list(OWN) and list(clashes()) == []
    assert load_known("small")[0].name == "small"
    with pytest.raises(ConfigError, match=r"no experiment 'owl': use tiny, small, base; VECTORCLM_EXPERIMENTS names a"):
        load_known("owl")


def test_the_files_of_the_folder_are_offered_too(folder: Path) -> None:
    path = write(folder, "own.toml", "own")
    (folder / "notes.md").write_text("no experiment")
    (folder / "deeper.toml").mkdir()
    assert list(known_files()) == [*OWN, "own"]
    experiment, found = load_known("own")
    assert (experiment.name, found) == ("own", path)
    with pytest.raises(ConfigError, match=rf"no experiment 'owl': use .*, own, or put owl\.toml into {folder}"):
        load_known("owl")


def test_a_file_with_another_name_or_a_taken_one_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, "own.toml", "other")
    with pytest.raises(ConfigError, match=f"{path}: name is 'other': it must be 'own', as the file"):
        load_known("own")
    taken = write(folder, "tiny.toml", "tiny")
    (clash,) = clashes()
    assert clash.startswith(f"{taken} is not offered: the package has an experiment tiny")
    assert load_known("tiny")[1] == EXPERIMENTS / "tiny.toml"
    monkeypatch.setenv(FOLDER, str(folder / "nowhere"))
    assert list(known_files()) == list(OWN)
