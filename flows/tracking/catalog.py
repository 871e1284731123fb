"""Data sets and logged models in MLflow, linked to the runs that read and built them."""

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelInput, LoggedModelOutput

from flows.tracking.client import VALUE_LENGTH, flatten
from flows.tracking.datasets import COLUMNS, artifact_dataset, source_dataset
from flows.tracking.model_files import write_model_files
from flows.tracking.pyfunc_model import content
from flows.tracking.session import Session
from vectorclm.lineage.chain import sources_of
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.stages import BY_NAME, MODELS
from vectorclm.store.artifact import Artifact

CONTENT = "content"  # the tag of a logged model: the SHA-256 of the artifact that its files refer to
EXTERNAL = "mlflow.model.isExternal"  # the tag of a logged model that MLflow cannot load


class Catalog:
    """The data sets and models of one curriculum in MLflow. All methods run in the tracker's thread."""

    def __init__(self, session: Session) -> None:
        self.session, self.store, self.plans = session, session.store, session.plans
        self.model_ids: dict[str, str] = {}  # fingerprint -> id

    def model_id(self, name: str, artifact: Artifact | None = None) -> str | None:
        """The id of the logged model of a stage's artifact, created if missing; None without the artifact."""
        spec = self.plans[name]
        if spec.fingerprint not in self.model_ids:
            client, experiment_id = self.session.client, self.session.experiment_id
            known = client.search_logged_models(
                [experiment_id], f"tags.fingerprint = '{spec.fingerprint}'", max_results=1
            )
            built = artifact or self.store.look_up(spec.stage, spec.fingerprint)
            if built is None:
                return known[0].model_id if known else None
            model = known[0] if known else self._create(name, built)
            self._write(model, built)
            self.model_ids[spec.fingerprint] = str(model.model_id)
        return self.model_ids[spec.fingerprint]

    def _create(self, name: str, built: Artifact) -> LoggedModel:
        return self.session.client.create_logged_model(
            self.session.experiment_id,
            f"{MODELS[name]}-{built.fingerprint[:8]}",
            self.session.run_of(name),
            tags={"fingerprint": built.fingerprint, "uri": built.uri, "stage": name, **source_tags(built)},
            params=flatten({"config": self.plans[name].config, "summary": built.summary}),
            model_type="llama" if BY_NAME[name].language_model else MODELS[name],
        )

    def _write(self, model: LoggedModel, built: Artifact) -> None:
        """Write the files of a logged model, unless they refer to this artifact already."""
        if model.tags.get(CONTENT) == content(built):
            return
        client = self.session.client
        with temporary_folder() as folder:
            write_model_files(folder, model, built)
            client.log_model_artifacts(model.model_id, str(folder / "model"))
        if EXTERNAL in model.tags:  # recorded by an earlier version of this program
            client.delete_logged_model_tag(model.model_id, EXTERNAL)
        client.finalize_logged_model(model.model_id, "READY")
        client.set_logged_model_tags(model.model_id, {CONTENT: content(built), "uri": built.uri})

    def dataset(self, name: str) -> Dataset | None:
        """The artifact of a data stage as an MLflow data set, with its columns and summary; None if it is missing."""
        spec = self.plans[name]
        built = self.store.look_up(spec.stage, spec.fingerprint)
        return None if built is None else artifact_dataset(built, f"{self.session.experiment.name} {name}")

    def log_inputs(self, name: str) -> None:
        """Log the inputs of a stage on its run: data sets, models, and sources at their revisions."""
        context, inputs = [InputTag("mlflow.data.context", name)], self.plans[name].inputs
        data = [self.dataset(part) for part in inputs if part in COLUMNS]
        experiment = self.session.experiment
        sources = [source_dataset(source.model_dump(mode="json")) for source in BY_NAME[name].sources(experiment)]
        sets = [DatasetInput(entity, context) for entity in [*data, *sources] if entity is not None]
        models = [self.model_id(part) for part in inputs if part in MODELS]
        self.session.client.log_inputs(
            self.session.opened(name), sets, [LoggedModelInput(model) for model in models if model]
        )

    def show(self, name: str, artifact: Artifact) -> None:
        """Log the output of a stage on the curriculum's run, so that the table of runs shows its data and models."""
        parent = self.session.parent_id
        if name in COLUMNS and (data := self.dataset(name)) is not None:
            self.session.client.log_inputs(parent, [DatasetInput(data, [InputTag("mlflow.data.context", name)])])
        elif name in MODELS and (model_id := self.model_id(name, artifact)) is not None:
            self.session.client.log_outputs(parent, [LoggedModelOutput(model_id, step=0)])


def source_tags(artifact: Artifact) -> dict[str, str]:
    """A tag for each source of a model, `source.LABEL`, with path and revision: a search on it finds the models."""
    read = sources_of(artifact)
    return {f"source.{item.label}": "@".join(filter(None, (item.path, item.revision)))[:VALUE_LENGTH] for item in read}
