"""Registered model versions in MLflow: their sources, scores, card, chain of artifacts, and the alias of the newest."""

import json
import logging
import re
from collections.abc import Iterator

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from flows.tracking.catalog import Catalog, source_tags
from flows.tracking.client import ALIAS, NOTE, REGISTERED, TRAINING_VIEW, VALUE_LENGTH, run_page
from flows.tracking.model_files import loading_lines
from flows.tracking.registry import logged_model
from vectorclm.lineage.chain import SHORT, Lineage, describe_node, lineage, score_facts
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.stage_builders import ancestors
from vectorclm.stages import BY_NAME, EXPORTED
from vectorclm.store.layout import EXPORT

logger = logging.getLogger(__name__)

REVISION = 23  # characters of a source's revision that are shown
DESCRIPTION = 5000  # characters of a version's description that every database of MLflow takes
CARD = "README.md"
CONTENT = "identified by its content"  # a source without a path
COMPLETE = "complete"  # the tag of a version: false while its description, scores and aliases are being set
OWN = "hashes every file again."  # a description that a person wrote lacks it, and is kept
VERSIONS = "mlflow.modelVersions"  # the tag of a logged model that its page and its run's page show as registered
ALIAS_NAME = re.compile(r"(?!(?i:latest|v\d+|candidate|champion)$)[\w-]+")  # what MLflow takes, less our own


