"""`vectorclm bench orchestration`: the overhead of Prefect and MLflow against the core alone."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vectorclm.bench.table import Row, compared, could_not_run
from vectorclm.config import ExperimentConfig, changed, load_experiment
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store
from vectorclm.store.layout import STAGES

START = 15  # seconds: bound of the fixed overhead of a curriculum, for servers, imports and processes
SHARE = 0.05  # bound of the overhead as a share of the curriculum's time
# Of the first curriculum, which is not measured: it only creates the databases.
FIRST_CHANGES: dict[str, Any] = {"pretrain.phases": [{"tokens": 8192}], "finetune.epochs": 0.02}
LOOP = 0.01  # bound of the slowdown of a training step
LOOP_STEPS = 40
# Little text, as the loss does not matter, and a small batch: short steps show the largest overhead.
LOOP_CHANGES: dict[str, Any] = {"sample.bytes": 20_000_000, "sample.validation_share": 0.05}
LOOP_CHANGES |= {"pretrain.batch_size": 4, "pretrain.validation_interval": 1000}


def orchestration(rounds: int, data: Path | None) -> Iterator[Row]:
    """Rows for the whole of `tiny` and for the training loop of `small` on the text of the mirror `data`."""
    with temporary_folder("bench-") as folder:
        yield _whole(folder, rounds)
    with temporary_folder("bench-") as folder:
        yield _loop(folder, rounds, data)


def _whole(folder: Path, rounds: int) -> Row:
    experiment, path = load_experiment("tiny")
    experiment, _ = pin(experiment, folder / path.name, None, resolve=True)
    with_both, alone = folder / "with", folder / "alone"
    _curriculum(folder, changed(experiment, FIRST_CHANGES), with_both)
    ours, peer = [], []
    for _ in range(rounds):
        peer.append(_timed(lambda: _in_process(_core, experiment, alone, STAGES, None)))
        _forget(with_both)
        ours.append(_timed(lambda: _curriculum(folder, experiment, with_both)))
        _forget(alone)
    bound = 1 + SHARE + START / sorted(peer)[len(peer) // 2]
    return compared("tiny with Prefect and MLflow, whole", ours, peer, "s", ask=bound, most=True)


def _loop(folder: Path, rounds: int, data: Path | None) -> Row:
    name = "small with Prefect and MLflow, a training step"
    if data is None:
        return could_not_run(name, "tokens/s", 1 - LOOP, "no text: name a mirror with --data")
    experiment, path = load_experiment("small")
    tokens = LOOP_STEPS * 4 * experiment.shards.sequence_length
    experiment = changed(experiment, {**LOOP_CHANGES, "pretrain.phases": [{"tokens": tokens}]})
    experiment, _ = pin(experiment, folder / path.name, data, resolve=True)
    store = folder / "store"
    _in_process(_core, experiment, store, ("sample", "tokenizer", "shards"), data)
    ours: list[float] = []
    peer: list[float] = []
    for _ in range(rounds):
        for speeds, train in ((peer, _core), (ours, _orchestrated)):
            _in_process(train, experiment, store, ("pretrain",), data)
            speeds.append(_speed(experiment, store))
            shutil.rmtree(store / "pretrain")
    return compared(name, ours, peer, "tokens/s", ask=1 - LOOP, most=False)


def _core(experiment: ExperimentConfig, folder: Path, stages: tuple[str, ...], data: Path | None) -> None:
    """The peer: run the stages one after another in one process."""
    for stage in stages:
        run_stage(stage, experiment, Store(str(folder)), Runtime(), data)


def _orchestrated(experiment: ExperimentConfig, folder: Path, stages: tuple[str, ...], data: Path | None) -> None:
    """Run the stages as tasks of a flow, with a private Prefect server and MLflow."""
    from flows.platform.prefect_server import prefect_server

    with prefect_server(folder / ".prefect") as server:
        from prefect import flow

        from flows.execution.stage_tasks import Stages

        if server is not None:
            server.wait()

        @flow(name="bench", persist_result=False)
        def bench() -> None:
            with Stages(experiment, Runtime(), str(folder), data) as stage:
                for name in stages:
                    stage(name)
                stage.handles()

        bench()


def _curriculum(folder: Path, experiment: ExperimentConfig, store: Path) -> None:
    """Run `vectorclm run` of an experiment, as a user does."""
    path = folder / "experiment.json"
    path.write_text(experiment.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "flows.cli", "run", str(path), "--json", "--store", str(store)]
    servers = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
    environment = {key: value for key, value in os.environ.items() if key not in servers}
    subprocess.run(command, env=environment, check=True, capture_output=True)


def _in_process(
    work: Callable[[ExperimentConfig, Path, tuple[str, ...], Path | None], None],
    experiment: ExperimentConfig,
    folder: Path,
    stages: tuple[str, ...],
    data: Path | None,
) -> None:
    """Run a function in a new process; both sides include its start."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(work, experiment, folder, stages, data).result()


def _timed(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _speed(experiment: ExperimentConfig, store: Path) -> float:
    """Tokens per second of the training loop after step 10, from the artifact's metrics."""
    folder = store / "pretrain" / plans(experiment)["pretrain"].fingerprint
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds: list[float] = [line["tokens_per_second"] for line in lines if "loss" in line and line["step"] > 10]
    return len(speeds) / sum(1 / speed for speed in speeds)


def _forget(store: Path) -> None:
    """Remove the artifacts, and keep the migrated databases."""
    for stage in STAGES:
        shutil.rmtree(store / stage, ignore_errors=True)
