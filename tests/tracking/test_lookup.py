"""Models are looked up in MLflow if there is one, and the reason is given if there is none."""

from pathlib import Path

import pytest

from flows.tracking.lookup import has_record, named_model, opened
from flows.tracking.lookup import recorded as looked_up
from flows.tracking.registry import Registry
from tests.services.curricula import Recorded
from vectorclm.errors import ConfigError, StoreError
from vectorclm.store.artifact import Store
from vectorclm.store.model_names import UnknownModelError


def test_a_model_is_opened_by_its_address_and_by_its_registered_name(recorded: Recorded) -> None:
    by_place = opened(recorded.handles["finetune"]["uri"], recorded.store)
    assert opened("models:/vectorclm-chat@candidate", recorded.store).root.names == by_place.root.names


def test_without_mlflow_the_reason_is_given(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(recorded.handles["finetune"]["uri"], recorded.store)
    assert has_record(recorded.store) and not has_record(Store(str(tmp_path)))
    record, why = looked_up(found, recorded.store)
    assert record is not None and why == "" and record.names == found.root.names
    assert looked_up(found, Store(str(tmp_path))) == (None, "no MLflow: set MLFLOW_TRACKING_URI for links to its runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    record, why = looked_up(found, recorded.store)
    assert record is None and "http://127.0.0.1:9 does not answer" in why


def test_a_registered_name_means_the_champion_or_else_the_candidate(recorded: Recorded) -> None:
    base, other = recorded.handles["pretrain"]["uri"], recorded.handles["finetune"]["uri"]
    for name in ("vectorclm-base", "vectorclm-base@candidate", "vectorclm-base/1", "models:/vectorclm-base/1"):
        assert named_model(name, recorded.store) == base
    registry = Registry(recorded.store)
    made = registry.client.create_model_version("vectorclm-base", "file:///x", tags={"uri": other})
    registry.client.set_registered_model_alias("vectorclm-base", "champion", made.version)
    try:
        assert named_model("vectorclm-base", recorded.store) == other
        assert named_model("vectorclm-base@candidate", recorded.store) == base
        registry.client.set_model_version_tag("vectorclm-base", made.version, "uri", "file:///elsewhere")
        with pytest.raises(ConfigError, match=f"vectorclm-base {made.version}: its tags name no artifact"):
            named_model("vectorclm-base", recorded.store)  # the candidate is another model
    finally:
        registry.client.delete_registered_model_alias("vectorclm-base", "champion")
        registry.client.delete_model_version("vectorclm-base", made.version)


def test_a_name_that_nobody_knows_is_told_and_makes_nothing(recorded: Recorded, tmp_path: Path) -> None:
    for name in ("vectorclm-nothing", "vectorclm-base@nobody", "not a name"):
        with pytest.raises(UnknownModelError):
            named_model(name, recorded.store)
    (tmp_path / "store" / "sample").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no record in MLflow; name a server with MLFLOW_TRACKING_URI"):
        named_model("models:/vectorclm-base@candidate", Store(str(tmp_path / "store")))
    with pytest.raises((ConfigError, StoreError), match="there is no store at"):
        named_model("models:/vectorclm-base@candidate", Store(str(tmp_path / "nowhere")))
    assert [path.name for path in tmp_path.rglob("*")] == ["store", "sample"]
