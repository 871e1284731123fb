"""Track a curriculum in MLflow: a run for the curriculum, one for each stage, data sets, models, lineage.

One thread sends requests to MLflow, in order; stages only queue jobs, which are kept while MLflow is away. An error of
MLflow causes one warning and never stops or slows a run: live metrics are sent later from their file, and records that
are missing at the end are sent by the next run of the curriculum, from the artifacts.
"""

import json
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException

from flows.handle import StageCancelledError
from flows.net import answers, without_password
from flows.paths import local_folder
from flows.tracking.catalog import Catalog
from flows.tracking.client import CHAMPION, NOTE, REGISTERED, NotOpenError, RegistryError, page_url, run_page
from flows.tracking.database import check_database, relocate, sqlite_path
from flows.tracking.experiments import open_experiment
from flows.tracking.outbox import Outbox
from flows.tracking.registry import Registry
from flows.tracking.server_files import open_client
from flows.tracking.session import Session
from flows.tracking.stage_run import StageRun
from flows.tracking.versions import Versions
from vectorclm.errors import VectorCLMError
from vectorclm.runtime.processes import find_process, process_space
from vectorclm.stages import EVALUATED, EXPORTED
from vectorclm.store.artifact import Artifact
from vectorclm.store.layout import EXPORT

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60  # that the end of a curriculum waits for each record in MLflow
NEWEST = 50  # runs of the same curriculum, among which one of the same name is looked for
PROBE = "vectorclm.written"  # a tag of the experiment: the time of the last check that MLflow accepts writes

ABOUT = """Curricula of the experiment `{name}`: text in, an evaluated chat model out.

Each is a run with the fingerprint of all its settings and sources. The plus sign before it shows its stages: a run for
each attempt, with its curves. *Columns* adds scores to the table (`chat/acc…`); the chart view overlays curves of
several runs (`train/loss`). A run's page begins with its lineage."""
BEGUN = "An unfinished curriculum. Its stages are its child runs; their artifacts are in `{store}`."


