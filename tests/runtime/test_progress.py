"""Progress reports: a finished bar is full, a stopped one stays, a resumed stage says where it continues."""

import io
import logging

import pytest
from rich.console import Console

from flows.terminal import ProgressLines, attached
from vectorclm.runtime.progress import Progress, Tick, bars


class Ticks(logging.Handler):
    """A handler that keeps the reports."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tick] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.__dict__["tick"])


def shown(work: str) -> tuple[Tick, str, str]:
    """The last report of a stage, the bars of a terminal, and the lines of a file."""
    ticks, lines = Ticks(), io.StringIO()
    terminal = Console(file=io.StringIO(), width=120, force_terminal=True)
    names = {"vectorclm.runtime.progress": logging.INFO}
    with (
        bars(terminal),
        attached(ticks, names),
        attached(ProgressLines(Console(file=lines)), names),
        Progress("sample", 6_000_000, "bytes") as progress,
    ):
        if work == "resumed":
            progress.resume(4_000_000, "step 40 of 60")
        progress.advance(900_000, "loss 1.0")
        if work == "stopped":
            progress.stop()
    assert isinstance(terminal.file, io.StringIO)
    return ticks.found[-1], terminal.file.getvalue(), lines.getvalue()


def test_a_bar_whose_total_was_an_estimate_ends_full() -> None:
    last, terminal, _ = shown("finished")
    assert (last.done, last.total) == (900_000, 900_000) and "900000/900000" in terminal


def test_a_stopped_stage_stays_where_it_is() -> None:
    last, terminal, _ = shown("stopped")
    assert (last.done, last.total) == (900_000, 6_000_000) and "900000/6000000" in terminal


def test_a_resumed_stage_says_from_where_in_a_terminal_and_in_a_file() -> None:
    _, terminal, lines = shown("resumed")
    assert terminal.count("sample continues from step 40 of 60") == 1
    assert lines == "sample continues from step 40 of 60\n"


@pytest.mark.parametrize("width", [50, 80, 120])
def test_bars_fit_the_terminal(width: int) -> None:
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with bars(terminal), Progress("evaluate world-two-step", 999_424, "compressed bytes") as progress:
        progress.at(999_424, "loss 0.447  26,896 tokens/s")
    assert isinstance(terminal.file, io.StringIO)
    line = next(line for line in reversed(terminal.file.getvalue().splitlines()) if "evaluate" in line)
    assert ("999424/999424 compressed bytes" if width == 120 else " 100% ") in line
    assert "loss 0.4" in line and ("…" not in line or width == 50)
