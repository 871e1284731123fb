"""The registry: addresses of models, recorded evaluations, promotions, and the errors of each."""

from pathlib import Path

import mlflow
import pytest

from flows.tracking.registry import Registry, RegistryError, Subject
from tests.services.curricula import Recorded
from vectorclm.errors import ConfigError
from vectorclm.store.artifact import Artifact
from vectorclm.store.layout import MEASURE


@pytest.fixture
def registry(recorded: Recorded) -> Registry:
    return Registry(recorded.store)


def measured(recorded: Recorded, accuracy: float, digit: str) -> Artifact:
    """The scores of a suite with one task and one text."""
    task = {"acc": accuracy, "stderr": 0.05, "chance": 0.25, "items": 100}
    text = {"t": {"bits_per_byte": 1.5, "stderr": 0.1}}
    manifest = {
        "stage": MEASURE, "config": {"suite": "s"}, "inputs": {},
        "summary": {"tasks": {"world": task}, "text": text, "not_run": ["code"]},
    }  # fmt: skip
    return Artifact(recorded.store, MEASURE, digit * 64, manifest)


def test_a_model_is_found_by_name_and_by_place(recorded: Recorded, registry: Registry) -> None:
    chat = recorded.handles["finetune"]
    for address in ("models:/vectorclm-chat@candidate", "models:/vectorclm-chat/1"):
        found = registry.find(address)
        name = "vectorclm-chat@candidate" if "@" in address else "vectorclm-chat"
        assert (found.name, found.title) == (name, "vectorclm-chat 1")
        assert found.address == chat["uri"] and found.model_id is not None
    place = registry.find(f"{chat['uri']}/")
    assert place.name == f"finetune/{chat['fingerprint'][:12]}" and place.address == chat["uri"]
    assert registry.find("/some/folder") == Subject("/some/folder", "/some/folder", "/some/folder", None)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/vectorclm-chat", "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/nothing@candidate", "has no models:/nothing@candidate.*registers vectorclm-base"),
        ("models:/vectorclm-chat/99", "has no models:/vectorclm-chat/99"),
        ("models:/vectorclm-chat@nobody", "has no models:/vectorclm-chat@nobody"),
    ],
)
def test_an_address_that_names_nothing_is_explained(registry: Registry, address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.find(address)


def test_a_model_of_another_program_has_no_place(registry: Registry) -> None:
    registry.client.create_registered_model("foreign")
    registry.client.create_model_version("foreign", "file:///somewhere")
    with pytest.raises(ConfigError, match="registered by another program"):
        registry.find("models:/foreign/1")


def test_a_version_leads_only_to_the_artifact_that_its_tags_name(
    recorded: Recorded, registry: Registry, tmp_path: Path
) -> None:
    version = registry.version("models:/vectorclm-chat/1")
    known, chat = dict(version.tags), recorded.handles["finetune"]
    other = tmp_path / "other" / "finetune" / ("0" * 64)
    copy = tmp_path / "copy" / "finetune" / chat["fingerprint"]
    for folder in (other, copy):
        folder.mkdir(parents=True)
    (other / "manifest.json").write_bytes(Path(chat["uri"], "manifest.json").read_bytes())
    for uri, fingerprint in (
        ("/etc", known["fingerprint"]),
        (str(other), known["fingerprint"]),
        (str(other), "0" * 64),
        (f"{tmp_path}/none/finetune/{'1' * 64}", "1" * 64),
    ):
        version._tags = {**known, "uri": uri, "fingerprint": fingerprint}
        with pytest.raises(ConfigError, match="name"):
            registry.place(version)
    version._tags = {**known, "uri": str(copy)}
    assert registry.place(version) == chat["uri"]  # the store at hand has it


@pytest.mark.parametrize("source", ["models:/{model}", "runs:/{run}/{name}"])
def test_a_version_that_mlflow_itself_registered_has_the_place_of_its_logged_model(
    recorded: Recorded, registry: Registry, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, registry.uri)
    model = registry.client.get_logged_model(str(registry.find("models:/vectorclm-chat/1").model_id))
    mlflow.register_model(source.format(model=model.model_id, run=model.source_run_id, name=model.name), "mine")
    try:
        assert registry.find("models:/mine/1").address == recorded.handles["finetune"]["uri"]
    finally:
        registry.client.delete_registered_model("mine")


def test_a_scheduled_evaluation_becomes_history_and_one_by_hand_does_not(
    recorded: Recorded, registry: Registry
) -> None:
    subject, first = registry.find("models:/vectorclm-base/1"), measured(recorded, 0.4, "1")
    assert registry.record(subject, first, None).startswith("run ")
    assert registry.history(subject, first.manifest["config"]) == []
    registry.record(subject, measured(recorded, 0.5, "2"), "a flow run")
    (result,) = registry.history(subject, first.manifest["config"])
    assert result.fingerprint == "2" * 64 and result.title == "vectorclm-base 1"
    assert result.figures["acc.world"].value == 0.5
    assert registry.history(subject, {"suite": "another"}) == []
    place = registry.client.get_experiment_by_name("evaluations").experiment_id
    (run,) = registry.client.search_runs([place], f"tags.fingerprint = '{'2' * 64}'")
    (model,) = registry.client.get_run(run.info.run_id).inputs.model_inputs
    assert model.model_id == subject.model_id and run.data.tags["not_run"] == "code"


def test_each_alias_has_a_history_of_its_own_and_the_common_one_of_earlier_versions(
    recorded: Recorded, registry: Registry
) -> None:
    settings = measured(recorded, 0.5, "8").manifest["config"] | {"suite": "of aliases"}

    def record(name: str, accuracy: float, digit: str) -> None:
        found = measured(recorded, accuracy, digit)
        scores = Artifact(recorded.store, MEASURE, digit * 64, {**found.manifest, "config": settings})
        registry.record(Subject(name, "t", "/a", None), scores, "a flow run")

    def history(name: str) -> list[str]:
        return [result.fingerprint[0] for result in registry.history(Subject(name, "t", "/a", None), settings)]

    record("vectorclm-chat", 0.1, "a")
    (run,) = registry.client.search_runs([registry.experiment_id()], f"tags.fingerprint = '{'a' * 64}'")
    registry.client.delete_tag(run.info.run_id, "subject")  # as an earlier version recorded it
    for name, digit in (("vectorclm-chat", "b"), ("vectorclm-chat@candidate", "c"), ("vectorclm-chat@champion", "d")):
        record(name, 0.2, digit)
    assert history("vectorclm-chat@candidate") == ["c", "a"] and history("vectorclm-chat@champion") == ["d", "a"]
    assert history("vectorclm-chat") == ["b", "a"]


def test_scores_by_hand_are_recorded_once_for_a_registered_model(recorded: Recorded, registry: Registry) -> None:
    address, scores = recorded.handles["finetune"]["uri"], measured(recorded, 0.3, "3")
    assert registry.record_cli_evaluation(address, scores) is not None
    assert registry.record_cli_evaluation(address, scores) is None
    assert registry.record_cli_evaluation("/some/folder", scores) is None
    assert registry.record_cli_evaluation(recorded.handles["sample"]["uri"], scores) is None


def test_a_decision_is_recorded_and_moves_the_alias_only_if_good(registry: Registry) -> None:
    version = registry.version("models:/vectorclm-base/1")
    rows = [{"score": "acc.world", "champion": "0.25", "candidate": "0.4"}]
    assert registry.champion("vectorclm-base") is None
    for good, champion in ((False, None), (True, "1")):
        registry.decide(version, {"over": "chance", "decision": str(good)}, rows, good)
        found = registry.champion("vectorclm-base")
        assert (str(found.version) if found is not None else None) == champion
        assert registry.version("models:/vectorclm-base/1").tags["promotion.decision"] == str(good)
    registry.client.delete_registered_model_alias("vectorclm-base", "champion")


def test_a_server_that_does_not_answer_is_named_without_its_password(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:s3cr3t@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Registry(recorded.store)
    for call in (
        lambda: away.find("models:/vectorclm-chat/1"),
        lambda: away.record_cli_evaluation(recorded.handles["finetune"]["uri"], measured(recorded, 0.3, "4")),
    ):
        with pytest.raises(RegistryError, match="does not answer") as raised:
            call()
        assert "s3cr3t" not in str(raised.value)
