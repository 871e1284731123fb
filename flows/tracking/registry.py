"""MLflow's model registry: find a model by its address, record evaluations and promotions, read earlier results."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow.entities import DatasetInput, InputTag, LoggedModelInput, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from flows.net import answers, without_password
from flows.paths import local_folder
from flows.tracking.client import ALIAS, CHAMPION, VALUE_LENGTH, page_url, run_page, tracking_uri
from flows.tracking.client import RegistryError as RegistryError
from flows.tracking.database import check_database, relocate, sqlite_path
from flows.tracking.datasets import dataset_of, measured_on, named
from flows.tracking.experiments import find_experiment, open_experiment
from flows.tracking.item_tables import log_item_tables
from flows.tracking.server_files import open_client
from vectorclm.errors import ConfigError
from vectorclm.evaluation.statistics import Figure, figures
from vectorclm.lineage.chain import Node
from vectorclm.settings import digest
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.model_ref import ADDRESS

EVALUATIONS = "evaluations"  # MLflow's experiment
STDERR = "stderr."  # prefix of a metric that is the standard error of another
SHOWN = 10  # number of results of a suite that are compared
REGISTERED_NAME = re.compile(r"[^/@:]+@[^/@]+")
REGISTERED_MODEL = re.compile(r"models:/(?P<name>[^/@:]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class Subject:
    """An evaluated model; results of equal names form one series, as of a registered model's alias."""

    name: str
    title: str
    address: str  # a folder, or <store>/<stage>/<fingerprint>
    model_id: str | None  # MLflow's logged model


@dataclass(frozen=True)
class Result:
    """The scores of one evaluation of a model."""

    title: str
    when: datetime
    fingerprint: str  # of the artifact with the scores
    figures: Mapping[str, Figure]