class Versions:
    """The registered versions of one curriculum. All methods run in the tracker's thread."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog, self.session, self.store = catalog, catalog.session, catalog.store

    def register_models(self, completed: str) -> None:
        """Register a new version of each model that the stage `completed` completes and whose fingerprint is new.

        The export completes all models behind it, and describes the curriculum by its lineage; any other model is
        complete with its own stage. A model whose version or logged model was deleted in MLflow is registered anew. The
        alias `candidate` moves to a new version, and to the present one where the alias was deleted.
        """
        behind = ancestors(EXPORT, self.session.plans)
        if completed == EXPORT:
            self.describe(self.session.parent_id, EXPORT)
        client = self.session.client
        for stage, name in REGISTERED.items():
            if stage not in self.session.plans or completed != (EXPORT if stage in behind else stage):
                continue
            if (model_id := self.catalog.model_id(stage)) is None:
                continue
            about = f"The {BY_NAME[stage].result or stage} of each curriculum; the newest has the alias `{ALIAS}`."
            if not client.search_registered_models(f"name = '{name}'", max_results=1):
                client.create_registered_model(name, description=about)
            version = self._registered(stage, name)
            if version is None:
                version = client.create_model_version(
                    name,
                    f"models:/{model_id}",
                    run_id=self.session.run_of(stage),
                    tags={**self._tags(stage), COMPLETE: "false"},
                    await_creation_for=0,
                    model_id=model_id,
                )
            if version.tags.get(COMPLETE) != "true":
                self._complete(version, stage, model_id)
            self._set_aliases(version, new=version.tags.get(COMPLETE) == "false")
            client.set_model_version_tag(name, version.version, COMPLETE, "true")

    def _set_aliases(self, version: ModelVersion, *, new: bool) -> None:
        """Move `candidate`, and the alias that is the experiment's name, to a new version."""
        client, name, own = self.session.client, version.name, self.session.experiment.name
        if new and ALIAS_NAME.fullmatch(own):
            client.set_registered_model_alias(name, own, version.version)
        if new or ALIAS not in client.get_registered_model(name).aliases:
            client.set_registered_model_alias(name, ALIAS, version.version)
            logger.info("%s %s is registered in MLflow, now @%s", name, version.version, ALIAS)

    def _registered(self, stage: str, name: str) -> ModelVersion | None:
        """The version of a stage's artifact; None without one, or where its logged model was deleted."""
        query = f"name = '{name}' and tags.fingerprint = '{self.session.plans[stage].fingerprint}'"
        for version in self.session.client.search_model_versions(query):
            if (model_id := logged_model(version)) is None:
                return version
            try:
                self.session.client.get_logged_model(model_id)
            except MlflowException:
                continue
            return version
        return None

    def _tags(self, stage: str) -> dict[str, str]:
        """The tags by which a version is found: its artifact, its experiment, its sources."""
        fingerprint = self.session.plans[stage].fingerprint
        artifact = self.store.look_up(stage, fingerprint)
        return {
            "fingerprint": fingerprint,
            "uri": self.store.uri_of(f"{stage}/{fingerprint}"),
            "stage": stage,
            "experiment": self.session.experiment.name,
            **(source_tags(artifact) if artifact is not None else {}),
        }

    def _complete(self, version: ModelVersion, stage: str, model_id: str) -> None:
        """Add scores, description and card to a new version, and link it from its logged model."""
        client, name, number = self.session.client, version.name, version.version
        found = self._lineage(stage)
        for item in found.scores:
            for key, value in score_facts(item).items():
                client.set_model_version_tag(name, number, f"score.{key}", f"{value:.4f}"[:VALUE_LENGTH])
        linked = json.loads(client.get_logged_model(model_id).tags.get(VERSIONS, "[]"))
        if not any(item == {"name": name, "version": int(number)} for item in linked):
            linked.append({"name": name, "version": int(number)})
            client.set_logged_model_tags(model_id, {VERSIONS: json.dumps(linked)})
        if (card := self._card(stage)) is not None:
            with temporary_folder() as folder:
                (folder / CARD).write_bytes(card)
                client.log_model_artifact(model_id, str(folder / CARD))
        parts = [f"The {BY_NAME[stage].result or stage} of the experiment `{self.session.experiment.name}`."]
        if found.root.artifact is not None:
            parts.append(loading_lines(name, str(number), found.root.artifact))
        if card is not None:
            parts.append(
                f"The [card](#/experiments/{self.session.experiment_id}/models/{model_id}/artifacts{TRAINING_VIEW}) "
                f"is the file {CARD} of the logged model."
            )
        text = self._chain(stage, found, "\n\n".join([*parts, ""]))
        if not version.description or OWN in version.description:
            client.update_model_version(name, number, text)
        if OWN in client.get_logged_model(model_id).tags.get(NOTE, OWN):
            client.set_logged_model_tags(model_id, {NOTE: text})

    def _card(self, stage: str) -> bytes | None:
        """The model card of a training, from the curriculum's export; None where there is none."""
        export = self.store.look_up(EXPORT, self.session.plans[EXPORT].fingerprint)
        folder = next((name for name, kind in EXPORTED.items() if kind == stage), None)
        file = f"{folder}/{CARD}"
        return export.read(file) if export is not None and file in export.manifest["files"] else None

    def describe(self, run_id: str, stage: str) -> None:
        """Set the description of a run to the lineage of the stage's artifact."""
        root = BY_NAME[stage].described_by(self.session.plans)
        self.session.client.set_tag(run_id, NOTE, self._chain(root, self._lineage(root)))

    def _lineage(self, stage: str) -> Lineage:
        return lineage(self.store.uri_of(f"{stage}/{self.session.plans[stage].fingerprint}"), self.store)

    def _chain(self, stage: str, found: Lineage, head: str = "") -> str:
        """The lineage of a stage's artifact as a markdown table with links to runs in MLflow, after `head`.

        Rows beyond the length that MLflow's databases take are left out, the last of the table first.
        """
        root = f"{stage}/{found.root.fingerprint[:SHORT]}"
        end = f"\n\nIn the store `{self.store.uri}`: `vectorclm lineage {root} --verify` {OWN}"
        text = f"{head}| | what it holds | fingerprint, revision |\n|---|---|---|"
        for row in self._rows(found):
            if len(text) + len(row) + len(end) + 2 > DESCRIPTION:
                return f"{text}\n| … | | |{end}"[:DESCRIPTION]
            text += f"\n{row}"
        return (text + end)[:DESCRIPTION]

    def _rows(self, found: Lineage) -> Iterator[str]:
        for item in found.scores:
            figures = ", ".join(f"{key} {value:.4f}" for key, value in score_facts(item).items())
            yield f"| {self._link(item.stage, 'scores')} | {figures} | `{item.fingerprint[:SHORT]}` |"
        for node in reversed(list(found.nodes.values())):
            link = self._link(node.stage, node.title)
            yield f"| {link} | {describe_node(node)} | `{node.fingerprint[:SHORT]}` |"
            for source in node.sources:
                yield f"| source {source.label} | {source.path or CONTENT} | `{source.revision[:REVISION]}` |"

    def _link(self, stage: str, title: str) -> str:
        if stage not in self.session.plans or (run_id := self.session.run_of(stage)) is None:
            return title
        return f"[{title}]({run_page(self.session.experiment_id, run_id)})"