@dataclass(eq=False)
class Tracker(Session):
    """The MLflow run of one curriculum; a context manager that opens it and closes it with the right status."""

    active: list[StageRun] = field(init=False, default_factory=list)
    _part_of_another: bool = field(init=False, default=False)
    _warned: bool = field(init=False, default=False)
    _tried: threading.Event = field(init=False, default_factory=threading.Event)  # the first attempt to open the run

    def __post_init__(self) -> None:
        super().__post_init__()
        self.catalog = Catalog(self)
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
            logger.warning("MLflow at %s is too slow: the last metrics are missing there", where)
        elif self._outbox.left:
            logger.info("MLflow at %s stayed away: the next run of this curriculum sends the missing records", where)

    def page(self, seconds: float) -> str | None:
        """The URL of the curriculum's run in MLflow's UI; None without a server, or if it is not open in time."""
        if not self.uri.startswith("http") or not self._tried.wait(seconds) or "curriculum" not in self.run_ids:
            return None
        return page_url(self.uri, run_page(self.experiment_id, self.run_ids["curriculum"]))

    def champion(self, seconds: float) -> str | None:
        """The address of the champion's files; None without a champion, or if MLflow does not answer in time."""
        found: queue.Queue[str] = queue.Queue()

        def ask() -> None:
            try:
                version = self.client.get_model_version_by_alias(REGISTERED[EXPORTED["chat"]], CHAMPION)
                found.put(Registry(self.store).place(version))
            except (MlflowException, VectorCLMError):
                found.put("")  # no champion yet, or its files are gone

        if not self._tried.wait(seconds) or "curriculum" not in self.run_ids:
            return None
        self.do(ask)
        with suppress(queue.Empty):
            return found.get(timeout=seconds) or None
        return None

    def report(self, page: str) -> str | None:
        """Log the curriculum's report on its run; returns the URL of the report, None without a server."""
        self.do(lambda: self.client.log_text(self.parent_id, page, "report.html"))
        place = self.page(0)
        return None if place is None else place.replace("?workflowType", "/artifacts/report.html?workflowType")

    def do(self, job: Callable[[], None]) -> None:
        """Queue a job for the tracker's thread."""
        self._outbox.put(job)

    @contextmanager
    def stage(self, name: str, attempt: int, folder: Path) -> Iterator["StageRun"]:
        """Track the building of a stage as a nested run; its metrics appear in `folder`."""
        run = StageRun(self, self.catalog, name, folder)
        self.do(lambda: self._begin(run, attempt))
        try:
            yield run
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            cancelled = isinstance(error, StageCancelledError) or not isinstance(error, Exception)
            status = "KILLED" if cancelled else "FAILED"
            self.do(lambda: self._finish(run, status, {"error": message}))
            raise
        self.do(lambda: self._finish(run, "FINISHED", {}))

    def _begin(self, run: StageRun, attempt: int) -> None:
        run.open(attempt)
        self.active.append(run)

    def _finish(self, run: StageRun, status: str, tags: Mapping[str, str]) -> None:
        if run in self.active:
            self.active.remove(run)
        run.close(status, tags)

    def reused(self, name: str, artifact: Artifact) -> None:
        """Track a reused stage as a nested run."""
        late = StageRun(self, self.catalog, name, None)
        late.finished(artifact)
        key = self.new_key()

        def job() -> None:
            if key not in self._created and not self._recorded(name):  # MLflow was away when it was built
                late.open(0)
                late.close("FINISHED", {"recorded": "later, from the artifact"})
                return
            run_id = self.create_run(key, name, {"state": "reused", "uri": artifact.uri})
            self.catalog.log_inputs(name)
            versions = Versions(self.catalog)
            versions.describe(run_id, name)
            self.catalog.show(name, artifact)
            if name in EVALUATED:
                self.log_headline_metrics(name, artifact)
            self.client.set_terminated(run_id)
            versions.register_models(name)

        self.do(job)

    def _recorded(self, name: str) -> bool:
        """Whether MLflow has the complete record of a stage's artifact."""
        query = f"tags.stage = '{name}' and tags.fingerprint = '{self.plans[name].fingerprint}'"
        query += " and tags.state = 'built' and attributes.status = 'FINISHED'"
        return bool(self.client.search_runs([self.experiment_id], query, max_results=1))

    def _relay(self) -> None:
        for run in self.active:
            run.relay()

    def _answers(self) -> bool:
        """Whether MLflow answers and accepts writes: a server whose disk is full answers, too."""
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
            return  # its run could not be opened, which has been reported
        first = without_password((str(error).strip() or type(error).__name__).splitlines()[0])
        level = logging.DEBUG if self._warned else logging.WARNING
        where = "" if isinstance(error, RegistryError) else f"MLflow at {without_password(self.uri)}: "
        logger.log(level, "%s%s; the run goes on without it", where, first[:300])
        self._warned = True

    def _open(self) -> None:
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        named = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)  # which MLflow's registry asks for, beside the client
        if named is None:  # MLflow has set it: another store of this process has another database
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        folder = local_folder(self.store)
        folder.mkdir(parents=True, exist_ok=True)
        own = sqlite_path(self.uri) is not None
        with FileLock(folder / "mlflow.lock"):  # if three processes migrate a new database at once, two die
            check_database(self.uri)
            relocate(self.uri, folder)
            self.client = open_client(self.uri, self.store)
            name = self.experiment.name
            found = open_experiment(self.client, name, folder if own else None, ABOUT.format(name=name))
            self.experiment_id = found.experiment_id
        if found.deleted is not None:
            logger.warning(
                "MLflow's experiment %s was deleted, so this run is recorded in %s; `mlflow experiments restore "
                "--experiment-id %s` restores the old one, and `mlflow gc` removes it",
                name,
                found.name,
                found.deleted,
            )
        self._close_orphans()
        if (curriculum := self._curriculum_elsewhere()) is not None:
            self.run_ids["curriculum"], self._part_of_another = curriculum, True
            return
        whole = self.plans[EXPORT].fingerprint
        tags = {**self.common, "stage": "curriculum", "fingerprint": whole, NOTE: BEGUN.format(store=self.store.uri)}
        key = f"{self._session}-curriculum"
        title = self._numbered(self.title or f"{self.experiment.name} {whole[:8]}", whole, key)
        self.run_ids["curriculum"] = self._create(key, title, tags)
        self.log_params(self.parent_id, self.experiment.model_dump(mode="json"))

    def _numbered(self, title: str, whole: str, key: str) -> str:
        """The title, with a number where an earlier run of the same curriculum bears it.

        Only the newest runs are read, as there may be thousands.
        """
        query = f"tags.stage = 'curriculum' and tags.fingerprint = '{whole}' and tags.key != '{key}'"
        newest_first = ["attributes.start_time DESC"]
        for run in self.client.search_runs([self.experiment_id], query, max_results=NEWEST, order_by=newest_first):
            if number := re.fullmatch(rf"{re.escape(title)}(?: run (\d+))?", run.info.run_name or ""):
                return f"{title} run {int(number[1] or 1) + 1}"
        return title

    def _curriculum_elsewhere(self) -> str | None:
        """The run of the curriculum on another machine that placed this stage here; that machine ends it."""
        if self.root_flow_run_id in (None, self.common.get("prefect.flow_run_id")):
            return None
        query = f"tags.stage = 'curriculum' and tags.`prefect.flow_run_id` = '{self.root_flow_run_id}'"
        found = self.client.search_runs(
            [self.experiment_id], f"{query} and attributes.status = 'RUNNING'", max_results=1
        )
        return str(found[0].info.run_id) if found else None

    def _close(self, status: str) -> None:
        """End the curriculum's run, and delete runs that were created twice because an answer was lost."""
        for run in self.client.search_runs([self.experiment_id], f"tags.key LIKE '{self._session}-%'"):
            if run.info.run_id not in self._created.values():
                self.client.delete_run(run.info.run_id)
        if not self._part_of_another:
            self.client.set_terminated(self.parent_id, status)
            if status == "FINISHED":
                self._end("curriculum", self.plans[EXPORT].fingerprint, self.parent_id)

    def _close_orphans(self) -> None:
        """Close runs left RUNNING by dead processes of this machine and by earlier attempts of this flow run."""
        flow_run = self.common.get("prefect.flow_run_id", "none")
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            tags = run.data.tags
            process = json.loads(tags.get("process", "{}"))
            here = (tags.get("host"), process.get("pids")) == (self.common["host"], process_space())
            alive = here and find_process(process) is not None
            if (here or tags.get("prefect.flow_run_id") == flow_run) and not alive:
                self.client.set_terminated(run.info.run_id, "KILLED")