class Registry:
    """The part of MLflow that evaluations use. Each call raises RegistryError where MLflow does not answer."""

    def __init__(self, store: Store) -> None:
        self.store, self.uri = store, tracking_uri(store)
        folder = local_folder(store)
        with self.asked(), _migrating_alone(folder):
            check_database(self.uri)
            relocate(self.uri, folder)
            self.client = open_client(self.uri, store)

    def find(self, address: str) -> Subject:
        """The model that `address` names: `models:/name@alias`, `models:/name/version`, or any other place as it is.

        Raises ConfigError where the registry has no such model, or does not know where its files are.
        """
        if not address.startswith("models:/"):
            address = address.rstrip("/")
            match = _in_store(address)
            name = f"{match['stage']}/{match['fingerprint'][:12]}" if match is not None else address
            return Subject(name, name, address, None)
        version, match = self.version(address), REGISTERED_MODEL.fullmatch(address)
        alias = match["alias"] if match is not None else None  # each alias has a series of its own
        name = f"{version.name}@{alias}" if alias else version.name
        return Subject(name, f"{version.name} {version.version}", self.place(version), logged_model(version))

    def place(self, version: ModelVersion) -> str:
        """The address of a version's files: in the store at hand where it has the fingerprint, else where it was built.

        Raises ConfigError where neither has it, or another program registered the version.
        """
        tags, title = self.tags(version), f"{version.name} {version.version}"
        if not (recorded := tags.get("uri")):
            raise ConfigError(f"{title} was registered by another program: name the folder of its files instead")
        match, named = _in_store(recorded), tags.get("fingerprint")
        if match is not None and match["root"] == self.store.uri and named in (None, match["fingerprint"]):
            return recorded
        if match is None or match["fingerprint"] != named:
            raise ConfigError(f"{title}: its tags name no artifact of a store: name the folder of its files instead")
        here = self.store.look_up(match["stage"], match["fingerprint"])
        if here is not None:
            return here.uri
        if "://" not in recorded and not Path(recorded).exists():
            raise ConfigError(
                f"{self.store.uri} has no {match['stage']}/{match['fingerprint']}, and {match['root']}, where {title} "
                "was built, is gone: name its store with --store"
            )
        there = Store(match["root"]).look_up(match["stage"], match["fingerprint"])
        if there is None or there.manifest.get("fingerprint") != match["fingerprint"]:
            raise ConfigError(f"{recorded}, where {title} was built, is another artifact: name its store with --store")
        return recorded

    def tags(self, version: ModelVersion) -> dict[str, str]:
        """The tags of a version and, where MLflow itself registered it, those of its logged model."""
        if "uri" in version.tags or (model_id := logged_model(version)) is None:
            return dict(version.tags)
        try:
            return {**self.client.get_logged_model(model_id).tags, **version.tags}
        except MlflowException:  # deleted
            return dict(version.tags)

    def version(self, address: str) -> ModelVersion:
        """The version that `models:/name@alias` or `models:/name/version` names; raises ConfigError without one."""
        match = REGISTERED_MODEL.fullmatch(address)
        if match is None:
            raise ConfigError(f"{address}: write models:/NAME@ALIAS or models:/NAME/VERSION")
        with self.asked(address):
            if match["alias"] is None:
                return self.client.get_model_version(match["name"], match["version"])
            return self.client.get_model_version_by_alias(match["name"], match["alias"])

    def version_of(self, root: Node) -> ModelVersion:
        """The newest registered version of a trained model; raises ConfigError without one."""
        with self.asked():
            query = f"tags.fingerprint = '{root.fingerprint}'"
            found = self.client.search_model_versions(query, order_by=["last_updated_timestamp DESC"], max_results=1)
        if not found:
            raise ConfigError(
                f"{root.stage}/{root.fingerprint[:12]} is not registered: `vectorclm run` registers models"
            )
        return found[0]

    def page(self, experiment_id: str, run_id: str) -> str:
        """The URL of a run's page; without a server, the run's id."""
        if not self.uri.startswith("http"):
            return f"run {run_id}"
        return page_url(self.uri, run_page(experiment_id, run_id))

    def _model_id(self, subject: Subject) -> str | None:
        """The logged model of a subject, also if the subject is an artifact in the store that is registered."""
        match = _in_store(subject.address)
        if subject.model_id is not None or match is None:
            return subject.model_id
        found = self.client.search_model_versions(f"tags.fingerprint = '{match['fingerprint']}'", max_results=1)
        return logged_model(found[0]) if found else None

    def history(self, subject: Subject, settings: Mapping[str, Any], count: int = SHOWN) -> list[Result]:
        """The last results of a subject with these settings of a suite, newest first.

        Results that earlier versions recorded for all aliases together count for each of them.
        """
        found = self.results(f"tags.series = '{series(subject.name, settings)}'", count)
        if REGISTERED_NAME.fullmatch(subject.name):
            older = self.results(f"tags.series = '{series(subject.name.partition('@')[0], settings)}'", count)
            found += [(tags, result) for tags, result in older if "subject" not in tags]
        return sorted((result for _, result in found), key=lambda result: result.when, reverse=True)[:count]

    def results(self, query: str, count: int) -> list[tuple[dict[str, str], Result]]:
        """The last finished evaluations that a query finds, newest first, each with the tags of its run."""
        with self.asked():
            runs = self._search(
                f"{query} and attributes.status = 'FINISHED'",
                max_results=count,
                order_by=["attributes.start_time DESC"],
            )
        return [(dict(run.data.tags), _result(run)) for run in runs]

    def record(self, subject: Subject, artifact: Artifact, flow_run_id: str | None) -> str:
        """Record the scores in `artifact` as a run, linked to their model; returns the URL of the run's page.

        With the id of a flow run, the result becomes part of the `history` of the subject.
        """
        settings = artifact.manifest["config"]
        tags = {
            "title": subject.title,
            "model": subject.address,
            "suite": settings["suite"],
            "fingerprint": artifact.fingerprint,
            "uri": artifact.uri,
            **({"not_run": ", ".join(refused)} if (refused := artifact.summary.get("not_run")) else {}),
            **({"prefect.flow_run_id": flow_run_id, "subject": subject.name} if flow_run_id else {}),
            **({"series": series(subject.name, settings)} if flow_run_id else {}),
        }
        values: dict[str, float] = {}
        for name, figure in figures(artifact.summary).items():
            values |= {name: figure.value, STDERR + name: figure.stderr}
        with self.asked():
            experiment_id = self.experiment_id()
            name = f"{subject.title} on {settings['suite']}"
            run = self.client.create_run(
                experiment_id, tags={key: value[:VALUE_LENGTH] for key, value in tags.items()}, run_name=name
            )
            run_id, now = run.info.run_id, run.info.start_time
            if (model_id := self._model_id(subject)) is not None:
                self.client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
            data = measured_on(artifact, self.store, "")
            context = [InputTag("mlflow.data.context", f"suite {settings['suite']}")]
            sets = {(item.name, item.digest): DatasetInput(item, context) for item in data.values()}
            self.client.log_inputs(run_id, datasets=list(sets.values()))
            metrics = [
                Metric(key, value, now, 0, model_id, *named(dataset_of(key.removeprefix(STDERR), data)))
                for key, value in values.items()
            ]
            self.client.log_batch(run_id, metrics=metrics)
            log_item_tables(self.client, run_id, artifact)
            self.client.set_terminated(run_id)
        return self.page(experiment_id, run_id)

    def record_cli_evaluation(self, address: str, artifact: Artifact) -> str | None:
        """Record the scores of a registered model that a command evaluated, unless they are recorded already.

        Returns the URL of the run's page; None if the model at `address` is not registered, or has these scores. The
        run is not part of the `history`, so that the next scheduled evaluation still reports a fall.
        """
        if (match := _in_store(address)) is None:
            return None
        check_server(self.uri)
        with self.asked():
            query = f"tags.fingerprint = '{match['fingerprint']}'"
            found = self.client.search_model_versions(query, max_results=1)
            recorded = f"tags.fingerprint = '{artifact.fingerprint}' and attributes.status = 'FINISHED'"
            runs = self._search(recorded) if found else []
        if not found or any(run.data.tags.get("model") == address[:VALUE_LENGTH] for run in runs):
            return None
        subject = Subject(found[0].name, f"{found[0].name} {found[0].version}", address, logged_model(found[0]))
        return self.record(subject, artifact, None)

    def champion(self, name: str) -> ModelVersion | None:
        """The champion among the versions of a registered model; None without one."""
        with self.asked():
            model = self.client.get_registered_model(name)
            number = dict(model.aliases).get(CHAMPION)
            return None if number is None else self.client.get_model_version(name, str(number))

    def decide(
        self, version: ModelVersion, about: Mapping[str, str], rows: Sequence[Mapping[str, str]], good: bool
    ) -> str:
        """Record a comparison as a run with a table and as tags of the version; move the alias if `good`.

        Returns the URL of the run's page.
        """
        tags = {f"promotion.{key}": value[:VALUE_LENGTH] for key, value in about.items()}
        with self.asked():
            experiment_id = self.experiment_id()
            title = f"{version.name} {version.version} against {about['over']}"
            run = self.client.create_run(
                experiment_id, tags={**tags, "fingerprint": self.tags(version)["fingerprint"]}, run_name=title
            )
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            self.client.log_table(run.info.run_id, columns, "comparison.json")
            self.client.set_terminated(run.info.run_id)
            for key, value in tags.items():
                self.client.set_model_version_tag(version.name, version.version, key, value)
            if good:
                self.client.set_registered_model_alias(version.name, CHAMPION, version.version)
        return self.page(experiment_id, run.info.run_id)

    def experiment_id(self, name: str = EVALUATIONS) -> str:
        """The id of MLflow's experiment of this name, which is created if it is not there."""
        folder = local_folder(self.store) if sqlite_path(self.uri) is not None else None
        return open_experiment(self.client, name, folder).experiment_id

    def _search(self, query: str, **options: Any) -> list[Run]:
        """The runs of evaluations that a query finds; none where nothing was evaluated yet. Nothing is created."""
        found = find_experiment(self.client, EVALUATIONS)
        return [] if found is None else list(self.client.search_runs([found], query, **options))

    @contextmanager
    def asked(self, address: str = "") -> Iterator[None]:
        """Translate MLflow's errors: ConfigError for an unknown model, RegistryError where MLflow does not answer."""
        try:
            yield
        except MlflowException as error:
            first = without_password(str(error).strip().splitlines()[0])[:200]
            if address and error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise ConfigError(
                    f"MLflow at {without_password(self.uri)} has no {address}: {first}. A curriculum that completes "
                    f"registers vectorclm-base and vectorclm-chat, the newest as @{ALIAS}"
                ) from error
            raise RegistryError(f"MLflow at {without_password(self.uri)} does not answer: {first}") from error
        except (SQLAlchemyError, OSError) as error:
            first = without_password(str(error).strip().partition("\n")[0])[:200]
            raise RegistryError(f"MLflow at {without_password(self.uri)} cannot be used: {first}") from error


