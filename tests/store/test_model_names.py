"""What commands take as MODEL: nothing, names, prefixes and folders, without a trace in the store."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from flows import cli
from vectorclm.errors import ConfigError, DataError, StoreError
from vectorclm.store.artifact import Store
from vectorclm.store.model_names import UnknownModelError, existing_store, resolve_model

PRINTS = {
    "base": "ab1" + "0" * 61,
    "chat": "ab2" + "0" * 61,
    "newer": "cd3" + "0" * 61,
    "only": "ef4" + "0" * 61,
    "hex": "abc" + "0" * 61,
}


def publish(store: Path, stage: str, fingerprint: str, created: str, **more: object) -> None:
    """A finished artifact without files."""
    values: Mapping[str, object] = {"config": {}, "inputs": {}, "summary": {}, "files": {}, "environment": {}, **more}
    folder = store / stage / fingerprint
    folder.mkdir(parents=True)
    manifest = {**values, "stage": stage, "fingerprint": fingerprint, "created": created, "format_version": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with two finished runs of `mine`, and one of `letters`, which ends at its base model."""
    folder = tmp_path / "store"
    for number, (stage, name) in enumerate(
        [("pretrain", "base"), ("finetune", "chat"), ("finetune", "newer"), ("pretrain", "only")]
    ):
        publish(folder, stage, PRINTS[name], f"2026-01-0{number + 1}")
    for number, (name, inputs) in enumerate(
        [
            ("mine", {"pretrain": PRINTS["base"], "finetune": PRINTS["chat"]}),
            ("mine", {"pretrain": PRINTS["base"], "finetune": PRINTS["newer"]}),
            ("letters", {"pretrain": PRINTS["only"]}),
        ]
    ):
        publish(folder, "export", f"{number}" * 64, f"2026-02-0{number + 1}", config={"name": name}, inputs=inputs)
    return folder


def test_each_name_means_its_model(store: Path, tmp_path: Path) -> None:
    chat, newer, only = (f"{store}/{place}" for place in (
        f"finetune/{PRINTS['chat']}", f"finetune/{PRINTS['newer']}", f"pretrain/{PRINTS['only']}"))  # fmt: skip
    found = {name: resolve_model(name, str(store)) for name in ("mine", "letters", "cd3", "ef4", "finetune/ab2")}
    assert found == {"mine": newer, "letters": only, "cd3": newer, "ef4": only, "finetune/ab2": chat}
    assert resolve_model(None, str(store)) == newer
    for place in (chat, str(tmp_path), "./here", "models:/mine@champion", "s3://bucket/finetune/ab"):
        assert resolve_model(place, "/nowhere") == place


def test_a_folder_of_the_same_name_is_no_model(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert resolve_model("mine", str(store)).endswith(PRINTS["newer"])
    (tmp_path / "mine/config.json").write_text("{}")
    assert resolve_model("mine", str(store)) == "mine"


def test_an_ambiguous_name_lists_the_candidates(store: Path) -> None:
    publish(store, "pretrain", PRINTS["hex"], "2026-01-09")
    publish(store, "finetune", "abc" + "1" * 61, "2026-01-09")
    with pytest.raises(ConfigError, match=r"abc may mean pretrain/abc000000000 or finetune/abc111111111: write one of"):
        resolve_model("abc", str(store))
    publish(store, "finetune", "abc2" + "1" * 60, "2026-01-09")
    with pytest.raises(ConfigError, match=r"finetune/abc matches 2 .*: finetune/abc111111111, finetune/abc211111111;"):
        resolve_model("finetune/abc", str(store))
    publish(store, "export", "9" * 64, "2026-03-01", config={"name": "abc2"}, inputs={"pretrain": PRINTS["only"]})
    with pytest.raises(ConfigError, match=r"abc2 may mean the experiment abc2 or finetune/abc211111111: write one of"):
        resolve_model("abc2", str(store))


def test_what_is_not_there_is_named_and_nothing_is_created(store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnknownModelError, match=r"has no model 'other': its experiments are letters, mine; MODEL is an"
    ):
        resolve_model("other", str(store))
    with pytest.raises(DataError, match=r"has no finished finetune/fff"):
        resolve_model("finetune/fff", str(store))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownModelError, match="has no model yet: `vectorclm run` trains one"):
        resolve_model(None, str(tmp_path / "empty"))
    for name in (None, "mine", "abc"):
        with pytest.raises(StoreError, match=r"there is no store at .*/nowhere"):
            resolve_model(name, str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists() and list((tmp_path / "empty").iterdir()) == []
    assert existing_store(str(store)).uri == Store(str(store)).uri


READING = [
    ["chat"],
    ["chat", "mine"],
    ["chat", "models:/mine@champion"],
    ["serve", "models:/mine/1"],
    ["lineage"],
    ["lineage", "models:/mine@champion"],
    ["report", "mine"],
    ["promote"],
    ["compare", "a", "b"],
    ["evaluate", "--text", "x"],
    ["export", "mine", "--format", "gguf"],
    ["store", "ls"],
    ["store", "verify"],
    ["store", "gc"],
]


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_a_store_that_is_not_there_is_refused_and_not_created(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert cli.main([*arguments, "--store", "gone"]) == 2
    said = capsys.readouterr()
    assert f"there is no store at {tmp_path}/gone" in said.err and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["chat", "serve", "evaluate", "export", "compare", "lineage", "report", "promote"])
def test_every_help_says_what_a_model_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "an experiment's name, models:/NAME@ALIAS, the first digits of a fingerprint, STAGE/DIGITS" in shown
