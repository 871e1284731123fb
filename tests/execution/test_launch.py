"""Children of a stage and turns at the devices: errors, interruptions, waiting, the end of the parent."""

import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from flows.execution import launch
from flows.execution.launch import (
    Launcher,
    StageCancelledError,
    StageFailedError,
    StageInterruptedError,
    device_names,
)
from flows.terminal import attached
from vectorclm import errors
from vectorclm.errors import ConfigError, DataError, StoreError
from vectorclm.runtime.processes import dying_with_parent
from vectorclm.runtime.progress import Tick


def child(source: str) -> list[str]:
    return [sys.executable, "-c", source]


@pytest.mark.parametrize("kind", [ConfigError, DataError, StoreError, FileNotFoundError])
def test_an_error_of_a_child_is_the_same_error_here(tmp_path: Path, kind: type[Exception]) -> None:
    said = json.dumps({"error": {"type": kind.__name__, "message": "what to do"}})
    with Launcher(tmp_path) as launcher, pytest.raises(kind, match="what to do"):
        launcher.run(child(f"print('a line'); print({said!r}); raise SystemExit(2)"), lambda line: None)


def test_lines_of_a_child_are_relayed_and_quoted_when_it_crashes(tmp_path: Path) -> None:
    lines: list[str] = []
    with Launcher(tmp_path) as launcher, pytest.raises(StageFailedError, match="ZeroDivisionError") as caught:
        launcher.run(child("print('hello'); 1 / 0"), lines.append)
    assert lines[0] == "hello"
    assert not isinstance(caught.value, StageInterruptedError)


def test_a_killed_child_is_an_interruption(tmp_path: Path) -> None:
    source = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with Launcher(tmp_path) as launcher, pytest.raises(StageInterruptedError, match="SIGKILL"):
        launcher.run(child(source), lambda line: None)


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (json.dumps({"error": {"type": "PreemptedError", "message": "step 7"}}), StageInterruptedError, "step 7"),
        (json.dumps({"error": {"type": "TypeError", "message": "odd"}}), StageFailedError, "^TypeError: odd$"),
        (json.dumps({"error": "no fields"}), StageFailedError, 'exit code 2; its last lines:\n{"error": "no fields"}'),
        ("", StageFailedError, r"exit code 2; its last lines:\n\(no output\)"),
    ],
)
def test_an_end_is_told_by_what_the_child_reported(
    tmp_path: Path, line: str, kind: type[Exception], message: str
) -> None:
    with Launcher(tmp_path) as launcher, pytest.raises(kind, match=message) as caught:
        launcher.run(child(f"print({line!r}); raise SystemExit(2)"), lambda line: None)
    assert type(caught.value) is kind


def test_an_exit_after_a_signal_is_an_interruption(tmp_path: Path) -> None:
    with Launcher(tmp_path) as launcher, pytest.raises(StageInterruptedError, match="ended by SIGTERM; its last"):
        launcher.run(child("raise SystemExit(128 + 15)"), lambda line: None)


def test_progress_of_a_child_is_relayed_and_a_cut_line_is_a_line(tmp_path: Path) -> None:
    kept: list[Tick] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.tick)  # type: ignore[attr-defined]

    tick, lines = Tick("sample", 3, 7, "documents", "a.parquet"), list[str]()
    said = json.dumps({"tick": asdict(tick)})
    with attached(Kept(), {"vectorclm.runtime.progress": logging.INFO}), Launcher(tmp_path) as launcher:
        launcher.run(child(f"print({said!r}); print({said[:20]!r}); print('a line')"), lines.append)
    assert kept == [tick] and lines == [said[:20], "a line"]


