"""A client of MLflow with the runs of one curriculum: create runs, find them again, close abandoned ones."""

import json
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from flows.tracking.client import BATCH, STORE, NotOpenError, flatten, tracking_uri
from vectorclm.config import ExperimentConfig
from vectorclm.lineage.chain import score_facts
from vectorclm.runtime.devices import git_revision
from vectorclm.runtime.processes import process_identity
from vectorclm.stages import EVALUATED, MODELS
from vectorclm.store.artifact import Artifact, StageSpec, Store

PARAM_BATCH = 90  # parameters in one request; MLflow takes 100


@dataclass(eq=False)
class Session:
    """A client of MLflow and the ids of the curriculum's runs."""

    store: Store
    experiment: ExperimentConfig
    plans: Mapping[str, StageSpec]
    flow_run_id: str | None = None
    root_flow_run_id: str | None = None  # of the curriculum on another machine that this stage is part of
    title: str | None = None  # the name of the curriculum's run; else its experiment and fingerprint
    common: dict[str, str] = field(init=False)  # the tags of every run
    client: MlflowClient = field(init=False)  # set when the session opens, as is the next
    experiment_id: str = field(init=False, default="")
    run_ids: dict[str, str] = field(init=False, default_factory=dict)
    _session: str = field(init=False)
    _created: dict[str, str] = field(init=False, default_factory=dict)  # key of a run -> its id

    def __post_init__(self) -> None:
        self._session = secrets.token_hex(8)
        git = git_revision() or "none"
        self.common = {
            "experiment": self.experiment.name,
            STORE: self.store.uri,
            "git": git,
            **({"mlflow.source.git.commit": git.removesuffix("-dirty")} if git != "none" else {}),
            "mlflow.source.name": "vectorclm",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": psutil.Process().username(),
            "dirty": str(git.endswith("-dirty")).lower(),
            "host": socket.gethostname(),
            "process": json.dumps(process_identity(psutil.Process())),
            **({"prefect.flow_run_id": self.flow_run_id} if self.flow_run_id else {}),
        }

    @property
    def uri(self) -> str:
        """The address of MLflow."""
        return tracking_uri(self.store)

    @property
    def parent_id(self) -> str:
        """The id of the curriculum's run. Raises NotOpenError before there is one."""
        return self.opened("curriculum")

    def opened(self, name: str) -> str:
        """The id of a stage's run. Raises NotOpenError before there is one."""
        if name not in self.run_ids:
            raise NotOpenError(name)
        return self.run_ids[name]

    def run_of(self, name: str) -> str | None:
        """The id of a run that built or reused a stage's artifact, here or on another machine; None without one."""
        if name not in self.run_ids:
            query = f"tags.stage = '{name}' and tags.fingerprint = '{self.plans[name].fingerprint}'"
            for run in self.client.search_runs([self.experiment_id], query, max_results=1):
                self.run_ids[name] = str(run.info.run_id)
        return self.run_ids.get(name)

    def attempts(self, name: str) -> int:
        """The number of recorded attempts at a stage with the same settings and inputs."""
        query = f"tags.stage = '{name}' and tags.fingerprint = '{self.plans[name].fingerprint}'"
        return len(self.client.search_runs([self.experiment_id], f"{query} and tags.state != 'reused'"))

    def new_key(self) -> str:
        """A key that finds a run again if the server created it but its answer was lost."""
        return f"{self._session}-{secrets.token_hex(4)}"

    def create_run(self, key: str, name: str, tags: Mapping[str, str]) -> str:
        """Create a nested run of a stage, or find the one with this key; returns its id.

        Its name tells runs apart in the legend of a chart: the stage, its fingerprint, and the attempt or `reused`.
        """
        plan, attempt = self.plans[name], tags.get("attempt", "1")
        own = {"mlflow.parentRunId": self.parent_id, "stage": name, "fingerprint": plan.fingerprint}
        title = f"{name} {plan.fingerprint[:8]}"
        if tags["state"] == "reused":
            title += " reused"
        elif attempt != "1":
            title += f" attempt {attempt}"
        self.run_ids[name] = self._create(key, title, {**self.common, **own, **tags})
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
        """Log nested settings as parameters, their keys joined by dots."""
        params = [Param(key, value) for key, value in flatten(values).items()]
        for start in range(0, len(params), PARAM_BATCH):
            self.client.log_batch(run_id, params=params[start : start + PARAM_BATCH])

    def _end(self, stage: str, fingerprint: str, run_id: str, but: str = "") -> None:
        """Close the other RUNNING runs of the same artifact as `run_id`, except those of the host `but`."""
        query = f"tags.stage = '{stage}' and tags.fingerprint = '{fingerprint}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.experiment_id], query):
            if run.info.run_id != run_id and run.data.tags.get("host") != but:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def begins(self, name: str, run_id: str) -> bool:
        """Whether this machine builds the stage now; if so, close the runs left RUNNING on other machines."""
        holder = self.store.lease_holder(self.plans[name].lease)
        if holder is None or holder["host"] != self.common["host"]:
            return False
        self._end(name, self.plans[name].fingerprint, run_id, but=self.common["host"])
        return True

    def end_attempts(self, name: str, run_id: str) -> None:
        """Close the runs of earlier attempts at a stage, on any machine, once `run_id` has built its artifact.

        A run that only waits for this result ends itself.
        """
        self._end(name, self.plans[name].fingerprint, run_id)

    def log_headline_metrics(self, name: str, scores: Artifact) -> None:
        """Log the most important scores of an evaluation on the curriculum's run."""
        now, model = int(time.time() * 1000), MODELS[EVALUATED[name]]
        metrics = [Metric(f"{model}/{key}", value, now, 0) for key, value in score_facts(scores).items()]
        self.client.log_batch(self.parent_id, metrics=metrics[:BATCH])
