"""Temporary folders: a killed process leaves one, a later process removes it, and all others stay."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import psutil
import pytest

from vectorclm.corpus.remote_files import fetch
from vectorclm.runtime import temporary
from vectorclm.runtime.processes import machine, process_identity
from vectorclm.runtime.temporary import EMPTY_SECONDS, FILES, OWNER, PREFIX, remove_abandoned, temporary_folder

ROOT = Path(__file__).parents[2]
USES = """
import sys
from vectorclm.runtime.temporary import temporary_folder
with temporary_folder("of-a-test-") as folder:
    (folder / "experiment.json").write_text("{}")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files of this process and its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def used() -> tuple[subprocess.Popen[str], Path]:
    """A process that uses a temporary folder."""
    command = [sys.executable, "-c", USES]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip()).parent


def test_the_folder_of_a_killed_process_is_removed_by_the_next_one_and_that_of_a_live_one_stays(place: Path) -> None:
    killed, left = used()
    live, kept = used()
    assert left.name.startswith(f"{PREFIX}of-a-test-") and left.stat().st_mode & 0o777 == 0o700
    killed.kill()
    killed.communicate()
    assert (left / FILES / "experiment.json").is_file()
    with temporary_folder() as mine:
        assert not left.exists() and (kept / FILES / "experiment.json").is_file() and mine.is_dir()
        assert remove_abandoned() == 0
    live.communicate("")  # it ends by itself
    assert list(place.iterdir()) == []


def test_a_killed_download_is_removed_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fsspec.filesystem("memory").pipe("/of-a-test/text.jsonl", b'{"text": "a"}')
    left = abandoned(tmp_path / "vectorclm" / "sources", "killed")
    (left / FILES / "text.jsonl").write_text("{")
    found = fetch("memory://of-a-test/text.jsonl")
    assert found.read_text() == '{"text": "a"}' and list(left.parent.iterdir()) == [found.parent]


def abandoned(place: Path, name: str, **changes: object) -> Path:
    """A folder whose owner has ended, but for these changes of its identity."""
    folder = place / f"{PREFIX}{name}"
    (folder / FILES).mkdir(parents=True)
    process = psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {**process_identity(process), "machine": machine(), **changes}
    process.kill()
    process.wait()
    (folder / OWNER).write_text(json.dumps(owner))
    return folder


def test_a_restart_of_the_machine_has_ended_the_owner_as_well(place: Path) -> None:
    before = abandoned(place, "before", pids="an-earlier-boot pid:[1]", pid=os.getpid())
    assert remove_abandoned() == 1 and not before.exists()


def test_what_may_be_in_use_or_belongs_to_others_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = str(process_identity(psutil.Process())["pids"]).partition(" ")[0]
    kept = [
        abandoned(place, "mine", **process_identity(psutil.Process())),
        abandoned(place, "elsewhere", machine="another machine"),
        abandoned(place, "in-a-container", pids=f"{boot} pid:[1]"),
    ]
    for name, text in (("cut-off", "{"), ("odd", "[1]"), ("bare", "{}")):
        kept.append(place / f"{PREFIX}{name}")
        kept[-1].mkdir()
        (kept[-1] / OWNER).write_text(text)
    outside = abandoned(place, "outside").rename(place / "outside")
    kept.append(place / f"{PREFIX}link")
    kept[-1].symlink_to(outside)
    foreign = place / f"{PREFIX}without-an-owner"
    (foreign / "data").mkdir(parents=True)
    new, old = place / f"{PREFIX}of-a-test-new4567_", place / f"{PREFIX}of-a-test-old4567_"
    own = [place / f"{PREFIX}data", place / f"{PREFIX}data4567"]  # of the user: by its name, and by its mode
    for folder, mode in ((new, 0o700), (old, 0o700), (own[0], 0o700), (own[1], 0o755)):
        folder.mkdir()
        folder.chmod(mode)
    for folder in (foreign, old, *own):
        os.utime(folder, (1, 1))
    kept += own
    assert remove_abandoned() == 1  # the old one, whose owner was killed before it wrote its identity
    assert not old.exists() and new.exists() and EMPTY_SECONDS > 60
    assert all(folder.exists() for folder in (*kept, outside / FILES, foreign / "data"))
    gone = abandoned(place, "gone")
    monkeypatch.setattr(temporary.os, "getuid", lambda: os.stat(place).st_uid + 1)  # noqa: PTH116
    assert remove_abandoned() == 0 and gone.exists()  # it belongs to another user


def test_every_temporary_folder_in_tmpdir_is_one_of_these() -> None:
    """Others lie beside what they become, where the store's collector or their own reader finds them."""
    calls = [
        (path.name, call)
        for package in ("vectorclm", "flows")
        for path in (ROOT / package).rglob("*.py")
        for call in re.findall(r"(?:TemporaryDirectory|mkdtemp|NamedTemporaryFile|mkstemp)\((.*)", path.read_text())
        if path.name != "temporary.py"
    ]
    assert len(calls) > 2 and [found for found in calls if "dir=" not in found[1]] == []
