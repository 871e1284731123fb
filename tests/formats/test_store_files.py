"""Settings, manifests, checkpoints, records and requests with faults: a value or one typed error."""

import contextlib
import json
import shutil
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.formats.mutations import CPU_SECONDS, HOSTILE, VALUES, damaged_bytes, damaged_trees, fuzzed
from tests.formats.samples import write_header
from vectorclm.config import EXPERIMENTS, SUITES, load_experiment, load_suite, read_config
from vectorclm.errors import ConfigError, CorruptArtifactError, DataError, VectorCLMError
from vectorclm.formats import json_files, toml_files
from vectorclm.formats.files import check_name, read_bytes, size_of
from vectorclm.formats.json_files import check_json, parse_json, parse_line, read_table, table_lines
from vectorclm.inference.openai_errors import Refusal
from vectorclm.inference.openai_format import json_object
from vectorclm.inference.openai_requests import ChatRequest, TextRequest
from vectorclm.lineage.pinning import Lock
from vectorclm.settings import digest
from vectorclm.store.artifact import StageSpec, Store
from vectorclm.store.manifest import SEAL, read_manifest, sealed
from vectorclm.training.checkpoint import Checkpoints, Snapshot, restore
from vectorclm.training.metrics import Metrics

PLACE = Path(tempfile.mkdtemp(prefix="formats-"))
TINY = tomllib.loads((EXPERIMENTS / "tiny.toml").read_text())
SUITE_FILE = sorted(SUITES.glob("*.toml"))[0]
SUITE = tomllib.loads(SUITE_FILE.read_text())
LONGEST = 120_000  # characters of a message: 50 faults


def teardown_module() -> None:
    shutil.rmtree(PLACE)


