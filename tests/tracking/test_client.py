"""Names and formats of MLflow: flat parameters, metrics, pages, the address of a store's own database."""

from pathlib import Path

import pytest

from flows.tracking.client import REGISTERED, VALUE_LENGTH, flatten, numbers, page_url, readable, run_page, tracking_uri
from vectorclm.store.artifact import Store


def test_settings_and_scores_become_flat_keys() -> None:
    config = {
        "optimizer": {"rate": 0.5},
        "phases": [{"tokens": 3, "weights": {"a": 1}}],
        "names": ["x", "y"],
        "no": None,
    }
    assert flatten(config) == {
        "optimizer.rate": "0.5",
        "phases.0.tokens": "3",
        "phases.0.weights.a": "1",
        "names": "['x', 'y']",
    }
    assert numbers({"tasks": {"world": {"acc": 0.5, "ok": True}}, "text": "x"}) == {"tasks.world.acc": 0.5}
    assert readable({"step": 1, "tokens": 9, "loss": 2.0}) == {"train/tokens": 9.0, "train/loss": 2.0}
    events = {"step": 3, "event": {"kind": "spike"}}
    assert readable(events) == {"event/spike": 1.0}
    held_out = {"step": 3, "validation": {"web": {"loss": 2, "bits_per_byte": 1.5}}}
    assert readable(held_out) == {"validation/loss.web": 2.0, "validation/bits_per_byte.web": 1.5}
    assert len(flatten({"long": "x" * 9999})["long"]) == VALUE_LENGTH


def test_a_store_has_a_database_of_its_own_unless_a_server_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(store) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(store) == "http://tracking:5000"
    assert run_page("1", "ab") == "#/experiments/1/runs/ab?workflowType=machine_learning"
    assert REGISTERED["finetune"] == "vectorclm-chat" and REGISTERED["tokenizer"] == "vectorclm-tokenizer"


def test_links_lead_to_the_address_of_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VECTORCLM_MLFLOW_URL", raising=False)
    assert page_url("http://admin:secret@127.0.0.1:5000/", "#/models/m") == "http://127.0.0.1:5000/#/models/m"
    monkeypatch.setenv("VECTORCLM_MLFLOW_URL", "https://mlflow.example.org/")
    assert page_url("http://mlflow:5000", "#/models/m") == "https://mlflow.example.org/#/models/m"
