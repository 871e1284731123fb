"""What MLflow is told: a run for the curriculum, one for each stage in it, data sets, models, their lineage.

One thread talks to MLflow, in order; stages only hand it jobs, which are kept while MLflow is away. Whatever fails
there is warned of once and never stops or slows a run: live metrics that could not be sent are sent later, from the
file that keeps them, and what is missing when a curriculum ends is told by the next run of it, from the artifacts.
"""

import json
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlflow
import psutil
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from flows.net import answers, without_password
from flows.paths import local_folder
from flows.tracking.catalog import Catalog
from flows.tracking.client import (
    BATCH,
    CHAMPION,
    MODELS,
    NOTE,
    REGISTERED,
    NotOpenError,
    flatten,
    run_page,
    tracking_uri,
)
from flows.tracking.outbox import Outbox
from flows.tracking.stage_run import StageRun
from vectorclm.config import ExperimentConfig
from vectorclm.lineage.chain import score_facts
from vectorclm.runtime.devices import git_revision
from vectorclm.runtime.processes import mark, marked, process_space
from vectorclm.stages import EVALUATED
from vectorclm.store.artifact import Artifact, Plan, Store

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60  # how long the end of a curriculum waits for MLflow
PARAM_BATCH = 90  # parameters in one request; MLflow takes 100
PROBE = "vectorclm.written"  # a tag of the experiment: when it was last looked whether MLflow takes what is written

ABOUT = """Curricula of the experiment `{name}`: text in, an evaluated chat model out.

Each is a run that bears the fingerprint of all its settings and sources. The plus sign before it shows its stages, a
run for each attempt at one, with its curves. *Columns* adds scores to the table (`chat/acc…`), the chart view lays
curves of several runs over one another (`train/loss`). A run's page begins with what it has made, and from what."""
BEGUN = "A curriculum that has not come to its end. Its stages are its child runs, what they make is in `{store}`."


