"""Commands that only read work on a store that nobody may write, and create nothing, also where there is no store."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import main
from tests.services.curricula import Recorded, copied

READING = (
    ["store", "ls"],
    ["store", "verify"],
    ["store", "gc"],
    ["lineage"],
    ["lineage", "mini", "--verify"],
    ["lineage", "models:/vectorclm-chat@candidate"],
    ["lineage", "--uses", "stories"],
    ["compare", "mini", "models:/vectorclm-chat@candidate"],
    ["report", "--out", "report.html"],
    ["report", "models:/vectorclm-chat@candidate", "--out", "other.html"],
    ["export", "--format", "gguf", "--out", "model.gguf"],
    ["evaluate", "mini", "--text", "text.txt"],
    ["chat", "mini"],
    ["run", "tiny", "--dry-run"],
)
WRITING = (
    ["run", "tiny"],
    ["stage", "sample", "tiny"],
    ["evaluate", "mini", "--suite", "tiny"],
    ["promote"],
)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and the time of its last change."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own with a text to score."""
    (folder := tmp_path / "here").mkdir()
    (folder / "text.txt").write_text("The otter swims in the lake.")
    monkeypatch.setattr("vectorclm.draft.speed.MEASURE_SECONDS", 0.1)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def read_only(tmp_path: Path, recorded: Recorded) -> Iterator[str]:
    """A finished store with its records in MLflow, mounted read-only."""
    store, mounted = copied(recorded, tmp_path), tmp_path / "mounted"
    mounted.mkdir()
    done = subprocess.run(["mount", "--bind", store.root, mounted], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no folder can be mounted here, which takes root: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", mounted], check=True)
        yield str(mounted)
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


def test_what_only_reads_works_on_a_read_only_store(
    read_only: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))  # leaves the chat
    before = listing(Path(read_only))
    for command in READING:
        assert main([*command, "--store", read_only]) == 0, (command, capfd.readouterr().err)
        said = capfd.readouterr()
        assert not any(word in said.out + said.err for word in ("Traceback", "readonly", "Read-only")), command
    assert listing(Path(read_only)) == before
    assert {path.name for path in place.iterdir()} == {"text.txt", "report.html", "other.html", "model.gguf"}
    for command in WRITING:
        assert main([*command, "--store", read_only]) == 2
        said = capfd.readouterr().err
        assert f"store {read_only} is not writable" in said and said.count("error:") == 1, (command, said)


def test_a_store_that_is_not_there_is_refused_and_not_created(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = listing(place)
    for command in READING:
        if command[0] != "run":
            assert main([*command, "--store", str(place / "nowhere")]) == 2, command
            said = capfd.readouterr()
            assert "nowhere" in said.err and said.err.count("error:") == 1 and "Traceback" not in said.err, command
    assert main(["run", "tiny", "--dry-run", "--store", str(place / "nowhere")]) == 0  # of a first run
    assert listing(place) == before and not (place / "nowhere").exists()