@fuzzed(VALUES)
def test_json_that_is_written_is_read(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == value
    assert parse_json(text.encode()) == value
    assert parse_line(json.dumps(value, ensure_ascii=False)) == value


@fuzzed(damaged_trees(TINY))
def test_experiments_of_other_types(values: Any) -> None:
    (PLACE / "a.json").write_text(json.dumps(values))
    try:
        load_experiment(str(PLACE / "a.json"))
    except ConfigError as error:
        assert len(str(error)) < LONGEST


@fuzzed(damaged_bytes((EXPERIMENTS / "tiny.toml").read_bytes()))
def test_damaged_experiments(data: bytes) -> None:
    (PLACE / "b.toml").write_bytes(data)
    try:
        load_experiment(str(PLACE / "b.toml"))
    except ConfigError as error:
        assert len(str(error)) < LONGEST


@fuzzed(damaged_trees(SUITE))
def test_suites_of_other_types(values: Any) -> None:
    (PLACE / "c.json").write_text(json.dumps(values))
    try:
        load_suite(str(PLACE / "c.json"))
    except ConfigError as error:
        assert len(str(error)) < LONGEST


@fuzzed(damaged_bytes(json.dumps({"a/b": "0" * 40, "c@main": "1" * 40}).encode()), 0.5)
def test_damaged_lock_files(data: bytes) -> None:
    (PLACE / "a.lock.json").write_bytes(data)
    with contextlib.suppress(ConfigError):
        assert all(len(commit) == 40 for commit in Lock(PLACE / "a.lock.json").commits.values())


MANIFEST = {
    "stage": "sample",
    "fingerprint": "0" * 64,
    "format_version": 1,
    "config": {"sources": [{"label": "a", "path": "b"}]},
    "inputs": {"sample": "1" * 64},
    "summary": {},
    "files": {"a/b.parquet": {"bytes": 5, "sha256": "2" * 64}, "c": {"bytes": 0, "sha256": "3" * 64, "place": ".f/c"}},
    "environment": {},
    "created": "2026",
}


def accepted(data: bytes) -> None:
    """A manifest is refused, or all its files lie below its artifact."""
    try:
        found = read_manifest(data, "/store/sample/0")
    except CorruptArtifactError:
        return
    root = (PLACE / "inside").resolve()
    for name, file in found["files"].items():
        for place in (name, file.get("place", name)):
            assert (root / place).resolve().is_relative_to(root) and "\0" not in place


@fuzzed(damaged_trees(MANIFEST).flatmap(lambda tree: st.tuples(st.just(tree), st.booleans())))
def test_manifests_of_other_types(drawn: tuple[Any, bool]) -> None:
    tree, seals = drawn
    if seals and isinstance(tree, dict):
        with contextlib.suppress(ValueError):  # half a surrogate has no bytes that could be sealed
            tree = {**tree, SEAL: digest(json.loads(json.dumps(tree)))}
    accepted(json.dumps(tree).encode())


@fuzzed(damaged_bytes(sealed(MANIFEST)))
def test_damaged_manifests(data: bytes) -> None:
    accepted(data)


@fuzzed(
    st.text(max_size=12) | st.sampled_from(["../a", "/a", "a/../../b", "a\\b", "..", "a\0", "\ud800", ".", "a/./b"])
)
def test_files_outside_of_an_artifact(name: str) -> None:
    accepted(json.dumps({**MANIFEST, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}).encode())
    accepted(json.dumps({**MANIFEST, "files": {"a": {"bytes": 1, "sha256": "0" * 64, "place": name}}}).encode())


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
CHECKPOINT = {
    "head": {"step": 1, "order": "o", "data": "d"},
    "model": {"weight": {**ENTRY, "shape": [1, 1]}, "bias": {**ENTRY, "data_offsets": [4, 8]}},
    "optim": {"0.0.exp_avg": {**ENTRY, "shape": [1, 1]}, "0.0.step": {**ENTRY, "shape": [], "data_offsets": [4, 8]}},
    "metrics": [{"step": 1, "tokens": 8, "loss": 0.5}],
}


@fuzzed(damaged_trees(CHECKPOINT), 0.5)
def test_checkpoints_of_other_types(tree: Any) -> None:
    folder = PLACE / "store"
    shutil.rmtree(folder, ignore_errors=True)
    store, spec, work = Store(str(folder)), StageSpec("pretrain", 1, {}, {}), PLACE / "work"
    work.mkdir(exist_ok=True)
    write_header(work / "model.safetensors", tree.get("model"), b"12341234")
    write_header(work / "optim.safetensors", tree.get("optim"), b"12341234")
    lines = tree.get("metrics") if isinstance(tree.get("metrics"), list) else [tree.get("metrics")]
    (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    head = (
        {name: value for name, value in (tree.get("head") or {}).items() if name != "files"}
        if isinstance(tree.get("head"), dict)
        else {}
    )
    try:
        data = sealed({**head, "files": entries(work)})
    except (ValueError, UnicodeError):  # no writer could have sealed it
        return
    place = folder / "checkpoints" / spec.fingerprint / "step-00000001-00000000"
    shutil.move(work, place)
    (place / "manifest.json").write_bytes(data)
    model = torch.nn.Linear(1, 1)
    try:
        with Checkpoints(store, spec, PLACE / "copies", "d") as found:
            saved = found.latest("o")
        if saved is not None:
            assert isinstance(saved, Snapshot) and saved.step >= 0
            Metrics(PLACE / "metrics.jsonl", str).restart(saved.metrics)
            restore(saved, model, [torch.optim.AdamW(model.parameters())])
    except VectorCLMError:
        pass


def entries(folder: Path) -> dict[str, Any]:
    from vectorclm.store.manifest import file_entry

    return {file.name: file_entry(file, None) for file in folder.iterdir()}


REQUEST = {
    "model": "a",
    "messages": [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I"}]},
    ],
    "max_tokens": 5,
    "temperature": 0.5,
    "stop": ["a"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    "logit_bias": {},
    "tools": [],
    "seed": 1,
}


@fuzzed(damaged_trees(REQUEST), 2)
def test_requests_of_other_types(body: Any) -> None:
    for kind in (ChatRequest, TextRequest):
        try:
            kind.model_validate(body)
        except (ValidationError, Refusal) as error:
            assert str(error)


@fuzzed(damaged_bytes(json.dumps(REQUEST).encode()))
def test_damaged_requests(data: bytes) -> None:
    try:
        json_object(data)
    except (ValueError, Refusal) as error:
        assert str(error)


@fuzzed(
    st.lists(HOSTILE | VALUES, max_size=4).flatmap(
        lambda v: damaged_bytes("".join(json.dumps(x) + "\n" for x in v).encode())
    )
)
def test_damaged_records(data: bytes) -> None:
    try:
        assert all(isinstance(line, dict) for line in table_lines(data, "x"))
    except CorruptArtifactError as error:
        assert str(error).startswith("x, line ")


def test_the_limits_of_json_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_json('"' + "[" * 1000 + '"') == "[" * 1000  # text is no structure
    check_json("[" * 200 + "]" * 200, 1000)
    for text, message in (("[" * 201, "deep"), ("[" + "1," * 50_000 + "1]", "more than 10 values")):
        with pytest.raises(ValueError, match=message):
            check_json(text, 10 if "values" in message else 1000)
    with pytest.raises(ValueError, match="deep"):
        parse_line("[" * 600 + "]" * 600)
    assert parse_line('"\\ud800"') == "\ud800"
    with monkeypatch.context() as patch:
        patch.setattr(json_files, "MANIFEST_BYTES", 10)
        with pytest.raises(CorruptArtifactError, match="10 at most"):
            read_manifest(sealed(MANIFEST), "x")
    with monkeypatch.context() as patch:
        patch.setattr(json_files, "LINE_VALUES", 4)
        with pytest.raises(ValueError, match="more than 4 values"):
            parse_line("[" + "[]," * 50_000 + "1]")
    with monkeypatch.context() as patch:
        patch.setattr(json_files, "LINE_BYTES", 4)
        with pytest.raises(CorruptArtifactError, match="more than 4 bytes"):
            list(table_lines(b'{"abc": 1}', "x"))


def test_the_limits_of_toml_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    file = PLACE / "d.toml"
    for text, message in (
        ("a = " + "[" * 300, "deep"),
        (".".join("a" * 101) + " = 1", "more than 100 parts"),
        ("a = 1\na = 2", "Cannot overwrite"),
        ("a" * 20_000_000, "20,000,000 bytes"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(file)
    file.write_text('a = """[[[["""\nb = "a.b.c" # {{{\n')
    assert read_config(file) == {"a": "[[[[", "b": "a.b.c"}
    with monkeypatch.context() as patch:
        patch.setattr(toml_files, "SETTINGS_VALUES", 1)
        with pytest.raises(ConfigError, match="more than 1 values"):
            read_config(file)


def test_limits_are_checked_in_a_time_that_grows_with_the_text() -> None:
    began = time.process_time()
    many = 10**6
    for text in ('"' + '\\"' * many + "\\", '"' * many, '"\\' * many):
        with contextlib.suppress(ValueError):
            check_json("[" * 300 + text, 10 * many, 500)
    hard = ("a" * many, ". " * many, '"""' + '\\"""' * many, "'''" + "''\n" * many, " " * many, '"""a\n' * many)
    for text in (*hard, '"' * many, "'" * many, '"\\' * many):
        with contextlib.suppress(ValueError):
            toml_files.check_toml(text)
    assert time.process_time() - began < CPU_SECONDS


def test_names_that_no_file_can_have_are_refused() -> None:
    for name in ("a\0b", "a\ud800"):
        with pytest.raises(DataError, match="cannot be a name"):
            check_name(name)
    check_name("a\udc80")  # a byte that is not UTF-8, as the system reports it
    for place, message in ((PLACE, "no regular file"), (PLACE / "none", "No such file")):
        with pytest.raises(DataError, match=message):
            size_of(place, "a file")
    with pytest.raises(DataError, match="No such file"):
        read_bytes(PLACE / "none", 5, "a file")
    (PLACE / "list.json").write_text("[]")
    with pytest.raises(DataError, match="no table"):
        read_table(PLACE / "list.json")
