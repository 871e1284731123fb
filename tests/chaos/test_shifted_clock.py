"""The clock of a process is set while it runs, and only the date moves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vectorclm.chaos.shifted_clock import ShiftedClock, problem

ASK = """
import sys, time
from datetime import datetime
for _ in sys.stdin:
    print(time.time(), datetime.now().timestamp(), time.monotonic(), flush=True)
"""


@pytest.mark.skipif(bool(problem()), reason=problem())
def test_the_date_of_a_running_process_jumps_and_its_durations_stay(tmp_path: Path) -> None:
    clock = ShiftedClock(tmp_path)
    environment = {**os.environ, **clock.environment}
    command = [sys.executable, "-c", ASK]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        said = []
        for shift in (0, 86_400, -86_400):
            clock.set(shift)
            child.stdin.write("\n")
            child.stdin.flush()
            said.append([float(word) for word in child.stdout.readline().split()])
        child.stdin.close()
    now, ahead, back = said
    for clock_of in (0, 1):
        assert 86_000 < ahead[clock_of] - now[clock_of] < 87_000
        assert -87_000 < back[clock_of] - now[clock_of] < -86_000
    assert 0 <= back[2] - now[2] < 600
