"""`vectorclm bench tracking`: what logging takes of a training step, with MLflow's server up and with it down.

Training is a process of its own, so all that logging can take from it is processor time: that of the tracker's process
is counted, as if it came whole out of the step. Step times with and without it are told beside, which on a machine with
other work differ by more than the bound.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from vectorclm.artifact import Store
from vectorclm.bench import Row, bounded
from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.dataset import Batch
from vectorclm.model import CausalLM
from vectorclm.muon import build_optimizers
from vectorclm.pinning import pin
from vectorclm.runtime import Runtime
from vectorclm.stages import plans
from vectorclm.train import Metrics, train_step

STEPS = 24  # in each round; the first, which is slower, does not count
WINDOWS = 4  # a small batch, whose steps are the hardest to keep pace with
BOUND = 1.0  # percent
SETTLE_SECONDS = 6  # for opening the runs, which happens once and is no step's


def tracking(rounds: int, data: Path | None) -> Iterator[Row]:
    """Steps of `small` on tokens drawn at random: `data` is not needed."""
    with tempfile.TemporaryDirectory(prefix="vectorclm-bench-") as name, _server(Path(name)) as uri:
        folder = Path(name)
        experiment, path = load_experiment("small")
        experiment, _ = pin(experiment, folder / path.name, None, resolve=False)
        places = {"without": "", "up": uri, "down": "http://127.0.0.1:9"}
        steps: dict[str, list[float]] = {place: [] for place in places}
        shares: dict[str, list[float]] = {place: [] for place in places}
        for number in range(rounds):
            for place, address in places.items():
                work = folder / f"{place}-{number}"
                work.mkdir()
                seconds, used = _watched(experiment, work, address)
                steps[place].append(seconds)
                shares[place].append(100 * used / (seconds * (STEPS - 1)))
        alone = median(steps["without"])
        for place in ("up", "down"):
            note = f"a step takes {median(steps[place]):.3f} s, without MLflow {alone:.3f} s"
            yield bounded(f"small, logging with MLflow {place}", shares[place], "% of a step", BOUND, note)


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """A real MLflow server with a database of its own."""
    from flows.server import answers

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True, cwd=folder)
    try:
        while not answers(f"{uri}/health"):
            time.sleep(0.5)
        yield uri
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(60)


def _watched(experiment: ExperimentConfig, folder: Path, address: str) -> tuple[float, float]:
    """The median seconds of a step, and the processor seconds that this process took beside all that count."""
    from flows.tracking import Tracker

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # it has started
        if not address:
            return median(pool.submit(_train, experiment, folder).result()), 0.0
        tracker = Tracker(Store(str(folder)), experiment, plans(experiment))
        with _named(address), tracker, tracker.stage("pretrain", 1, folder):
            time.sleep(SETTLE_SECONDS)
            began = time.process_time()
            seconds = pool.submit(_train, experiment, folder).result()
            return median(seconds), time.process_time() - began


@contextmanager
def _named(address: str) -> Iterator[None]:
    """MLflow's server is the one at `address` while the block runs."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = address
    try:
        yield
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _train(experiment: ExperimentConfig, folder: Path) -> list[float]:
    """Seconds of each step but the first, its metrics written as a training writes them."""
    device = Runtime().configure_torch()
    config, length = experiment.pretrain, experiment.shards.sequence_length
    torch.manual_seed(0)
    model = CausalLM(experiment.model).to(device)
    optimizers = build_optimizers(model, config.optimizer)
    ids = torch.randint(5, experiment.model.vocab_size, (WINDOWS, length))
    metrics = Metrics(folder / "metrics.jsonl", lambda step: f"random tokens, step {step}")
    metrics.restart("")
    seconds = []
    for step in range(1, STEPS + 1):
        began = time.monotonic()
        loss, norm = train_step(model, optimizers, Batch(ids, ids), 1.0, WINDOWS, device)
        metrics.add(step, step * WINDOWS * length, loss, norm, 0.01)
        metrics.flush()
        seconds.append(time.monotonic() - began)
    return seconds[1:]
