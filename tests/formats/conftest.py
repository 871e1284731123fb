"""Limits of memory and time for the tests of loaders, and the number of cases that ran."""

import faulthandler
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.mutations import counts

MEMORY = 2 * 2**30  # beyond what the libraries take
HANGS = 3600  # seconds of a property


@pytest.fixture(autouse=True)
def _limits() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    faulthandler.dump_traceback_later(HANGS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    resource.setrlimit(resource.RLIMIT_AS, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases of each property ran in this process."""
    if counts:
        each = ", ".join(f"{name.removeprefix('test_')} {count:,}" for name, count in sorted(counts.items()))
        terminalreporter.write_line(f"{sum(counts.values()):,} cases: {each}")
