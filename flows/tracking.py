"""What MLflow is told: a run for the curriculum, one for each stage in it, data sets, models, their lineage.

One thread talks to MLflow, in order; stages only hand it jobs. Whatever fails there is warned of once and
never stops or slows a run: live metrics that could not be sent are sent later, from the file that keeps them.
"""

import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Before MLflow is imported: it asks the environment once, and an unreachable server must cost little.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import mlflow
import psutil
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    RunTag,
)
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from vectorclm.artifact import Artifact, Plan, Store
from vectorclm.config import ExperimentConfig
from vectorclm.corpus import Source
from vectorclm.runtime import git_revision

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # between two looks at a training stage's metrics
CLOSE_SECONDS = 60  # how long the end of a curriculum waits for MLflow
BATCH = 900  # metrics in one request; MLflow takes 1,000
PARAM_BATCH = 90  # parameters in one request; MLflow takes 100
VALUE_LENGTH = 500  # of a parameter or tag, in every version of MLflow's servers
DIGEST_LENGTH = 36  # of a data set
PROFILE_LENGTH = 16_000  # of a data set
ALIAS = "candidate"

MODELS = {"tokenizer": "tokenizer", "pretrain": "base", "finetune": "chat"}  # stage -> model
REGISTERED = {"pretrain": "vectorclm-base", "finetune": "vectorclm-chat"}
DATASETS = ("sample", "shards", "chat_shards")
EVALUATED = {"evaluate_base": "pretrain", "evaluate": "finetune"}


def local_folder(store: Store) -> Path:
    """Where what belongs to a store but must be on this machine is kept."""
    return Path(store.root).absolute() if store.is_local else Path.home() / ".local" / "share" / "vectorclm"


