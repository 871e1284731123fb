"""Remove MLflow's records of artifacts that are removed from a store: versions, logged models, runs."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run, RunStatus, ViewType
from mlflow.entities.model_registry import ModelVersion

from flows.tracking.client import STORE
from flows.tracking.database import sqlite_path
from flows.tracking.recorded_lineage import version_title
from flows.tracking.registry import Registry
from vectorclm.store.model_ref import ADDRESS

PARENT, FINGERPRINT, URI = "mlflow.parentRunId", "fingerprint", "uri"  # tags of runs


@dataclass(frozen=True)
class Records:
    """What MLflow has recorded of some artifacts of a store."""

    versions: list[ModelVersion]
    titles: list[str]  # of the versions, with their aliases
    models: list[str]  # ids of logged models
    runs: list[str]  # ids, of parents last
    unfinished: list[str]  # ids of runs that stay because they have not ended

    def as_json(self) -> dict[str, Any]:
        """The numbers of records, and the versions by name."""
        return {"versions": self.titles, "models": len(self.models), "runs": len(self.runs)}


def find_records(registry: Registry, fingerprints: Collection[str], experiment: str | None = None) -> Records:
    """Find MLflow's records of artifacts and, with the name of an experiment, those of its curricula.

    Left out are records of artifacts in another store, unfinished runs, and runs of which a part stays. Raises
    RegistryError where MLflow does not answer.
    """
    client = registry.client
    with registry.asked():
        experiments = {found.experiment_id: found.name for found in client.search_experiments()}
        queries = [f"tags.fingerprint = '{fingerprint}'" for fingerprint in fingerprints]
        versions = [version for query in queries for version in client.search_model_versions(query)]
        models = [model for query in queries for model in client.search_logged_models([*experiments], query)]
        places = {run.info.experiment_id for query in queries for run in client.search_runs([*experiments], query)}
        own = re.compile(rf"{re.escape(experiment or '')}( \d+)?")  # the second one was opened after a deletion
        named = {place for place, name in experiments.items() if experiment and own.fullmatch(name)}
        found = _Runs(registry, _all_runs(client, places | named), fingerprints, named)
        known = [(version, registry.tags(version)) for version in versions]
        found.note_elsewhere([*(tags for _, tags in known), *(model.tags for model in models)])
        ours = [version for version, tags in known if not is_elsewhere(registry, tags)]
        titles = [version_title(registry, version) for version in ours]
    going, unfinished = found.chosen()
    ids = [model.model_id for model in models if not is_elsewhere(registry, model.tags)]
    return Records(ours, titles, ids, going, unfinished)


def is_elsewhere(registry: Registry, tags: Mapping[str, str]) -> bool:
    """Whether the tags of a record name another store than that of `registry`."""
    if (root := _root(tags)) is None or root == registry.store.uri:
        return False
    if "://" in root or not registry.store.is_local:
        return True
    if not Path(root).exists():  # in its own database: this store, before it was moved
        return sqlite_path(registry.uri) is None
    return Path(root).resolve() != Path(registry.store.uri).resolve()


def _root(tags: Mapping[str, str]) -> str | None:
    """The address of the store that the tags of a record name; None where they name none."""
    match = ADDRESS.fullmatch(tags.get(URI, ""))
    return match["root"] if match is not None else tags.get(STORE)


def _all_runs(client: MlflowClient, experiments: Collection[str]) -> list[Run]:
    """All runs of experiments, the deleted ones as well."""
    found, token = list[Run](), None
    while experiments:
        page = client.search_runs([*experiments], run_view_type=ViewType.ALL, max_results=1000, page_token=token)
        found, token = [*found, *page], page.token
        if not token:
            break
    return found


class _Runs:
    """The runs of some experiments, of which those go that belong to artifacts of one store.

    A run that names no store belongs to that of its parent and the parent's other children. Where these name none
    either, it stays if another store has a record of the same artifact.
    """

    def __init__(
        self, registry: Registry, runs: Iterable[Run], fingerprints: Collection[str], named: Collection[str]
    ) -> None:
        self._registry, self._fingerprints, self._named = registry, fingerprints, named
        self._runs = {run.info.run_id: run for run in runs}
        self._children = defaultdict[str, list[Run]](list)
        for run in self._runs.values():
            if parent := run.data.tags.get(PARENT):
                self._children[parent].append(run)
        self._elsewhere = set[str]()  # fingerprints
        self.note_elsewhere([run.data.tags for run in self._runs.values()])

    def note_elsewhere(self, records: Iterable[Mapping[str, str]]) -> None:
        """Note the fingerprints of which these tags name another store."""
        self._elsewhere |= {tags.get(FINGERPRINT, "") for tags in records if is_elsewhere(self._registry, tags)}

    def chosen(self) -> tuple[list[str], list[str]]:
        """The ids of the runs that go, parents last, and of those that would, if they had ended."""
        wanted = {run_id for run_id, run in self._runs.items() if self._is_wanted(run) and self._is_ours(run)}
        unfinished = {each for each in wanted if not RunStatus.is_terminated(self._status(each))}
        going = wanted - unfinished
        while parents := {each for each in going if any(not self._is_gone(run, going) for run in self._children[each])}:
            going -= parents  # a part of each stays
        return sorted(going, key=lambda each: each in self._children and bool(self._children[each])), sorted(unfinished)

    def _status(self, run_id: str) -> int:
        return int(RunStatus.from_string(self._runs[run_id].info.status))

    def _is_gone(self, run: Run, going: Collection[str]) -> bool:
        return run.info.run_id in going or run.info.lifecycle_stage == LifecycleStage.DELETED

    def _is_wanted(self, run: Run) -> bool:
        """Whether a run is of one of the artifacts, or of a curriculum of the experiment that used one."""
        if run.info.lifecycle_stage == LifecycleStage.DELETED:
            return False
        if (fingerprint := run.data.tags.get(FINGERPRINT)) is not None:
            return fingerprint in self._fingerprints
        parts = [part.data.tags.get(FINGERPRINT) for part in self._children[run.info.run_id]]
        return run.info.experiment_id in self._named and any(part in self._fingerprints for part in parts)

    def _is_ours(self, run: Run) -> bool:
        if _root(run.data.tags) is not None:
            return not is_elsewhere(self._registry, run.data.tags)
        parent = run.data.tags.get(PARENT, run.info.run_id)
        family = [self._runs[each] for each in (parent,) if each in self._runs] + self._children[parent]
        known = [is_elsewhere(self._registry, each.data.tags) for each in family if _root(each.data.tags) is not None]
        return not any(known) if known else run.data.tags.get(FINGERPRINT) not in self._elsewhere


def remove_records(registry: Registry, records: Records) -> None:
    """Delete the records; `mlflow gc` frees their room. Raises RegistryError where MLflow does not answer."""
    with registry.asked():
        for version in records.versions:
            registry.client.delete_model_version(version.name, version.version)
        for model_id in records.models:
            registry.client.delete_logged_model(model_id)
        for run_id in records.runs:
            registry.client.delete_run(run_id)
