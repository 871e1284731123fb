"""Models are looked up in MLflow if there is one, and the reason is given if there is none."""

from pathlib import Path

import pytest

from flows.tracking.lookup import has_record, opened
from flows.tracking.lookup import recorded as looked_up
from tests.services.curricula import Recorded
from vectorclm.store.artifact import Store


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
