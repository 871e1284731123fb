"""MLflow's records of removed artifacts go, those of artifacts that stay do not; on a real database."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.tracking.registry import Registry
from flows.tracking.removal import PARENT, find_records, remove_records
from vectorclm.store.artifact import Store

GONE, STAYS = "a" * 64, "b" * 64


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("VECTORCLM_HOME", raising=False)
    return Registry(Store(str(tmp_path)))


def run(client: MlflowClient, place: str, parent: str = "", fingerprint: str = "", **more: str) -> str:
    """A finished run with these tags, in the experiment with the id `place`."""
    tags = {PARENT: parent, "fingerprint": fingerprint, **more}
    made = client.create_run(place, tags={name: value for name, value in tags.items() if value})
    client.set_terminated(made.info.run_id)
    return str(made.info.run_id)


def is_there(client: MlflowClient, run_id: str) -> bool:
    return bool(client.get_run(run_id).info.lifecycle_stage == "active")


def test_versions_models_and_runs_go_and_what_others_use_stays(registry: Registry, tmp_path: Path) -> None:
    client = registry.client
    tiny, other = client.create_experiment("tiny"), client.create_experiment("tiny-er")
    own, shared = run(client, tiny), run(client, tiny)
    built, reused, base = run(client, tiny, own, GONE), run(client, other, "", GONE), run(client, tiny, shared, STAYS)
    model = client.create_logged_model(tiny, name="chat", tags={"fingerprint": GONE})
    client.create_registered_model("vectorclm-chat")
    for fingerprint in (GONE, STAYS):
        client.create_model_version("vectorclm-chat", str(tmp_path), tags={"fingerprint": fingerprint})
    client.set_registered_model_alias("vectorclm-chat", "candidate", "1")

    found = find_records(registry, [GONE])
    assert set(found.runs) == {built, reused}  # of a model alone
    found = find_records(registry, [GONE], "tiny")
    assert set(found.runs) == {own, built, reused} and found.models == [model.model_id]
    assert found.as_json() == {"versions": ["vectorclm-chat 1 @candidate"], "models": 1, "runs": 3}
    assert is_there(client, own)  # finding removes nothing
    remove_records(registry, found)
    assert [is_there(client, each) for each in (own, built, reused, shared, base)] == [False] * 3 + [True] * 2
    assert [version.version for version in client.search_model_versions()] in ([2], ["2"])
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias("vectorclm-chat", "candidate")
    assert find_records(registry, [GONE], "tiny").as_json() == {"versions": [], "models": 0, "runs": 0}


def test_records_of_another_store_stay(registry: Registry, tmp_path: Path) -> None:
    """One MLflow has records of an artifact in two stores: a local copy goes, the original stays."""
    client, tiny = registry.client, registry.client.create_experiment("tiny")
    here, there = (f"{root}/finetune/{GONE}" for root in (tmp_path, "s3://bucket/store"))
    client.create_registered_model("vectorclm-chat")
    models = []
    for number, uri in enumerate((here, there), 1):
        tags = {"fingerprint": GONE, "uri": uri}
        models.append(client.create_logged_model(tiny, name="chat", tags=tags).model_id)
        client.create_model_version("vectorclm-chat", uri, tags=tags)
        client.set_registered_model_alias("vectorclm-chat", ("candidate", "champion")[number - 1], str(number))
    curricula = [run(client, tiny, "", GONE), run(client, tiny, "", GONE)]
    built = [run(client, tiny, curricula[number], GONE, uri=uri) for number, uri in enumerate((here, there))]
    failed = [run(client, tiny, parent, GONE) for parent in curricula]  # before it had an artifact to name
    recorded = run(client, tiny, "", GONE, store="s3://bucket/store")
    alone = run(client, tiny, "", GONE)  # nothing says of which store it is
    found = find_records(registry, [GONE], "tiny")
    assert found.models == models[:1] and found.titles == ["vectorclm-chat 1 @candidate"]
    assert set(found.runs) == {curricula[0], built[0], failed[0]} and found.runs[-1] == curricula[0]
    remove_records(registry, found)
    assert client.get_model_version_by_alias("vectorclm-chat", "champion").tags["uri"] == there
    assert all(is_there(client, each) for each in (curricula[1], built[1], failed[1], recorded, alone))


def test_a_store_that_was_moved_has_its_own_records_removed(registry: Registry, tmp_path: Path) -> None:
    client, tiny = registry.client, registry.client.create_experiment("tiny")
    moved = run(client, tiny, "", GONE, uri=f"{tmp_path}/before/finetune/{GONE}")
    (tmp_path / "link").symlink_to(tmp_path)
    linked = run(client, tiny, "", GONE, uri=f"{tmp_path}/link/finetune/{GONE}")
    (tmp_path / "other").mkdir()
    run(client, tiny, "", GONE, uri=f"{tmp_path}/other/finetune/{GONE}")
    assert set(find_records(registry, [GONE]).runs) == {moved, linked}


def test_unfinished_runs_and_runs_of_others_stay(registry: Registry) -> None:
    client, tiny = registry.client, registry.client.create_experiment("tiny")
    own = run(client, tiny)  # of the user, beside the curricula
    busy = client.create_run(tiny).info.run_id
    parent = run(client, tiny, "", GONE)
    running = client.create_run(tiny, tags={PARENT: parent, "fingerprint": GONE}).info.run_id
    ended = run(client, tiny, parent, GONE)
    found = find_records(registry, [GONE], "tiny")
    assert found.runs == [ended] and found.unfinished == [running]
    remove_records(registry, found)
    assert all(is_there(client, each) for each in (own, busy, parent, running))
    client.set_terminated(running)
    assert find_records(registry, [GONE], "tiny").runs == [running, parent]
