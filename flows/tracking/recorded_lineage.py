"""The lineage of a model as MLflow recorded it: versions, runs, their data sets and models."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from flows.tracking.registry import Registry
from vectorclm.lineage.chain import Lineage
from vectorclm.store.model_ref import ADDRESS


@dataclass(frozen=True)
class Record:
    """MLflow's record of a lineage."""

    runs: Mapping[str, str]  # fingerprint -> the page of the run that built it; without a server, the run's id
    versions: Mapping[str, list[str]]  # fingerprint -> `vectorclm-chat 3 @champion`
    names: Any  # the lineage in MLflow (see Node.names); None without a run of its root


def record_of(registry: Registry, found: Lineage) -> Record:
    """Read MLflow's record of a lineage. Raises RegistryError where MLflow does not answer."""
    with registry.asked():
        walker = _Walker(registry)
        names = walker.names(found.root.stage, found.root.fingerprint)
        runs = {}
        for node in found.nodes.values():
            if (run := walker.run(node.stage, node.fingerprint)) is not None:
                runs[node.fingerprint] = registry.page(run.info.experiment_id, run.info.run_id)
    return Record(runs, registered_versions(registry, found.nodes), names)


def registered_versions(registry: Registry, fingerprints: Iterable[str]) -> dict[str, list[str]]:
    """The registered versions of artifacts by fingerprint, as `vectorclm-chat 3 @champion`."""
    versions = {}
    with registry.asked():
        for fingerprint in fingerprints:
            query = f"tags.fingerprint = '{fingerprint}'"
            if known := [version_title(registry, version) for version in registry.client.search_model_versions(query)]:
                versions[fingerprint] = sorted(known)
    return versions


def registered_names(registry: Registry, address: str) -> Any:
    """The lineage of a registered model from MLflow alone, without a store: nested names (see `Node.names`)."""
    version = registry.version(address)
    with registry.asked(address):
        tags = registry.tags(version)
        return _Walker(registry).names(tags.get("stage", ""), tags["fingerprint"])


def version_title(registry: Registry, version: ModelVersion) -> str:
    """A registered version with its aliases, as `vectorclm-chat 3 @champion`."""
    aliases = registry.client.get_model_version(version.name, version.version).aliases
    return " ".join([f"{version.name} {version.version}", *(f"@{alias}" for alias in aliases)])


class _Walker:
    """Find MLflow's runs by the artifacts that they built."""

    def __init__(self, registry: Registry) -> None:
        self.client = registry.client
        self.experiments = [found.experiment_id for found in self.client.search_experiments()]
        self._runs: dict[str, Run | None] = {}

    def run(self, stage: str, fingerprint: str) -> Run | None:
        """The run that built an artifact, else one that reused it; None without either."""
        if fingerprint not in self._runs:
            query = f"tags.stage = '{stage}' and tags.fingerprint = '{fingerprint}' and attributes.status = 'FINISHED'"
            found = self._newest(f"{query} and tags.state = 'built'") or self._newest(query)
            self._runs[fingerprint] = self.client.get_run(found[0].info.run_id) if found else None
        return self._runs[fingerprint]

    def _newest(self, query: str) -> list[Run]:
        """The newest run that a query finds, if any: thousands may have reused an artifact."""
        newest_first = ["attributes.start_time DESC"]
        return list(self.client.search_runs(self.experiments, query, max_results=1, order_by=newest_first))

    def names(self, stage: str, fingerprint: str) -> Any:
        """The lineage of an artifact as nested names; None if no run built it."""
        if (run := self.run(stage, fingerprint)) is None or run.inputs is None:
            return None
        inputs, sources = [], []
        for item in run.inputs.dataset_inputs:
            place = json.loads(item.dataset.source)
            if "uri" in place:
                match = ADDRESS.fullmatch(place["uri"])
                inputs += [(match["stage"], match["fingerprint"])] if match is not None else []
            else:
                sources.append([item.dataset.name, place["revision"]])
        for model in run.inputs.model_inputs:
            try:
                tags = self.client.get_logged_model(model.model_id).tags
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None  # a person deleted the record of an input
            inputs.append((tags["stage"], tags["fingerprint"]))
        return {
            "stage": stage,
            "fingerprint": fingerprint,
            "inputs": [self.names(*item) for item in sorted(set(inputs))],
            "sources": sorted(sources),
        }
