"""The overhead of logging to MLflow: turns in which one process is awake, and the rows that come of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from flows.bench import tracking as bench
from flows.bench.tracking import BOUND, STEPS, tracking
from tests.services.platform import until
from tests.test_curriculum import mini
from vectorclm.config import ExperimentConfig

WHOLE = pytest.mark.skipif(os.environ.get("VECTORCLM_MATRIX") != "full", reason="a minute: VECTORCLM_MATRIX=full")


@WHOLE
def test_logging_is_measured_with_the_server_up_and_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> tuple[ExperimentConfig, Path]:
        return mini(), Path("mini.toml")

    monkeypatch.setattr(bench, "load_experiment", load)
    before = set(psutil.Process().children(recursive=True))
    rows = list(tracking(2, None))
    for state in ("up", "down"):
        step, used, held = (row for row in rows if row.name.endswith(f"MLflow {state}"))
        assert step.ours is not None and step.peer is not None and step.ratio is not None and step.unit == "s"
        assert step.met is (step.ratio <= 1 + BOUND / 100)
        for row in (used, held):
            assert row.ours is not None and row.ours >= 0 and row.unit == "% of a step" and row.met is not None
    assert len(rows) == 6
    left = set(psutil.Process().children(recursive=True)) - before
    assert [child for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process that works, suspended as the logging of a side is before its turn."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        process = psutil.Process(child.pid)
        process.suspend()
        yield process
        process.kill()


def test_a_side_is_awake_in_its_turn_and_the_first_step_is_not_counted(sleeper: psutil.Process, tmp_path: Path) -> None:
    side, states = bench._Side(tmp_path, sleeper), list[str]()
    worked = bench._processor_seconds(sleeper)

    def train(folder: Path) -> bench._Turn:
        assert folder == tmp_path
        states.append(sleeper.status())
        until(lambda: bench._processor_seconds(sleeper) > worked + 0.05, "it works", 60)
        return bench._Turn([9.0, 1.0, 2.0, 1.0], [9.0, 0.01, 0.02, 0.01])

    side.turn(train)
    until(lambda: sleeper.status() == psutil.STATUS_STOPPED, "it sleeps again", 60)
    assert states != [psutil.STATUS_STOPPED]
    assert side.steps == [1.0] and side.held == [pytest.approx(1.0)]
    assert side.used[0] >= 100 * 0.05 / 13
    alone = bench._Side(tmp_path)
    alone.turn(lambda folder: bench._Turn([1.0, 2.0], [0.0, 0.5]))
    assert (alone.steps, alone.used, alone.held) == ([2.0], [0.0], [25.0])


@pytest.fixture
def threads() -> Iterator[None]:
    """A measurement takes all cores; the tests after it take one again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_turn_writes_the_metrics_of_its_steps(tmp_path: Path) -> None:
    training = bench._Training(mini())
    for turn in range(2):
        found = training.turn(tmp_path, STEPS)
        assert len(found.seconds) == len(found.held) == STEPS
        assert all(0 < held < second for held, second in zip(found.held, found.seconds, strict=True))
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, (turn + 1) * STEPS + 1))
    assert all(line["loss"] > 0 and line["tokens"] % (bench.WINDOWS * 64) == 0 for line in lines)
