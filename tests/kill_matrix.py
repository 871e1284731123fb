"""The kill matrix: every part of a running platform killed with -9, in every stage, and what comes of it.

    python -m tests.kill_matrix FOLDER --postgres            all cells; those in FOLDER/cells.jsonl are not run again
    python -m tests.kill_matrix FOLDER --table               what was found, as a table

A cell starts a small curriculum, kills one part while one stage is at work, has `vectorclm doctor` start services
that are gone, and waits. Without an end by itself, it does what the UI's Retry does. In the end the models must be
those of the plain core, never killed.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from httpx import HTTPError
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.states import AwaitingRetry

from flows.form import Changes, chosen
from flows.net import free_port
from flows.platform.config import PlatformConfig, read_platform
from flows.platform.process import HOST, Service
from tests.services.postgres import Postgres
from vectorclm.config import ExperimentConfig
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.settings import validate
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import StageSpec, Store
from vectorclm.store.layout import STAGES

PARTS = ("flow", "child", "worker", "worker and flow", "server", "database", "MLflow", "worker of the GPU")
SETTINGS: dict[str, Any] = {
    "world.documents": 600,
    "world.conversations": 120,
    "sample.bytes": 400_000,
    "shards.sequence_length": 64,
    "model.num_hidden_layers": 2,
    "model.hidden_size": 64,
    "model.intermediate_size": 96,
    "pretrain.phases": [{"tokens": 163_840}],
    "pretrain.batch_size": 16,
    "pretrain.validation_interval": 80,
    "finetune.batch_size": 2,
    "finetune.epochs": 2.0,
}
CHANGES = {"seed": 5, "evaluate": {"chat_prompts": 3, "max_new_tokens": 32}, "settings": SETTINGS}
RUNTIME = {"threads": 1, "checkpoint_interval": 8}
SERVICES = {
    "worker": "worker-cpu",
    "worker and flow": "worker-cpu",
    "server": "prefect-server",
    "database": "postgres",
    "MLflow": "mlflow",
    "worker of the GPU": "worker-gpu",  # with placement pools: it holds a stage, the other worker the curriculum
}
LEFT_ALONE = 45  # seconds in which a run that ended badly must have been started again by the platform
LIMIT = 420  # seconds from the kill to the end; the longest way is a machine's death, found by missing heartbeats


@dataclass(frozen=True)
class Cell:
    """What is killed, and in which stage."""

    part: str
    stage: str

    def __str__(self) -> str:
        return f"{self.part} in {self.stage}"


CELLS = [Cell(part, "pretrain") for part in PARTS]
CELLS += [Cell(part, stage) for stage in STAGES if stage != "pretrain" for part in ("flow", "worker")]


@dataclass(frozen=True)
class Outcome:
    """What came of a cell."""

    part: str
    stage: str
    end: str  # by itself, by Retry
    states: list[str]  # that the run went through after the kill
    orphans_seconds: float  # until the last torch process of the killed run was gone
    mended_seconds: float  # until the doctor had everything up again
    seconds: float  # from the kill to success
    built: Mapping[str, int]  # task runs that made each stage


class Reference:
    """The plans of the small curriculum, and the models that the plain core makes of them."""

    def __init__(self, folder: Path) -> None:
        experiment, path = chosen("tiny", Changes.model_validate(CHANGES))
        folder.mkdir(parents=True, exist_ok=True)
        pinned, _ = pin(experiment, folder / path.name, None, resolve=True)
        self.plans: dict[str, StageSpec] = plans(pinned)
        self.store = Store(str(folder / "reference"))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(_make_all, pinned, self.store.uri).result()

    def models(self, store: Store) -> dict[str, str]:
        """SHA-256 of both models in a store, by its manifests."""
        found = {}
        for stage in ("pretrain", "finetune"):
            artifact = store.find(stage, self.plans[stage].fingerprint)
            assert artifact is not None, f"{store.uri} has no {stage}"
            found[stage] = str(artifact.manifest["files"]["model.safetensors"]["sha256"])
        return found


def _make_all(experiment: ExperimentConfig, store: str) -> None:
    for stage in STAGES:
        run_stage(stage, experiment, Store(store), validate(Runtime, RUNTIME, "the matrix"), None)


class Killer:
    """A platform, and ways to kill its parts."""

    def __init__(
        self,
        config: PlatformConfig,
        doctor: Callable[[], Any],
        client: SyncPrefectClient,
        postgres: Postgres | None = None,
    ) -> None:
        self.config, self.doctor, self.client, self.postgres = config, doctor, client, postgres
        self.store = Store(config.vectorclm_store)

    def run(self, cell: Cell, reference: Reference) -> Outcome:
        """Kill one part in one stage; AssertionError where the run does not end as it must."""
        self._clean()
        deployment = self.client.read_deployment_by_name("curriculum/curriculum")
        runtime = {**RUNTIME, "placement": "pools" if cell.part == "worker of the GPU" else "inline"}
        parameters = {"experiment": "tiny", "changes": CHANGES, "runtime": runtime}
        run_id = self.client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id
        self._wait_for_stage(cell.stage, reference.plans[cell.stage])
        killed = self._kill(cell.part, run_id)
        began = time.monotonic()
        orphans = self._gone(killed)
        if cell.part == "database" and self.postgres is not None:
            self.postgres.start()
        if cell.part not in ("flow", "child"):
            self.doctor()
        mended = time.monotonic() - began
        end, states = self._until_success(run_id, cell)
        seconds = time.monotonic() - began
        assert reference.models(self.store) == reference.models(reference.store), f"{cell}: another model"
        built = self._built(run_id)
        assert max(built.values()) == 1, f"{cell}: a stage was made twice: {built}"
        for stage, plan in reference.plans.items():
            assert self.store.list(stage) == [plan.fingerprint], f"{cell}: {stage}"
        self._assert_placed(run_id, cell)
        self._assert_logged(run_id, reference, cell)
        assert not self._torch(), f"{cell}: a torch process is left"
        return Outcome(
            cell.part, cell.stage, end, states, round(orphans, 1), round(mended, 1), round(seconds, 1), built
        )

    def _clean(self) -> None:
        for name in (*STAGES, "checkpoints", "leases", "work"):
            self.store.remove(name)

    def _wait_for_stage(self, stage: str, plan: StageSpec) -> None:
        """Until the stage is at work; a training, until it has a checkpoint to go on from."""
        lease = f"leases/{stage}-{plan.fingerprint[:16]}.json"
        steps = f"checkpoints/{plan.fingerprint}"
        training = stage in ("pretrain", "finetune")
        deadline = time.monotonic() + LIMIT
        while not (self._saved(steps) if training else self.store.read(lease)):
            assert time.monotonic() < deadline, f"{stage} does not begin"
            assert not self.store.list("export"), f"{stage} was not seen at work"
            time.sleep(0.002)

    def _saved(self, steps: str) -> bool:
        return any(self.store.read(f"{steps}/{step}/manifest.json") for step in self.store.list(steps))

    def _kill(self, part: str, run_id: UUID) -> list[psutil.Process]:
        """Kill a part with -9. Returns the torch processes that must not outlive it."""
        flow, torch = self._flow(run_id), self._torch()
        victims = {"flow": flow, "child": torch, "worker and flow": flow}.get(part, [])
        if (service := SERVICES.get(part)) is not None:
            (process,) = [found for one in self._services() if one.name == service and (found := one.process())]
            family = [process, *([] if part.startswith("worker") else process.children(recursive=True))]
            victims = [*family, *victims]
        assert victims, f"nothing to kill for {part}"
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        return torch if part in ("flow", "worker and flow", "child") else []

    def _services(self) -> list[Service]:
        own = [] if self.postgres is None else [self.postgres.service]
        return [*own, *self.config.servers(), *self.config.workers()]

    def _flow(self, run_id: UUID) -> list[psutil.Process]:
        """The processes that run the flow: the worker's child and what is between."""
        torch = {process.pid for process in self._torch()}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mine = process.environ().get("PREFECT__FLOW_RUN_ID") == str(run_id)
                if mine and process.pid not in torch:
                    found.append(process)
        return found

    def _torch(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if "--relay" in line and self.store.uri in line:
                    found.append(process)
        return found

    def _gone(self, processes: list[psutil.Process]) -> float:
        began = time.monotonic()
        _, left = psutil.wait_procs(processes, timeout=15)
        assert not left, f"orphans: {left}"
        return time.monotonic() - began

    def _until_success(self, run_id: UUID, cell: Cell) -> tuple[str, list[str]]:
        """Wait for success; a run that ended badly and is left alone is retried as the UI does it."""
        end, began = "by itself", time.monotonic()
        bad_since = began
        states = [state.name or "" for state in self.client.read_flow_run_states(run_id)]
        before = len(states)
        while True:
            assert time.monotonic() - began < LIMIT, f"{cell}: still {states[-1]} after {LIMIT} s: {states}"
            time.sleep(0.5)
            with suppress(HTTPError):
                ordered = sorted(self.client.read_flow_run_states(run_id), key=lambda state: state.timestamp)
                states = [state.name or "" for state in ordered]
                if states[-1] == "Completed":
                    return end, states[before:]
                if states[-1] not in ("Failed", "Crashed", "Cancelled"):
                    bad_since = time.monotonic()
                elif time.monotonic() - bad_since > LEFT_ALONE:
                    end = "by Retry"
                    self.client.set_flow_run_state(run_id, AwaitingRetry())

    def _built(self, run_id: UUID) -> dict[str, int]:
        """How many task runs made each stage; none of them may be left without an end."""
        wanted = FlowRunFilter.model_validate({"id": {"any_": [run_id]}})
        tasks = self.client.read_task_runs(flow_run_filter=wanted)
        assert all(task.state is not None and task.state.is_final() for task in tasks), "a task is left running"
        return {stage: sum(task.name == stage and task.state_name == "Completed" for task in tasks) for stage in STAGES}

    def _assert_placed(self, run_id: UUID, cell: Cell) -> None:
        """Of stages that were runs of their own, each was one run, and ended well."""
        part = FlowRunFilter.model_validate({"tags": {"all_": [f"part of {run_id}"]}})
        runs = sorted((run.name, run.state_name) for run in self.client.read_flow_runs(flow_run_filter=part))
        wanted = sorted(f"{stage} of tiny" for stage in STAGES) if cell.part == "worker of the GPU" else []
        assert runs == [(name, "Completed") for name in wanted], f"{cell}: {runs}"

    def _assert_logged(self, run_id: UUID, reference: Reference, cell: Cell) -> None:
        """MLflow has every step of the pretraining's last attempt, once, though it was away."""
        if cell.part != "MLflow":
            return
        mlflow = MlflowClient(self.config.mlflow_url)
        fingerprint = reference.plans["pretrain"].fingerprint
        query = f"tags.`prefect.flow_run_id` = '{run_id}' and tags.fingerprint = '{fingerprint}'"
        (experiment,) = mlflow.search_experiments(filter_string="name = 'tiny'")
        (run,) = mlflow.search_runs([experiment.experiment_id], query)
        artifact = self.store.find("pretrain", fingerprint)
        assert artifact is not None and run.info.status == "FINISHED", f"{cell}: {run.info.status} in MLflow"
        steps = [point.step for point in mlflow.get_metric_history(run.info.run_id, "train/loss")]
        assert sorted(steps) == list(range(1, artifact.summary["steps"] + 1)), f"{cell}: steps in MLflow: {steps}"


@contextmanager
def platform(config: PlatformConfig, options: list[str], postgres: Postgres | None) -> Iterator[Killer]:
    """A platform of our own while the block runs."""

    def command(name: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", name, *options], env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        command("up")
        with SyncPrefectClient(f"{config.prefect_url}/api", auth_string=config.prefect_password) as client:
            yield Killer(config, lambda: command("doctor"), client, postgres)
    finally:
        command("down")


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a markdown table."""
    lines = [
        "| killed | in | ends | torch gone | services back | success | states |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for o in outcomes:
        mended = "" if o.part in ("flow", "child") else f"{o.mended_seconds:.0f} s"
        states = ", ".join(o.states)
        lines.append(
            f"| {o.part} | {o.stage} | {o.end} | {o.orphans_seconds:.1f} s | {mended} | {o.seconds:.0f} s | {states} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the cells that are not there yet, or print the table of those that are."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--env-file", type=Path, help="settings of the platform")
    parser.add_argument("--postgres", action="store_true", help="keep the databases in a Postgres, in FOLDER")
    parser.add_argument("--only", action="append", metavar="CELL", help='such as "flow in pretrain"; may be repeated')
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    folder: Path = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "cells.jsonl"
    done = [Outcome(**json.loads(line)) for line in record.read_text().splitlines()] if record.exists() else []
    if args.table:
        print(table(done))
        return
    left = [cell for cell in CELLS if (cell.part, cell.stage) not in {(o.part, o.stage) for o in done}]
    left = [cell for cell in left if not args.only or str(cell) in args.only]
    reference = Reference(folder)
    with _postgres_of(folder, args.postgres) as postgres:
        _run(folder, args.env_file, left, reference, postgres)


@contextmanager
def _postgres_of(folder: Path, wanted: bool) -> Iterator[Postgres | None]:
    """A Postgres while the block runs, which the environment names as the platform's database."""
    if not wanted:
        yield None
        return
    port, password = free_port(), "of-the-kill-matrix"
    postgres = Postgres(folder / "postgres", folder / "logs", port, password)
    try:
        postgres.start()
        os.environ["VECTORCLM_DATABASE"] = f"postgresql://vectorclm:{password}@{HOST}:{port}"
        yield postgres
    finally:
        postgres.stop()


def _run(
    folder: Path, env_file: Path | None, left: list[Cell], reference: Reference, postgres: Postgres | None
) -> None:
    """Run these cells on a platform of their own, and record each outcome."""
    record = folder / "cells.jsonl"
    options = ["--store", str(folder / "store")]
    options += ["--env-file", str(env_file)] if env_file is not None else []
    config = read_platform(env_file, vectorclm_store=str(folder / "store"))
    options += ["--prefect-port", str(config.prefect_port), "--mlflow-port", str(config.mlflow_port)]
    environment = config.client_environment()
    os.environ |= {name: value for name, value in environment.items() if name.startswith("MLFLOW_")}  # its password
    with platform(config, options, postgres) as killer:
        for cell in left:
            try:
                outcome = killer.run(cell, reference)
            except AssertionError as error:
                print(f"!! {cell}: {error}", flush=True)
                continue
            with record.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(f"ok {cell}: {outcome.end}, {outcome.seconds} s, {outcome.states}", flush=True)


if __name__ == "__main__":
    main()