class Tracker:
    """The MLflow run of one curriculum; a block that opens it and closes it with the right status."""

    def __init__(
        self,
        store: Store,
        experiment: ExperimentConfig,
        plans: Mapping[str, Plan],
        flow_run_id: str | None = None,
        root_flow_run_id: str | None = None,
    ) -> None:
        self.store, self.experiment, self.plans = store, experiment, plans
        git = git_revision() or "none"
        self.common = {
            "experiment": experiment.name,
            "git": git,
            **({"mlflow.source.git.commit": git.removesuffix("-dirty")} if git != "none" else {}),
            "mlflow.source.name": "vectorclm",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": psutil.Process().username(),
            "dirty": str(git.endswith("-dirty")).lower(),
            "host": socket.gethostname(),
            "process": json.dumps(mark(psutil.Process())),
            **({"prefect.flow_run_id": flow_run_id} if flow_run_id else {}),
        }
        self.root_flow_run_id = root_flow_run_id  # of the curriculum that this is a part of, on another machine
        self._part_of_another = False
        self.client: MlflowClient  # once it is open, as is the next
        self.experiment_id = ""
        self.run_ids: dict[str, str] = {}
        self._session = secrets.token_hex(8)
        self._created: dict[str, str] = {}  # by a key of each run -> its id
        self.active: list[StageRun] = []
        self.catalog = Catalog(self)
        self._warned = False
        self._tried = threading.Event()  # to open the curriculum's run
        self._outbox = Outbox(self._relay, self._failed, self._answers)

    def __enter__(self) -> Self:
        self._outbox.start()
        self.do(self._open)
        self.do(self._tried.set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.do(lambda: self._close(status))
        where = without_password(self.uri)
        if not self._outbox.close(CLOSE_SECONDS):
            logger.warning("MLflow at %s is too slow: its last figures are missing there", where)
        elif self._outbox.left:
            logger.info("MLflow at %s stayed away: the next run of this curriculum tells it what is missing", where)

    def page(self, seconds: float) -> str | None:
        """The address of the curriculum's run in MLflow's UI, once it is open; None where there is no server."""
        if not self.uri.startswith("http") or not self._tried.wait(seconds) or "curriculum" not in self.run_ids:
            return None
        return f"{without_password(self.uri).rstrip('/')}/{run_page(self.experiment_id, self.run_ids['curriculum'])}"

    def champion(self, seconds: float) -> str | None:
        """Where the champion's files are; None without one, and where MLflow does not say it in time."""
        found: queue.Queue[str] = queue.Queue()

        def ask() -> None:
            try:
                version = self.client.get_model_version_by_alias(REGISTERED["finetune"], CHAMPION)
                found.put(version.tags.get("uri", ""))
            except MlflowException:
                found.put("")  # there is none yet

        if not self._tried.wait(seconds) or "curriculum" not in self.run_ids:
            return None
        self.do(ask)
        with suppress(queue.Empty):
            return found.get(timeout=seconds) or None
        return None

    def report(self, page: str) -> str | None:
        """Keep the curriculum's report with its run; where it is to be seen, None where there is no server."""
        self.do(lambda: self.client.log_text(self.parent_id, page, "report.html"))
        place = self.page(0)
        return None if place is None else place.replace("?workflowType", "/artifacts/report.html?workflowType")

    def do(self, job: Callable[[], None]) -> None:
        """Have the thread do `job` after those before it."""
        self._outbox.put(job)

    @contextmanager
    def stage(self, name: str, attempt: int, folder: Path) -> Iterator["StageRun"]:
        """A nested run around the making of a stage; `folder` is where its metrics appear."""
        run = StageRun(self, name, folder)
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

        late = StageRun(self, name, None)
        late.finished(artifact)
        key = self.new_key()

        def job() -> None:
            if key not in self._created and not self._recorded(name):  # MLflow was away when it was made
                late.open(0)
                late.close("FINISHED", {"recorded": "later, from the artifact"})
                return
            run_id = self.create_run(key, name, {"state": "reused", "uri": artifact.uri})
            self.catalog.log_inputs(name)
            self.catalog.describe(run_id, name)
            self.catalog.show(name, artifact)
            if name in EVALUATED:
                self.glance(name, artifact)
            self.client.set_terminated(run_id)
            if name == "export":
                self.catalog.register_models()

        self.do(job)

    def _recorded(self, name: str) -> bool:
        """Whether MLflow has the whole record of a stage's artifact."""
        query = f"tags.stage = '{name}' and tags.fingerprint = '{self.plans[name].fingerprint}'"
        query += " and tags.state = 'built' and attributes.status = 'FINISHED'"
        return bool(self.client.search_runs([self.experiment_id], query, max_results=1))

    def glance(self, name: str, scores: Artifact) -> None:
        """The scores that the stage `name` gave, on the curriculum's own run: those that are asked first."""
        now, model = int(time.time() * 1000), MODELS[EVALUATED[name]]
        metrics = [Metric(f"{model}/{key}", value, now, 0) for key, value in score_facts(scores).items()]
        self.client.log_batch(self.parent_id, metrics=metrics[:BATCH])

    def _relay(self) -> None:
        for run in self.active:
            run.relay()

    def _answers(self) -> bool:
        """Whether MLflow is there and takes what is written: a server also answers while its disk is full."""
        if self.uri.startswith("http") and not answers(f"{without_password(self.uri).rstrip('/')}/health"):
            return False
        if not self.experiment_id:
            return False
        try:
            self.client.set_experiment_tag(self.experiment_id, PROBE, datetime.now(UTC).isoformat(timespec="seconds"))
        except Exception:
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self._tried.set()
        if isinstance(error, NotOpenError):
            return  # what this job belongs to could not be opened, which was warned of
        first = without_password((str(error).strip() or type(error).__name__).splitlines()[0])
        level = logging.DEBUG if self._warned else logging.WARNING
        logger.log(level, "MLflow at %s: %s; the run goes on without it", without_password(self.uri), first[:160])
        self._warned = True

    @property
    def uri(self) -> str:
        """The address of MLflow."""
        return tracking_uri(self.store)

    @property
    def parent_id(self) -> str:
        """The curriculum's run."""
        return self.opened("curriculum")

    def opened(self, name: str) -> str:
        """The run of a stage; raises NotOpenError before there is one."""
        if name not in self.run_ids:
            raise NotOpenError(name)
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
                self.experiment_id = self.client.create_experiment(name, place, {NOTE: ABOUT.format(name=name)})
        self._close_orphans()
        if (curriculum := self._curriculum_elsewhere()) is not None:
            self.run_ids["curriculum"], self._part_of_another = curriculum, True
            return
        whole = self.plans["export"].fingerprint
        tags = {**self.common, "stage": "curriculum", "fingerprint": whole, NOTE: BEGUN.format(store=self.store.uri)}
        key, title = f"{self._session}-curriculum", f"{self.experiment.name} {whole[:8]}"
        self.run_ids["curriculum"] = self._create(key, title, tags)
        self.log_params(self.parent_id, self.experiment.model_dump(mode="json"))

    def _curriculum_elsewhere(self) -> str | None:
        """The run of the curriculum that had this stage placed here; its own process ends it."""
        if self.root_flow_run_id in (None, self.common.get("prefect.flow_run_id")):
            return None
        query = f"tags.stage = 'curriculum' and tags.`prefect.flow_run_id` = '{self.root_flow_run_id}'"
        found = self.client.search_runs(
            [self.experiment_id], f"{query} and attributes.status = 'RUNNING'", max_results=1
        )
        return str(found[0].info.run_id) if found else None

    def run_of(self, name: str) -> str | None:
        """The run in which a stage was made, or was found made, here or on another machine."""
        if name not in self.run_ids:
            query = f"tags.stage = '{name}' and tags.fingerprint = '{self.plans[name].fingerprint}'"
            for run in self.client.search_runs([self.experiment_id], query, max_results=1):
                self.run_ids[name] = str(run.info.run_id)
        return self.run_ids.get(name)

    def _close(self, status: str) -> None:
        """End the curriculum's run, and remove what the server made twice as its answers came too late."""
        for run in self.client.search_runs([self.experiment_id], f"tags.key LIKE '{self._session}-%'"):
            if run.info.run_id not in self._created.values():
                self.client.delete_run(run.info.run_id)
        if not self._part_of_another:
            self.client.set_terminated(self.parent_id, status)
            if status == "FINISHED":
                self._end("curriculum", self.plans["export"].fingerprint, self.parent_id)

    def _close_orphans(self) -> None:
        """Runs left RUNNING by dead processes of this machine, and by earlier attempts of this flow run."""
        flow_run = self.common.get("prefect.flow_run_id", "none")
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            tags = run.data.tags
            process = json.loads(tags.get("process", "{}"))
            here = (tags.get("host"), process.get("pids")) == (self.common["host"], process_space())
            alive = here and marked(process) is not None
            if (here or tags.get("prefect.flow_run_id") == flow_run) and not alive:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def begins(self, name: str, run_id: str) -> bool:
        """Whether the stage `name` is being made on this machine; what was left RUNNING elsewhere is closed then."""
        holder = self.store.lease_holder(self.plans[name].lease)
        if holder is None or holder["host"] != self.common["host"]:
            return False
        self._end(name, self.plans[name].fingerprint, run_id, but=self.common["host"])
        return True

    def end_attempts(self, name: str, run_id: str) -> None:
        """Close what earlier attempts at a stage, on whichever machine, left RUNNING; this one has made it.

        One that only waits for this one's result ends itself, and says so then.
        """
        self._end(name, self.plans[name].fingerprint, run_id)

    def _end(self, stage: str, fingerprint: str, run_id: str, but: str = "") -> None:
        """Close the runs that are RUNNING at the same as `run_id`, save those of the host `but`."""
        query = f"tags.stage = '{stage}' and tags.fingerprint = '{fingerprint}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.experiment_id], query):
            if run.info.run_id != run_id and run.data.tags.get("host") != but:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def attempts(self, name: str) -> int:
        """How often MLflow saw the stage `name` tried by the same settings and inputs."""
        query = f"tags.stage = '{name}' and tags.fingerprint = '{self.plans[name].fingerprint}'"
        return len(self.client.search_runs([self.experiment_id], f"{query} and tags.state != 'reused'"))

    def new_key(self) -> str:
        """What finds a run again that the server made, but did not tell of."""
        return f"{self._session}-{secrets.token_hex(4)}"

    def create_run(self, key: str, name: str, tags: Mapping[str, str]) -> str:
        """A nested run of the stage `name`, or the one that was made by this key; its id."""
        plan = self.plans[name]
        own = {"mlflow.parentRunId": self.parent_id, "stage": name, "fingerprint": plan.fingerprint}
        self.run_ids[name] = self._create(key, name, {**self.common, **own, **tags})
        return self.run_ids[name]

    def _create(self, key: str, name: str, tags: Mapping[str, str]) -> str:
        if key not in self._created:
            query = f"tags.key = '{key}'"
            found = self.client.search_runs([self.experiment_id], query, max_results=1)
            run = (
                found[0]
                if found
                else self.client.create_run(self.experiment_id, tags={**tags, "key": key}, run_name=name)
            )
            self._created[key] = str(run.info.run_id)
        return self._created[key]

    def log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Settings as parameters, nested keys joined by dots."""
        params = [Param(key, value) for key, value in flatten(values).items()]
        for start in range(0, len(params), PARAM_BATCH):
            self.client.log_batch(run_id, params=params[start : start + PARAM_BATCH])