def test_a_child_that_does_not_end_when_asked_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of its curriculum, and where the reader of its lines fails."""
    monkeypatch.setattr(launch, "CANCEL_SECONDS", 0.2)
    monkeypatch.setattr(launch, "KILL_AFTER", 0.2)
    source = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid()); time.sleep(600)"
    )
    pids: list[int] = []
    with ThreadPoolExecutor(1) as other:
        with Launcher(tmp_path) as launcher:
            done = other.submit(launcher.run, child(source), lambda line: pids.append(int(line)))
            while not pids:
                time.sleep(0.01)
        with pytest.raises(StageCancelledError, match="ended with the curriculum"):
            done.result()
        with pytest.raises(StageCancelledError, match="not started: the curriculum is ending"):
            launcher.run(child("print('too late')"), lambda line: pids.append(0))

    def log(line: str) -> None:
        pids.append(int(line))
        raise BrokenPipeError("nobody reads")

    with Launcher(tmp_path) as launcher, pytest.raises(BrokenPipeError):
        launcher.run(child(source), log)
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids)


def test_one_curriculum_at_a_time_has_the_devices(tmp_path: Path) -> None:
    """The stages of one curriculum share its turn; another waits for the end of it, and says so."""
    said: list[str | None] = []
    with Launcher(tmp_path) as second, ThreadPoolExecutor(1) as other:
        with Launcher(tmp_path, "the first") as first:
            first.take_turn(said.append)
            first.take_turn(said.append)
            waiting = other.submit(second.take_turn, said.append)
            while not said:
                time.sleep(0.01)
            assert said == ["the first"]
        waiting.result()
        assert said == ["the first", None]


def test_sets_of_devices_exclude_each_other_where_they_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str | None] = []

    def launcher(devices: str) -> Launcher:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        return Launcher(tmp_path, "the first")

    with launcher("2,1") as second, launcher("3") as third, ThreadPoolExecutor(1) as other:
        with launcher("0, 1") as first:
            first.take_turn(said.append)
            third.take_turn(said.append)
            assert said == []
            waiting = other.submit(second.take_turn, said.append)
            while not said:
                time.sleep(0.01)
        waiting.result()
        assert said == ["the first", None]


def test_without_a_choice_all_gpus_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_names(tmp_path) == ["cpu"]
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert device_names(tmp_path) == ["0", "1"]
    for chosen in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert device_names(tmp_path) == ["cpu"]


def test_a_run_that_waits_for_the_devices_can_be_cancelled(tmp_path: Path) -> None:
    said: list[str | None] = []
    with Launcher(tmp_path) as first, ThreadPoolExecutor(1) as other:
        first.take_turn(said.append)
        with Launcher(tmp_path) as second:
            waiting = other.submit(second.take_turn, said.append)
            while not said:
                time.sleep(0.01)
        with pytest.raises(StageCancelledError):
            waiting.result()


def test_a_turn_is_not_taken_after_the_end_of_the_block(tmp_path: Path) -> None:
    """A stage's thread may ask for its turn while, or after, its curriculum ends."""
    with Launcher(tmp_path) as ended:
        pass
    with pytest.raises(StageCancelledError):
        ended.take_turn(lambda waits: None)
    said: list[bool] = []
    with Launcher(tmp_path) as following:
        following.take_turn(said.append)
    assert said == []  # the devices were free


def test_a_child_imports_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vectorclm.py").write_text("print('from the working directory')")
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    with Launcher(tmp_path / "locks") as launcher:
        launcher.run(child("import vectorclm; print(vectorclm.__file__)"), lines.append)
    assert lines == [str(Path(errors.__file__).with_name("__init__.py"))]


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    sleeper = dying_with_parent(child(f"import time; open({str(ready)!r}, 'x'); time.sleep(600)"))
    source = f"import subprocess, time; print(subprocess.Popen({sleeper!r}).pid, flush=True); time.sleep(600)"
    with subprocess.Popen(child(source), stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            orphan = psutil.Process(int(parent.stdout.readline()))
            while not ready.exists():
                assert parent.poll() is None
                time.sleep(0.01)
        finally:
            parent.kill()
    orphan.wait(timeout=60)
    assert not orphan.is_running()


def test_a_stage_s_own_process_has_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "admin:secret-of-this-test")
    said: list[str] = []
    with Launcher(tmp_path) as launcher:
        launcher.run([sys.executable, "-c", "import os; print(dict(os.environ))"], said.append)
    assert "PATH" in said[0] and "secret-of-this-test" not in said[0]
