"""The terminal of a run: lines above bars, progress in a file, and an end by Ctrl-C."""

import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from flows import terminal
from flows.terminal import LogLines, ProgressLines, attached, flush_logs, interruptible
from vectorclm.runtime.progress import Tick, say


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=40)


def written(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    yield (made := logging.getLogger("flows.of_this_test"))
    made.setLevel(logging.NOTSET)


def test_log_lines_are_printed_as_they_are_from_their_level_up(console: Console, logger: logging.Logger) -> None:
    long = "a line that is longer than the console is wide, with [brackets] and 12"
    with attached(LogLines(console), {logger.name: logging.INFO}):
        logger.debug("hidden")
        logger.info(long)
        logger.warning("%s: %d", "take care", 3)
    logger.warning("after the block")
    assert written(console) == [long, "take care: 3"]


def test_a_warning_has_a_colour_of_its_own(logger: logging.Logger) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    with attached(LogLines(console), {logger.name: logging.INFO}):
        logger.info("well")
        logger.warning("ill")
    assert written(console) == ["\x1b[32mwell\x1b[0m", "\x1b[33mill\x1b[0m"]


def test_progress_in_a_file_is_a_line_now_and_then_for_each_stage(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with attached(ProgressLines(console), {"vectorclm.runtime.progress": logging.INFO}):
        for seconds, stage, done in (
            (0, "sample", 1),  # begins to count
            (29, "sample", 2),
            (2, "shards", 7),
            (0, "sample", 3_000),  # 31 s after the first
            (1, "sample", 4_000),
            (29.5, "shards", 8),
        ):
            clock[0] += seconds
            say(Tick(stage, done, 10_000, "documents", "from a.parquet"))
    assert written(console) == [
        "sample 3,000 of 10,000 documents  from a.parquet",
        "shards 8 of 10,000 documents  from a.parquet",
    ]


def test_the_last_lines_for_the_server_are_sent() -> None:
    class Kept(logging.Handler):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    handler = Kept()
    with attached(handler, dict.fromkeys(("prefect.flow_runs", "prefect.task_runs"), logging.INFO)):
        flush_logs()
    assert handler.flushed == 2


def test_ctrl_c_ends_the_block_as_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "END_SECONDS", 10**6)  # this process lives on
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)  # it is handled between two steps
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("further", [True, False], ids=["by a second Ctrl-C", "by itself after a while"])
def test_a_block_that_cannot_be_asked_to_stop_is_ended(further: bool) -> None:
    source = f"""
import os, signal, sys
from flows import terminal

terminal.END_SECONDS = 600 if {further} else 0.1
with terminal.interruptible():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("asked", flush=True)
    if {further}:
        os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("asked\n", "", 130)