def check_server(uri: str) -> None:
    """Raise RegistryError where the MLflow server at `uri` does not answer, without the client's long retries."""
    place = without_password(uri).rstrip("/")
    if place.startswith("http") and not answers(f"{place}/health"):
        raise RegistryError(f"MLflow at {place} does not answer")


@contextmanager
def _migrating_alone(folder: Path) -> Iterator[None]:
    """Hold the lock of MLflow's database, because its first client migrates it; none on a read-only store."""
    if folder.is_dir() and not os.access(folder, os.W_OK):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "mlflow.lock"):
        yield


def _in_store(address: str) -> re.Match[str] | None:
    """The stage and fingerprint in an address; None unless it names a whole artifact of a store."""
    match = ADDRESS.fullmatch(address)
    return match if match is not None and match["inside"] is None else None


def logged_model(version: ModelVersion) -> str | None:
    """The logged model of a version; MLflow keeps its id only in the version's source."""
    match = re.fullmatch(r"models:/(m-[0-9a-f]+)", version.source or "")
    return match[1] if match is not None else None


def series(name: str, settings: Mapping[str, Any]) -> str:
    """The id of a series of comparable results: one name of a subject, equal settings."""
    return digest({"name": name, "settings": dict(settings)})


def _result(run: Run) -> Result:
    values, tags = run.data.metrics, run.data.tags
    found = {
        name: Figure(value, values.get(STDERR + name, 0.0))
        for name, value in values.items()
        if not name.startswith(STDERR)
    }
    when = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
    return Result(tags["title"], when, tags["fingerprint"], found)
