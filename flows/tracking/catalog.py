"""Data sets, logged models and registered model versions in MLflow, with their lineage."""

import json
from collections.abc import Mapping

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, LoggedModelOutput

from flows.tracking.client import ALIAS, NOTE, REGISTERED, flatten, run_page
from flows.tracking.session import Session
from vectorclm.lineage.chain import SHORT, describe_node, lineage, score_facts
from vectorclm.stage_builders import ancestors
from vectorclm.stages import BY_NAME, MODELS, TABLE
from vectorclm.store.artifact import Artifact
from vectorclm.store.layout import EXPORT

DIGEST_LENGTH = 36  # of a data set
PROFILE_LENGTH = 16_000  # of a data set
REVISION = 23  # characters of a source's revision that are shown

COLUMNS: dict[str, Mapping[str, str]] = {
    stage.name: stage.columns for stage in TABLE if stage.columns is not None
}  # of data sets


class Catalog:
    """The data sets and models of one curriculum in MLflow. All methods run in the tracker's thread."""

    def __init__(self, session: Session) -> None:
        self.session, self.store, self.plans = session, session.store, session.plans
        self.model_ids: dict[str, str] = {}  # fingerprint -> id

    def model_id(self, name: str, artifact: Artifact | None = None) -> str | None:
        """The id of the logged model of a stage's artifact, created if missing; None without the artifact."""
        spec = self.plans[name]
        if spec.fingerprint not in self.model_ids:
            known = self.session.client.search_logged_models(
                [self.session.experiment_id], f"tags.fingerprint = '{spec.fingerprint}'", max_results=1
            )
            if known:
                self.model_ids[spec.fingerprint] = known[0].model_id
            elif (built := artifact or self.store.look_up(spec.stage, spec.fingerprint)) is not None:
                model = mlflow.create_external_model(
                    MODELS[name],
                    source_run_id=self.session.run_of(name),
                    tags={"fingerprint": spec.fingerprint, "uri": built.uri, "stage": name},
                    params=flatten({"config": spec.config, "summary": built.summary}),
                    model_type="llama" if BY_NAME[name].language_model else MODELS[name],
                    experiment_id=self.session.experiment_id,
                )
                self.model_ids[spec.fingerprint] = model.model_id
        return self.model_ids.get(spec.fingerprint)

    def dataset(self, name: str) -> Dataset | None:
        """The artifact of a data stage as an MLflow data set, with its columns and summary; None if it is missing."""
        spec = self.plans[name]
        built = self.store.look_up(spec.stage, spec.fingerprint)
        if built is None:
            return None
        return Dataset(
            f"{self.session.experiment.name} {name}",
            spec.fingerprint[:DIGEST_LENGTH],
            "local" if self.store.is_local else self.store.uri.partition(":")[0],
            json.dumps({"uri": built.uri, "sha256": built.identity}),
            schema=json.dumps({"mlflow_colspec": [{"name": key, "type": kind} for key, kind in COLUMNS[name].items()]}),
            profile=json.dumps(built.summary)[:PROFILE_LENGTH],
        )

    def log_inputs(self, name: str) -> None:
        """Log the inputs of a stage on its run: data sets, models, and sources at their revisions."""
        context, inputs = [InputTag("mlflow.data.context", name)], self.plans[name].inputs
        data = [self.dataset(part) for part in inputs if part in COLUMNS]
        sets = [DatasetInput(entity, context) for entity in [*data, *self.sources(name)] if entity is not None]
        models = [self.model_id(part) for part in inputs if part in MODELS]
        self.session.client.log_inputs(
            self.session.opened(name), sets, [LoggedModelInput(model) for model in models if model]
        )

    def sources(self, name: str) -> list[Dataset]:
        """The sources that a stage reads, at their revisions: documents, conversations or questions."""
        experiment = self.session.experiment
        found = []
        for source in BY_NAME[name].sources(experiment):
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

    def show(self, name: str, artifact: Artifact) -> None:
        """Log the output of a stage on the curriculum's run, so that the table of runs shows its data and models."""
        parent = self.session.parent_id
        if name in COLUMNS and (data := self.dataset(name)) is not None:
            self.session.client.log_inputs(parent, [DatasetInput(data, [InputTag("mlflow.data.context", name)])])
        elif name in MODELS and (model_id := self.model_id(name, artifact)) is not None:
            self.session.client.log_outputs(parent, [LoggedModelOutput(model_id, step=0)])

    def register_models(self, completed: str) -> None:
        """Register a new version of each model that the stage `completed` completes and whose fingerprint is new.

        The export completes all models behind it, and describes the curriculum by its lineage; any other model is
        complete with its own stage.
        """
        behind = ancestors(EXPORT, self.plans)
        if completed == EXPORT:
            self.describe(self.session.parent_id, EXPORT)
        for stage, name in REGISTERED.items():
            if stage not in self.plans or completed != (EXPORT if stage in behind else stage):
                continue
            spec = self.plans[stage]
            query = f"name = '{name}' and tags.fingerprint = '{spec.fingerprint}'"
            if self.session.client.search_model_versions(query, max_results=1):
                continue
            if (model_id := self.model_id(stage)) is None:
                continue
            if not self.session.client.search_registered_models(f"name = '{name}'", max_results=1):
                about = f"The {MODELS[stage]} of each curriculum; the newest has the alias `{ALIAS}`."
                self.session.client.create_registered_model(name, description=about)
            version = self.session.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=self.session.run_of(stage),
                tags={
                    "fingerprint": spec.fingerprint,
                    "uri": self.store.uri_of(f"{stage}/{spec.fingerprint}"),
                },
                description=self._chain(stage),
                await_creation_for=0,
                model_id=model_id,
            )
            self.session.client.set_registered_model_alias(name, ALIAS, version.version)

    def describe(self, run_id: str, stage: str) -> None:
        """Set the description of a run to the lineage of the stage's artifact."""
        self.session.client.set_tag(run_id, NOTE, self._chain(BY_NAME[stage].described_by(self.plans)))

    def _chain(self, stage: str) -> str:
        """The lineage of a stage's artifact as a markdown table with links to runs in MLflow."""
        found = lineage(self.store.uri_of(f"{stage}/{self.plans[stage].fingerprint}"), self.store)
        lines = ["| | what it holds | fingerprint, revision |", "|---|---|---|"]
        for node in reversed(list(found.nodes.values())):
            link = self._link(node.stage, node.title)
            lines.append(f"| {link} | {describe_node(node)} | `{node.fingerprint[:SHORT]}` |")
            for source in node.sources:
                lines.append(f"| source {source.label} | {source.path} | `{source.revision[:REVISION]}` |")
        for item in found.scores:
            figures = ", ".join(f"{key} {value:.4f}" for key, value in score_facts(item).items())
            lines.append(f"| {self._link(item.stage, 'scores')} | {figures} | `{item.fingerprint[:SHORT]}` |")
        root = f"{stage}/{found.root.fingerprint[:SHORT]}"
        lines += [
            "",
            f"In the store `{self.store.uri}`: `vectorclm lineage {root} --verify` hashes every file again.",
        ]
        return "\n".join(lines)

    def _link(self, stage: str, title: str) -> str:
        if stage not in self.plans or (run_id := self.session.run_of(stage)) is None:
            return title
        return f"[{title}]({run_page(self.session.experiment_id, run_id)})"
