"""Data sets and models of a curriculum in MLflow, each with what it was made of; registered once each."""

import json
from collections.abc import Mapping

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from flows.tracking.catalog import Catalog
from flows.tracking.datasets import DIGEST_LENGTH
from flows.tracking.session import Session
from tests.services.curricula import Recorded
from tests.tracking.conftest import client
from vectorclm.config import changed
from vectorclm.stages import BY_NAME, MODELS, plans


@pytest.fixture(scope="module")
def mlflow(recorded: Recorded) -> MlflowClient:
    return client(recorded.store)


@pytest.fixture(scope="module")
def runs(recorded: Recorded, mlflow: MlflowClient) -> Mapping[str, Run]:
    """The run of each stage, and of the curriculum."""
    place = mlflow.get_experiment_by_name("mini")
    found = mlflow.search_runs([place.experiment_id], f"tags.experiment = '{recorded.experiment.name}'")
    return {run.data.tags["stage"]: mlflow.get_run(run.info.run_id) for run in found}


def catalog(recorded: Recorded, mlflow: MlflowClient, **settings: object) -> Catalog:
    """The catalogue of another process of the recorded curriculum, or of one with other settings."""
    experiment = changed(recorded.experiment, settings)
    session = Session(recorded.store, experiment, plans(experiment))
    session.client = mlflow
    session.experiment_id = mlflow.get_experiment_by_name("mini").experiment_id
    return Catalog(session)


def test_a_stage_names_its_data_with_address_columns_and_summary(recorded: Recorded, runs: Mapping[str, Run]) -> None:
    (data,) = (item.dataset for item in runs["pretrain"].inputs.dataset_inputs)
    shards = recorded.handles["shards"]
    assert (data.name, data.digest) == ("mini shards", shards["fingerprint"][:DIGEST_LENGTH])
    artifact = recorded.store.find("shards", shards["fingerprint"])
    assert artifact is not None
    assert json.loads(data.source) == {"uri": shards["uri"], "sha256": artifact.identity}
    assert data.source_type == "local" and json.loads(data.profile) == artifact.summary
    columns = {column["name"]: column["type"] for column in json.loads(data.schema)["mlflow_colspec"]}
    assert columns == BY_NAME["shards"].columns


def test_a_stage_names_its_sources_at_their_revisions(recorded: Recorded, runs: Mapping[str, Run]) -> None:
    for stage in ("sample", "chat_shards", "evaluate_base"):
        found = {item.dataset.name: item.dataset for item in runs[stage].inputs.dataset_inputs}
        for source in BY_NAME[stage].sources(recorded.experiment):
            place = json.loads(found[source.label].source)
            assert (place["path"], place["revision"]) == (source.path, source.revision)
            assert json.loads(found[source.label].profile)["label"] == source.label


def test_every_model_is_linked_to_the_runs_that_made_and_used_it(
    recorded: Recorded, mlflow: MlflowClient, runs: Mapping[str, Run]
) -> None:
    models = {
        model.tags["stage"]: model for model in mlflow.search_logged_models([runs["curriculum"].info.experiment_id])
    }
    assert set(models) == set(MODELS)
    for stage, model in models.items():
        assert (model.name, model.source_run_id) == (
            f"{MODELS[stage]}-{recorded.handles[stage]['fingerprint'][:8]}",
            runs[stage].info.run_id,
        )
        assert model.tags["uri"] == recorded.handles[stage]["uri"]
        assert [item.model_id for item in runs[stage].outputs.model_outputs] == [model.model_id]
    assert models["pretrain"].model_type == "llama" and models["tokenizer"].model_type == "tokenizer"
    used = {stage: {item.model_id for item in runs[stage].inputs.model_inputs} for stage in ("shards", "finetune")}
    assert used == {"shards": {models["tokenizer"].model_id}, "finetune": {models["pretrain"].model_id}}
    shown = {item.model_id for item in runs["curriculum"].outputs.model_outputs}
    assert shown == {model.model_id for model in models.values()}


def test_another_process_of_the_curriculum_makes_nothing_twice(recorded: Recorded, mlflow: MlflowClient) -> None:
    place = mlflow.get_experiment_by_name("mini").experiment_id
    before = {model.model_id for model in mlflow.search_logged_models([place])}
    again = catalog(recorded, mlflow)
    assert {again.model_id(stage) for stage in MODELS} == before
    assert {model.model_id for model in mlflow.search_logged_models([place])} == before


def test_what_was_not_built_is_in_no_catalogue(recorded: Recorded, mlflow: MlflowClient) -> None:
    other = catalog(recorded, mlflow, seed=recorded.experiment.seed + 1)
    assert other.dataset("sample") is None and other.model_id("pretrain") is None
    assert other.model_ids == {}
