"""Data sets and models in MLflow: what a run was made from, and the registered versions with their chains."""

import json

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, LoggedModelOutput

from flows.tracking.client import ALIAS, MODELS, NOTE, REGISTERED, flatten, run_page
from flows.tracking.session import Session
from vectorclm.lineage.chain import SHORT, describe_node, lineage, score_facts
from vectorclm.stages import BY_NAME, EVALUATED, TABLE
from vectorclm.store.artifact import Artifact

DIGEST_LENGTH = 36  # of a data set
PROFILE_LENGTH = 16_000  # of a data set
REVISION = 23  # characters of a source's revision that a person reads

ENDS = {"export": "finetune"}  # a copy of a model is described as the model
COLUMNS = {stage.name: stage.columns for stage in TABLE if stage.columns is not None}  # of data sets


class Catalog:
    """The data sets and models of one curriculum; everything here happens in the tracker's thread."""

    def __init__(self, session: Session) -> None:
        self.session, self.store, self.plans = session, session.store, session.plans
        self.model_ids: dict[str, str] = {}  # fingerprint -> id

    def model_id(self, name: str, artifact: Artifact | None = None) -> str | None:
        """The logged model of a stage's artifact, made where there is none; None without the artifact."""
        plan = self.plans[name]
        if plan.fingerprint not in self.model_ids:
            known = self.session.client.search_logged_models(
                [self.session.experiment_id], f"tags.fingerprint = '{plan.fingerprint}'", max_results=1
            )
            if known:
                self.model_ids[plan.fingerprint] = known[0].model_id
            elif (made := artifact or self.store.look_up(plan.stage, plan.fingerprint)) is not None:
                model = mlflow.create_external_model(
                    MODELS[name],
                    source_run_id=self.session.run_of(name),
                    tags={"fingerprint": plan.fingerprint, "uri": made.uri, "stage": name},
                    params=flatten({"config": plan.config, "summary": made.summary}),
                    model_type="tokenizer" if name == "tokenizer" else "llama",
                    experiment_id=self.session.experiment_id,
                )
                self.model_ids[plan.fingerprint] = model.model_id
        return self.model_ids.get(plan.fingerprint)

    def dataset(self, name: str) -> Dataset | None:
        """The artifact of a data stage as MLflow's data set, with what it holds."""
        plan = self.plans[name]
        made = self.store.look_up(plan.stage, plan.fingerprint)
        if made is None:
            return None
        return Dataset(
            f"{self.session.experiment.name} {name}",
            plan.fingerprint[:DIGEST_LENGTH],
            "local" if self.store.is_local else self.store.uri.partition(":")[0],
            json.dumps({"uri": made.uri, "sha256": made.identity}),
            schema=json.dumps({"mlflow_colspec": [{"name": key, "type": kind} for key, kind in COLUMNS[name].items()]}),
            profile=json.dumps(made.summary)[:PROFILE_LENGTH],
        )

    def log_inputs(self, name: str) -> None:
        """What the stage `name` is made from, on its run: data sets, models, and sources at their revisions."""
        context, inputs = [InputTag("mlflow.data.context", name)], self.plans[name].inputs
        data = [self.dataset(part) for part in inputs if part in COLUMNS]
        sets = [DatasetInput(entity, context) for entity in [*data, *self.sources(name)] if entity is not None]
        models = [self.model_id(part) for part in inputs if part in MODELS]
        self.session.client.log_inputs(
            self.session.opened(name), sets, [LoggedModelInput(model) for model in models if model]
        )

    def sources(self, name: str) -> list[Dataset]:
        """The documents, conversations or questions that the stage `name` reads, at their revisions."""
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
        """What a stage has made, on the curriculum's own run, so that the table of runs has its data and models."""
        parent = self.session.parent_id
        if name in COLUMNS and (data := self.dataset(name)) is not None:
            self.session.client.log_inputs(parent, [DatasetInput(data, [InputTag("mlflow.data.context", name)])])
        elif name in MODELS and (model_id := self.model_id(name, artifact)) is not None:
            self.session.client.log_outputs(parent, [LoggedModelOutput(model_id, step=0)])

    def register_models(self) -> None:
        """A new version of each model where the registry has none of this fingerprint; the chain on the curriculum."""
        self.describe(self.session.parent_id, "export")
        for stage, name in REGISTERED.items():
            plan = self.plans[stage]
            query = f"name = '{name}' and tags.fingerprint = '{plan.fingerprint}'"
            if self.session.client.search_model_versions(query, max_results=1):
                continue
            if (model_id := self.model_id(stage)) is None:
                continue
            if not self.session.client.search_registered_models(f"name = '{name}'", max_results=1):
                about = f"The {MODELS[stage]} of each curriculum, the newest as `{ALIAS}`."
                self.session.client.create_registered_model(name, description=about)
            version = self.session.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=self.session.run_of(stage),
                tags={
                    "fingerprint": plan.fingerprint,
                    "uri": self.store.uri_of(f"{stage}/{plan.fingerprint}"),
                },
                description=self._chain(stage),
                await_creation_for=0,
                model_id=model_id,
            )
            self.session.client.set_registered_model_alias(name, ALIAS, version.version)

    def describe(self, run_id: str, stage: str) -> None:
        """Have a run's page begin with what the stage has made, and from what."""
        self.session.client.set_tag(run_id, NOTE, self._chain(EVALUATED.get(stage, ENDS.get(stage, stage))))

    def _chain(self, stage: str) -> str:
        """What a stage has made and all that is behind it, as a markdown table with links into MLflow."""
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
            f"In the store `{self.store.uri}`: `vectorclm lineage {root} --verify` reads every byte of it again.",
        ]
        return "\n".join(lines)

    def _link(self, stage: str, title: str) -> str:
        if stage not in self.plans or (run_id := self.session.run_of(stage)) is None:
            return title
        return f"[{title}]({run_page(self.session.experiment_id, run_id)})"
