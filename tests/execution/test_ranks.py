"""torchrun with the exit code of the rank that failed first, and without what it leaves behind."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.execution.ranks import run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files; torchrun's handlers of signals and its settings are undone."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("ranks", "script", "code"),
    [
        (1, "exit 0", 0),
        (2, "if [ $RANK = 1 ]; then exit 75; else sleep 600; fi", 75),  # the code of a training that was preempted
        (1, "kill -KILL $$$$", 128 + signal.SIGKILL),  # torchrun reads $$ as $
        (1, "kill -TERM $PPID; sleep 600", 128 + signal.SIGTERM),  # torchrun itself is ended
    ],
)
def test_the_code_is_that_of_the_rank_that_failed(
    ranks: int, script: str, code: int, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=0", "--no-python"]
    assert run([*options, "sh", "-c", script]) == code
    assert ("rank 0: Signal 9 (SIGKILL) received" in capfd.readouterr().err) == (code == 128 + signal.SIGKILL)
    assert list(folder.iterdir()) == []
