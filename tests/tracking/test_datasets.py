"""Data sets of MLflow: artifacts, sources at their revisions, and the one that each score was measured on."""

import json

import pytest

from flows.tracking.datasets import DIGEST_LENGTH, artifact_dataset, dataset_of, measured_on, named, source_dataset
from tests.services.curricula import Recorded
from vectorclm.stages import BY_NAME
from vectorclm.store.artifact import Artifact


def artifact(recorded: Recorded, stage: str) -> Artifact:
    found = recorded.store.find(stage, recorded.handles[stage]["fingerprint"])
    assert found is not None
    return found


def test_an_artifact_is_named_with_address_columns_and_summary(recorded: Recorded) -> None:
    shards = artifact(recorded, "shards")
    data = artifact_dataset(shards, "mini shards")
    assert (data.name, data.digest, data.source_type) == ("mini shards", shards.fingerprint[:DIGEST_LENGTH], "local")
    assert json.loads(data.source) == {"uri": shards.uri, "sha256": shards.identity}
    columns = {column["name"]: column["type"] for column in json.loads(data.schema)["mlflow_colspec"]}
    assert columns == BY_NAME["shards"].columns and json.loads(data.profile) == shards.summary


@pytest.mark.parametrize(
    ("revision", "kind", "digest"),
    [("sha256:" + "ab" * 32, "local", "ab" * 18), ("c" * 40, "hugging_face", "c" * 36), (None, "hugging_face", "none")],
)
def test_a_source_is_named_at_its_revision(revision: str | None, kind: str, digest: str) -> None:
    data = source_dataset({"label": "web", "path": "owner/web", "name": "en", "split": "train", "revision": revision})
    assert (data.name, data.source_type, data.digest) == ("web", kind, digest)
    place = {"path": "owner/web", "config_name": "en", "split": "train", "revision": revision or "none"}
    assert json.loads(data.source) == place and json.loads(data.profile)["label"] == "web"
    assert json.loads(source_dataset({"label": "alone"}).source)["path"] == "alone"


def test_each_score_names_what_it_was_measured_on(recorded: Recorded) -> None:
    found = measured_on(artifact(recorded, "evaluate"), recorded.store, "mini ")
    names = {
        "tasks.world.acc": "world",
        "acc_norm.world": "world",
        "bits_per_byte.stories": "mini shards",
        "text.stories.stderr": "mini shards",
        "chat.prompts": "mini chat_shards",
        "samples": None,
    }
    assert {score: named(dataset_of(score, found))[0] for score in names} == names
    assert named(None) == (None, None)
    assert named(dataset_of("loss.stories", found))[1] == recorded.handles["shards"]["fingerprint"][:DIGEST_LENGTH]