def tracking_uri(store: Store) -> str:
    """MLFLOW_TRACKING_URI, else a database in the local store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local_folder(store) / 'mlflow.db'}"


class Tracker:
    """The MLflow run of one curriculum; a block that opens it and closes it with the right status."""

    def __init__(
        self,
        store: Store,
        experiment: ExperimentConfig,
        plans: Mapping[str, Plan],
        flow_run_id: str | None = None,
    ) -> None:
        self.store, self.experiment, self.plans = store, experiment, plans
        self.common = {
            "experiment": experiment.name,
            "git": git_revision() or "none",
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            **({"prefect.flow_run_id": flow_run_id} if flow_run_id else {}),
        }
        self.run_ids: dict[str, str] = {}
        self.model_ids: dict[str, str] = {}  # fingerprint -> id
        self.active: list[StageRun] = []
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.do(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.do(lambda: self.client.set_terminated(self.parent_id, status))
        self._jobs.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("MLflow at %s is too slow: its last figures are missing there", self.uri)

    def do(self, job: Callable[[], None]) -> None:
        """Have the thread do `job` after those before it."""
        self._jobs.put(job)

    @contextmanager
    def stage(self, name: str, attempt: int, folder: Path) -> Iterator["StageRun"]:
        """A nested run around the making of a stage; `folder` is where its metrics appear."""
        run = StageRun(self, name, folder / "metrics.jsonl")
        self.do(lambda: run.open(attempt))
        try:
            yield run
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            self.do(lambda: run.close(status, {"error": message}))
            raise
        self.do(lambda: run.close("FINISHED", {}))

    def reused(self, name: str, artifact: Artifact) -> None:
        """A nested run for a stage that was there already."""

        def job() -> None:
            run_id = self._create_run(name, {"state": "reused", "uri": artifact.uri})
            if name in MODELS:
                self.model_id(name, artifact)
            if name in EVALUATED:
                self.glance(name, numbers(artifact.summary))
            self.client.set_terminated(run_id)
            if name == "export":
                self.register_models()

        self.do(job)

    def model_id(self, name: str, artifact: Artifact | None = None) -> str | None:
        """The logged model of a stage's artifact, made where there is none; None without the artifact."""
        plan = self.plans[name]
        if plan.fingerprint not in self.model_ids:
            known = self.client.search_logged_models(
                [self.experiment_id], f"tags.fingerprint = '{plan.fingerprint}'", max_results=1
            )
            if known:
                self.model_ids[plan.fingerprint] = known[0].model_id
            elif (made := artifact or self.store.find(plan.stage, plan.fingerprint)) is not None:
                model = mlflow.create_external_model(
                    MODELS[name],
                    source_run_id=self.run_ids.get(name),
                    tags={"fingerprint": plan.fingerprint, "uri": made.uri, "stage": name},
                    params=flatten({"config": plan.config, "summary": made.summary}),
                    model_type="tokenizer" if name == "tokenizer" else "llama",
                    experiment_id=self.experiment_id,
                )
                self.model_ids[plan.fingerprint] = model.model_id
        return self.model_ids.get(plan.fingerprint)

    def dataset(self, name: str) -> Dataset | None:
        """The artifact of a data stage as MLflow's data set, with what it holds."""
        plan = self.plans[name]
        made = self.store.find(plan.stage, plan.fingerprint)
        if made is None:
            return None
        return Dataset(
            f"{self.experiment.name} {name}",
            plan.fingerprint[:DIGEST_LENGTH],
            "local" if self.store.is_local else self.store.uri.partition(":")[0],
            json.dumps({"uri": made.uri}),
            profile=json.dumps(made.summary)[:PROFILE_LENGTH],
        )

    def glance(self, name: str, figures: Mapping[str, float]) -> None:
        """The scores that the stage `name` gave, on the curriculum's own run."""
        now, model = int(time.time() * 1000), MODELS[EVALUATED[name]]
        metrics = [Metric(f"{model}/{key}", value, now, 0) for key, value in figures.items()]
        self.client.log_batch(self.parent_id, metrics=metrics[:BATCH])

    def register_models(self) -> None:
        """A new version of the base and the chat model where the registry has none of this fingerprint."""
        for stage, name in REGISTERED.items():
            plan = self.plans[stage]
            query = f"name = '{name}' and tags.fingerprint = '{plan.fingerprint}'"
            if self.client.search_model_versions(query, max_results=1):
                continue
            if (model_id := self.model_id(stage)) is None:
                continue
            if not self.client.search_registered_models(f"name = '{name}'", max_results=1):
                about = f"The {MODELS[stage]} models of the curriculum, newest as `{ALIAS}`."
                self.client.create_registered_model(name, description=about)
            version = self.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=self.run_ids.get(stage),
                tags={
                    "fingerprint": plan.fingerprint,
                    "uri": self.store.uri_of(f"{stage}/{plan.fingerprint}"),
                },
                description=self._lineage(stage),
                await_creation_for=0,
                model_id=model_id,
            )
            self.client.set_registered_model_alias(name, ALIAS, version.version)

    def _lineage(self, stage: str) -> str:
        """What a model was made from, as a markdown table with links into MLflow."""
        names = [stage]
        for name in reversed(list(self.plans)):
            if any(name in self.plans[later].inputs for later in names):
                names.append(name)
        scored = [score for score, model in EVALUATED.items() if model == stage]
        lines = ["| stage | fingerprint | artifact |", "|---|---|---|"]
        for name in sorted([*names, *scored], key=list(self.plans).index):
            print_ = self.plans[name].fingerprint
            run_id = self.run_ids.get(name)
            link = f"[{name}](#/experiments/{self.experiment_id}/runs/{run_id})" if run_id else name
            lines.append(f"| {link} | `{print_[:16]}` | `{self.store.uri_of(f'{name}/{print_}')}` |")
        return "\n".join(lines)

    def _work(self) -> None:
        polled = 0.0
        while True:
            try:
                job = self._jobs.get(timeout=POLL_SECONDS)
            except queue.Empty:
                job = _nothing
            if job is None:
                return
            self._try(job)
            if time.monotonic() - polled > POLL_SECONDS:
                for run in self.active:
                    self._try(run.relay)
                polled = time.monotonic()

    def _try(self, job: Callable[[], None]) -> None:
        try:
            job()
        except _NotOpenError:
            pass  # what this job belongs to could not be opened, which was warned of
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            level = logging.DEBUG if self._warned else logging.WARNING
            logger.log(level, "MLflow at %s: %s; the run goes on without it", self.uri, first[:160])
            self._warned = True

    @property
    def uri(self) -> str:
        """The address of MLflow."""
        return tracking_uri(self.store)

    @property
    def parent_id(self) -> str:
        """The curriculum's run."""
        return self._opened("curriculum")

    def _opened(self, name: str) -> str:
        if name not in self.run_ids:
            raise _NotOpenError(name)
        return self.run_ids[name]

    def _open(self) -> None:
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        mlflow.set_tracking_uri(self.uri)
        folder = local_folder(self.store)
        folder.mkdir(parents=True, exist_ok=True)
        own = self.uri.startswith("sqlite:")
        with FileLock(folder / "mlflow.lock"):  # three processes in a fresh database's migration: two die
            self.client = MlflowClient(self.uri)
            name = self.experiment.name
            if (found := self.client.get_experiment_by_name(name)) is not None:
                self.experiment_id = found.experiment_id
            else:
                place = (folder / "mlartifacts").as_uri() if own else None
                self.experiment_id = self.client.create_experiment(name, artifact_location=place)
        self._close_orphans()
        whole = self.plans["export"].fingerprint
        run = self.client.create_run(
            self.experiment_id,
            tags={**self.common, "stage": "curriculum", "fingerprint": whole},
            run_name="curriculum",
        )
        self.run_ids["curriculum"] = run.info.run_id
        self.log_params(run.info.run_id, self.experiment.model_dump(mode="json"))

    def _close_orphans(self) -> None:
        """Runs left RUNNING by dead processes, and by earlier attempts at what this one will make."""
        ours = {plan.fingerprint for plan in self.plans.values()}
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            tags = run.data.tags
            here = tags.get("host") == self.common["host"]
            alive = here and psutil.pid_exists(int(tags.get("pid", 0)))
            if (here or tags.get("fingerprint") in ours) and not alive:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _create_run(self, name: str, tags: Mapping[str, str]) -> str:
        plan = self.plans[name]
        own = {"mlflow.parentRunId": self.parent_id, "stage": name, "fingerprint": plan.fingerprint}
        run = self.client.create_run(self.experiment_id, tags={**self.common, **own, **tags}, run_name=name)
        self.run_ids[name] = str(run.info.run_id)
        return self.run_ids[name]

    def log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Settings as parameters, nested keys joined by dots."""
        params = [Param(key, value) for key, value in flatten(values).items()]
        for start in range(0, len(params), PARAM_BATCH):
            self.client.log_batch(run_id, params=params[start : start + PARAM_BATCH])


class StageRun:
    """The nested run of a stage in the making. All but `finished` happens in the tracker's thread."""

    def __init__(self, tracker: Tracker, name: str, metrics: Path) -> None:
        self.tracker, self.name, self.metrics = tracker, name, metrics
        self.artifact: Artifact | None = None
        self._run_id = ""
        self._sent: set[tuple[str, int]] = set()
        self._monitor: Any = None

    def finished(self, artifact: Artifact) -> None:
        """The stage has made this."""
        self.artifact = artifact

    def open(self, attempt: int) -> None:
        """Create the run, with its settings and what it is made from."""
        tracker, plan = self.tracker, self.tracker.plans[self.name]
        self._run_id = tracker._create_run(self.name, {"state": "building", "attempt": str(attempt)})
        tracker.active.append(self)
        tracker.log_params(self._run_id, plan.config)
        context = [InputTag("mlflow.data.context", self.name)]
        made = [tracker.dataset(name) for name in plan.inputs if name in DATASETS]
        inputs = [DatasetInput(entity, context) for entity in [*made, *self._sources()] if entity is not None]
        models = [tracker.model_id(name) for name in plan.inputs if name in MODELS]
        tracker.client.log_inputs(self._run_id, inputs, [LoggedModelInput(model) for model in models if model])
        monitor: Any = SystemMetricsMonitor  # MLflow's is untyped
        self._monitor = monitor(self._run_id, sampling_interval=5, tracking_uri=tracker.uri)
        self._monitor.start()

    def _sources(self) -> list[Dataset]:
        """The documents, conversations or questions that this stage reads, at their revisions."""
        experiment = self.tracker.experiment
        groups: dict[str, Sequence[Source]] = {
            "sample": experiment.sample.sources,
            "chat_shards": experiment.chat.sources,
            "evaluate_base": experiment.evaluate.tasks,
            "evaluate": experiment.evaluate.tasks,
        }
        found = []
        for source in groups.get(self.name, ()):
            revision = source.revision or "none"
            place = {
                "path": source.path,
                "config_name": source.name,
                "split": source.split,
                "revision": revision,
            }
            kind = "local" if revision.startswith("sha256:") else "hugging_face"
            digest = revision.removeprefix("sha256:")[:DIGEST_LENGTH]
            profile = source.model_dump_json()
            found.append(Dataset(source.label, digest, kind, json.dumps(place), profile=profile))
        return found

    def relay(self) -> None:
        """Send the work folder's metrics that were not sent yet; the file may be missing, or cut back."""
        try:
            text = self.metrics.read_text(encoding="utf-8")
        except OSError:
            return
        self._send(text)

    def _send(self, text: str, model_id: str | None = None) -> None:
        if not self._run_id:
            raise _NotOpenError(self.name)
        now, batch, kinds = int(time.time() * 1000), list[Metric](), set[tuple[str, int]]()
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # still being written
            values = json.loads(line)
            kind = ("validation" if "validation" in values else "train", int(values["step"]))
            if kind not in self._sent:
                kinds.add(kind)
                figures = readable(values)
                batch += [Metric(key, value, now, kind[1], model_id) for key, value in figures.items()]
            if len(batch) >= BATCH:
                self._flush(batch, kinds)
        self._flush(batch, kinds)

    def _flush(self, batch: list[Metric], kinds: set[tuple[str, int]]) -> None:
        if batch:
            self.tracker.client.log_batch(self._run_id, metrics=batch)
            self._sent |= kinds
            batch.clear()
            kinds.clear()

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """Complete the run from the artifact, and end it."""
        if self in self.tracker.active:
            self.tracker.active.remove(self)
        if self._monitor is not None:
            self._monitor.finish()
        if not self._run_id:
            raise _NotOpenError(self.name)
        try:
            if self.artifact is not None:
                self._complete(self.artifact)
            else:
                self.relay()
            tags = {"state": "built" if self.artifact is not None else "failed", **tags}
            self.tracker.client.log_batch(
                self._run_id, tags=[RunTag(key, value[:VALUE_LENGTH]) for key, value in tags.items()]
            )
        finally:
            self.tracker.client.set_terminated(self._run_id, status)

    def _complete(self, artifact: Artifact) -> None:
        tracker, name = self.tracker, self.name
        client = tracker.client
        model_id = tracker.model_id(name, artifact) if name in MODELS else None
        if model_id is not None:
            client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step=artifact.summary.get("steps", 0))])
        client.log_batch(self._run_id, tags=[RunTag("uri", artifact.uri)])
        if "metrics.jsonl" in artifact.manifest["files"]:
            kept = tracker.store.read(f"{artifact.stage}/{artifact.fingerprint}/metrics.jsonl") or b""
            self._send(kept.decode())
        client.log_dict(self._run_id, dict(artifact.manifest), "manifest.json")
        if name in EVALUATED:
            self._scores(artifact)
        elif name not in REGISTERED:
            self._log(numbers(artifact.summary))
        else:
            dataset = tracker.dataset("chat_shards" if name == "finetune" else "shards")
            figures = readable({"validation": artifact.summary["validation"], "step": 0})
            self._log({f"final_{key}": value for key, value in figures.items()}, model_id, dataset)
        if name == "export":
            tracker.register_models()

    def _scores(self, artifact: Artifact) -> None:
        """The scores, on this run, on the model they are of, and at a glance on the curriculum's run."""
        tracker = self.tracker
        figures = numbers(artifact.summary)
        model_id = tracker.model_id(EVALUATED[self.name])
        self._log(figures, model_id, tracker.dataset("shards"))
        tracker.glance(self.name, figures)

    def _log(self, figures: Mapping[str, float], model_id: str | None = None, dataset: Dataset | None = None) -> None:
        now = int(time.time() * 1000)
        linked = (model_id, dataset.name, dataset.digest) if dataset is not None else (model_id, None, None)
        batch = [Metric(key, value, now, 0, *linked) for key, value in figures.items()]
        self.tracker.client.log_batch(self._run_id, metrics=batch[:BATCH])


class _NotOpenError(Exception):
    """MLflow did not take the run that a job belongs to."""


def _nothing() -> None:
    pass


def readable(line: Mapping[str, Any]) -> dict[str, float]:
    """One line of `metrics.jsonl` as metrics: `train/loss`, `validation/bits_per_byte.stories`, …"""
    if "validation" in line:
        return {
            f"validation/{figure}.{label}": float(value)
            for label, figures in line["validation"].items()
            for figure, value in figures.items()
        }
    return {f"train/{key}": float(value) for key, value in line.items() if key not in ("step", "tokens")}


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers in nested mappings, their keys joined by dots."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b.0.c`: text, in the length that MLflow takes."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = str(value)[:VALUE_LENGTH]
    return found
