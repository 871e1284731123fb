"""What the system refuses is said in a line with what to do."""

import os
import resource
from pathlib import Path

import pytest

from vectorclm.command_line import run
from vectorclm.errors import StoreError, WorkerLostError, disk_error
from vectorclm.store.artifact import Store


def test_too_many_open_files_are_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, before = Store(str(tmp_path)), resource.getrlimit(resource.RLIMIT_NOFILE)
    store.write("a", b"a")
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        code = run(lambda: store.write("b", b"b"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    told = capsys.readouterr().err
    assert code == 2 and "cannot be opened (too many open files): raise the limit" in told and told.count("\n") == 1
    assert str(tmp_path) in told


@pytest.mark.parametrize("text", ["No space left (os error 28)", "Too many open files (os error 24)"])
def test_errors_of_libraries_without_a_number_are_known_by_their_text(text: str) -> None:
    assert isinstance(disk_error(Exception(text)), StoreError)
    assert isinstance(disk_error(RuntimeError("Unable to open /dev/urandom")), StoreError)  # torch's generator
    assert disk_error(Exception("something else (os error 2)")) is None


def test_a_lost_worker_is_not_an_error_of_a_disk() -> None:
    assert disk_error(WorkerLostError("a worker process ended")) is None
    assert isinstance(WorkerLostError("x"), OSError) and os.strerror(24) == "Too many open files"
