"""Registered versions: their lineage, scores and card, made once, and completed where a crash left them half-made."""

from collections.abc import Iterator

import mlflow
import pytest
from mlflow import MlflowClient

from flows.tracking.catalog import Catalog
from flows.tracking.client import NOTE, REGISTERED
from flows.tracking.session import Session
from flows.tracking.versions import CARD, COMPLETE, DESCRIPTION, OWN, Versions
from tests.services.curricula import Recorded, copied
from vectorclm.lineage.chain import SHORT
from vectorclm.stages import EXPORTED, plans
from vectorclm.store.artifact import Store
from vectorclm.store.layout import EXPORT


@pytest.fixture(scope="module")
def store(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return copied(recorded, tmp_path_factory.mktemp("versions"))


@pytest.fixture
def client(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    uri = f"sqlite:///{store.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    yield MlflowClient(uri)


@pytest.fixture
def versions(recorded: Recorded, store: Store, client: MlflowClient) -> Versions:
    """The versions of another process of the recorded curriculum."""
    session = Session(store, recorded.experiment, plans(recorded.experiment))
    session.client = client
    session.experiment_id = client.get_experiment_by_name("mini").experiment_id
    query = "tags.stage = 'curriculum'"
    session.run_ids["curriculum"] = client.search_runs([session.experiment_id], query)[0].info.run_id
    return Versions(Catalog(session))


def counted(client: MlflowClient) -> int:
    return sum(len(client.search_model_versions(f"name = '{name}'")) for name in REGISTERED.values())


def test_a_version_tells_its_lineage_its_scores_and_how_it_is_loaded(
    recorded: Recorded, client: MlflowClient, versions: Versions
) -> None:
    for stage in EXPORTED.values():
        version = client.get_model_version_by_alias(REGISTERED[stage], "candidate")
        assert version.tags["fingerprint"] == recorded.handles[stage]["fingerprint"]
        assert version.run_id == versions.session.run_of(stage) and version.tags[COMPLETE] == "true"
        assert {"source.stories", "source.lessons", "score.acc.world"} <= set(version.tags)
        print_ = recorded.handles[stage]["fingerprint"][:SHORT]
        assert f"`vectorclm lineage {stage}/{print_} --verify` {OWN}" in version.description
        for part in ("sample", "tokenizer", stage):
            assert f"/runs/{versions.session.run_of(part)}" in version.description
        assert f'mlflow.pyfunc.load_model("models:/{version.name}/{version.version}")' in version.description
        assert len(version.description) <= DESCRIPTION
        model = client.get_logged_model(versions.catalog.model_id(stage))
        assert model.tags[NOTE] == version.description  # its page has no other
        kept = client.list_logged_model_artifacts(versions.catalog.model_id(stage))
        assert CARD in [item.path for item in kept]
    note = client.get_run(versions.session.parent_id).data.tags[NOTE]
    assert note.startswith("| | what it holds |") and "[chat model](" in note


def test_what_is_registered_is_not_registered_again(client: MlflowClient, versions: Versions) -> None:
    before = counted(client)
    for stage in ("tokenizer", EXPORT):
        versions.register_models(stage)
    assert counted(client) == before


def test_a_version_that_a_crash_left_half_made_is_completed(
    recorded: Recorded, client: MlflowClient, versions: Versions
) -> None:
    name, number = REGISTERED["finetune"], client.get_model_version_by_alias("vectorclm-chat", "candidate").version
    described = client.get_model_version(name, number).description
    client.set_model_version_tag(name, number, COMPLETE, "false")
    client.delete_model_version_tag(name, number, "score.acc.world")
    client.update_model_version(name, number, "")
    client.delete_registered_model_alias(name, "candidate")
    before = counted(client)
    versions.register_models(EXPORT)
    found = client.get_model_version_by_alias(name, "candidate")
    assert (found.version, found.tags[COMPLETE], counted(client)) == (number, "true", before)
    assert "score.acc.world" in found.tags
    assert found.description == described.replace(recorded.store.uri, versions.store.uri)
    assert client.get_model_version_by_alias(name, "mini").version == number  # the experiment's own alias


def test_a_description_of_a_person_is_kept_and_a_deleted_model_is_registered_anew(
    client: MlflowClient, versions: Versions
) -> None:
    name = REGISTERED["pretrain"]
    old = client.get_model_version_by_alias(name, "candidate")
    client.update_model_version(name, old.version, "the one for the demo")
    client.set_model_version_tag(name, old.version, COMPLETE, "false")
    versions.register_models(EXPORT)
    assert client.get_model_version(name, old.version).description == "the one for the demo"
    client.delete_model_version(name, old.version)
    versions.register_models(EXPORT)
    new = client.get_model_version_by_alias(name, "candidate")
    assert int(new.version) > int(old.version) and new.tags["fingerprint"] == old.tags["fingerprint"]
