"""`vectorclm bench tracking`: the overhead of MLflow logging in a training step, with the server up and down.

One training of `small` runs continuously, and the logging changes every few steps: none, a process that logs to a
server, a process whose server was stopped after its start. Each process sleeps while another has its turn. The
measurements are

- the time of a step against a step without logging; this includes the noise of the machine, which exceeds the bound
  if other programs run;
- the processor time of the logging process as a share of the step;
- the time that the training loop spends on writing its metrics.
"""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
import torch

from flows.net import answers, free_port
from vectorclm.bench.table import Row, bounded, compared
from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.dataset import Batch
from vectorclm.errors import VectorCLMError
from vectorclm.lineage.pinning import pin
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.stages import plans
from vectorclm.store.artifact import Store
from vectorclm.train_step import TrainStep
from vectorclm.training.metrics import Metrics
from vectorclm.training.optimizers import build_optimizers

STEPS = 10  # in a turn; the first is not counted, because a process that slept catches up in it
WINDOWS = 4  # a small batch: short steps show the largest overhead
BOUND = 1.0  # percent
START_SECONDS = 120
CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class _Side:
    """The measurements of one way of logging, turn by turn."""

    folder: Path  # of the training's metrics
    logging: psutil.Process | None = None
    steps: list[float] = field(default_factory=list)  # seconds
    held: list[float] = field(default_factory=list)  # percent of a step in which the loop wrote metrics
    used: list[float] = field(default_factory=list)  # percent of a step, processor time of `logging`

    def turn(self, train: Callable[[Path], "_Turn"]) -> None:
        """Train a few steps while only this side's logging process is awake."""
        before = _processor_seconds(self.logging)
        if self.logging is not None:
            self.logging.resume()
        turn = train(self.folder)
        if self.logging is not None:
            self.logging.suspend()
        self.steps.append(median(turn.seconds[1:]))
        self.held.append(100 * sum(turn.held[1:]) / sum(turn.seconds[1:]))
        self.used.append(100 * (_processor_seconds(self.logging) - before) / sum(turn.seconds))


class _Turn(NamedTuple):
    """The times of one turn of the training."""

    seconds: list[float]  # of each step
    held: list[float]  # seconds of each step that its metrics took


def _processor_seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def tracking(rounds: int, data: Path | None) -> Iterator[Row]:
    """Rows for training steps of `small` on random tokens; `data` is not used."""
    experiment, path = load_experiment("small")
    with temporary_folder("bench-") as folder, ExitStack() as stack:
        experiment, _ = pin(experiment, folder / path.name, None, resolve=False)
        pool = stack.enter_context(ProcessPoolExecutor(1, CONTEXT, _begin, (experiment,)))
        alone, up, down = sides = [_Side(folder / side) for side in ("alone", "up", "down")]
        alone.folder.mkdir()
        with _server(folder / "stopped") as address:
            down.logging = stack.enter_context(_logging(experiment, down.folder, address))
            down.logging.suspend()
        up.logging = stack.enter_context(_logging(experiment, up.folder, stack.enter_context(_server(folder / "on"))))
        up.logging.suspend()
        for _ in range(rounds):
            for side in sides:
                side.turn(lambda place: pool.submit(_turn, place, STEPS).result())
    for side, word in ((up, "up"), (down, "down")):
        yield compared(
            f"small, a step with MLflow {word}", side.steps, alone.steps, "s", ask=1 + BOUND / 100, most=True
        )
        yield bounded(f"small, processor time of logging, MLflow {word}", side.used, "% of a step", BOUND)
        yield bounded(f"small, the loop held up by its metrics, MLflow {word}", side.held, "% of a step", BOUND)


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """Run an MLflow server with a database of its own while the block runs."""
    folder.mkdir()
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True, cwd=folder)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{uri}/health"):
            if child.poll() is not None or time.monotonic() > deadline:
                raise VectorCLMError(f"no MLflow server within {START_SECONDS} s: `{' '.join(command)}` says why")
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(60)


@contextmanager
def _logging(experiment: ExperimentConfig, folder: Path, address: str) -> Iterator[psutil.Process]:
    """Run a process that logs the training in `folder` to the server at `address`; yields once its run is open."""
    folder.mkdir()
    opened = CONTEXT.Event()
    child = CONTEXT.Process(target=_log, args=(experiment, folder, address, opened), daemon=True)
    child.start()
    try:
        if not opened.wait(START_SECONDS):
            raise VectorCLMError(f"MLflow at {address} took no run within {START_SECONDS} s")
        yield psutil.Process(child.pid)
    finally:
        child.kill()  # SIGKILL also ends a suspended process
        child.join()


def _log(experiment: ExperimentConfig, folder: Path, address: str, opened: Event) -> None:
    """Log as a curriculum does, until this process is killed."""
    os.environ["MLFLOW_TRACKING_URI"] = address
    logging.getLogger("flows").setLevel(logging.ERROR)  # hides the warnings about the stopped server
    from flows.tracking.tracker import Tracker

    tracker = Tracker(Store(str(folder)), experiment, plans(experiment))
    with tracker, tracker.stage("pretrain", 1, folder):
        tracker.do(opened.set)
        while True:
            signal.pause()


class _Training:
    """A training of `small` without end."""

    def __init__(self, experiment: ExperimentConfig) -> None:
        device = Runtime().configure_torch()
        torch.manual_seed(0)
        self.model = CausalLM(experiment.model).to(device)
        self.step = TrainStep(self.model, build_optimizers(self.model, experiment.pretrain.optimizer), 1.0, WINDOWS)
        length = experiment.shards.sequence_length
        self.batch = Batch(*[torch.randint(5, experiment.model.vocab_size, (WINDOWS, length))] * 2)
        self.steps = 0

    def turn(self, folder: Path, count: int) -> _Turn:
        """Train `count` steps, and write their metrics to `folder`."""
        metrics = Metrics(folder / "metrics.jsonl", lambda step: f"random tokens, step {step}")
        metrics.restart(metrics.text() if metrics.path.is_file() else "")
        turn = _Turn([], [])
        for _ in range(count):
            self.steps += 1
            began = time.monotonic()
            loss, norm = self.step(self.batch)
            trained = time.monotonic()
            metrics.add(self.steps, self.steps * self.batch.input_ids.numel(), loss, norm, 0.01)
            metrics.flush()
            turn.seconds.append(time.monotonic() - began)
            turn.held.append(time.monotonic() - trained)
        return turn


_training: _Training | None = None  # in the training's process


def _begin(experiment: ExperimentConfig) -> None:
    global _training
    _training = _Training(experiment)


def _turn(folder: Path, count: int) -> _Turn:
    assert _training is not None
    return _training.turn(folder, count)
