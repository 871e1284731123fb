"""Remove MLflow's records of artifacts that were removed from the store: versions, logged models, runs."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from flows.tracking.recorded_lineage import registered_versions
from flows.tracking.registry import Registry

PARENT, FINGERPRINT = "mlflow.parentRunId", "fingerprint"  # tags of runs


@dataclass(frozen=True)
class Records:
    """What MLflow has recorded of some artifacts."""

    versions: list[ModelVersion]
    titles: list[str]  # of the versions, with their aliases
    models: list[str]  # ids of logged models
    runs: list[str]  # ids

    def as_json(self) -> dict[str, Any]:
        """The numbers of records, and the versions by name."""
        return {"versions": self.titles, "models": len(self.models), "runs": len(self.runs)}


def find_records(registry: Registry, fingerprints: Collection[str], experiment: str | None = None) -> Records:
    """Find MLflow's records of artifacts and, with the name of an experiment, those of its curricula.

    Runs that built an artifact which stays are left out, and so are the runs that they are part of. Raises
    RegistryError where MLflow does not answer.
    """
    client = registry.client
    with registry.asked():
        titles = [title for names in registered_versions(registry, fingerprints).values() for title in names]
        experiments = {found.experiment_id: found.name for found in client.search_experiments()}
        queries = [f"tags.fingerprint = '{fingerprint}'" for fingerprint in fingerprints]
        versions = [version for query in queries for version in client.search_model_versions(query)]
        models = [model.model_id for query in queries for model in client.search_logged_models([*experiments], query)]
        runs = {run.info.run_id: run for query in queries for run in client.search_runs([*experiments], query)}
        if experiment is not None:
            own = re.compile(rf"{re.escape(experiment)}( \d+)?")  # the second one was opened after a deletion
            for place in (place for place, name in experiments.items() if own.fullmatch(name)):
                for run in _without(client.search_runs([place], max_results=50_000), fingerprints):
                    runs[run.info.run_id] = run
    return Records(versions, titles, models, list(runs))


def _without(runs: Iterable[Run], fingerprints: Collection[str]) -> list[Run]:
    """The runs but for those of artifacts that are not in `fingerprints`, and for the runs that these are part of."""
    found = list(runs)
    staying = [run for run in found if run.data.tags.get(FINGERPRINT) not in (None, *fingerprints)]
    kept = {run.info.run_id for run in staying} | {run.data.tags.get(PARENT) for run in staying}
    return [run for run in found if run.info.run_id not in kept]


def remove_records(registry: Registry, records: Records) -> None:
    """Delete the records; `mlflow gc` frees their room. Raises RegistryError where MLflow does not answer."""
    with registry.asked():
        for version in records.versions:
            registry.client.delete_model_version(version.name, version.version)
        for model_id in records.models:
            registry.client.delete_logged_model(model_id)
        for run_id in records.runs:
            registry.client.delete_run(run_id)
