"""The scores of each item as tables of a run: complete, logged once, cut at a number of rows that is told."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.tracking import item_tables
from flows.tracking.item_tables import ANSWERS, DOCUMENTS, QUESTIONS, log_item_tables
from tests.services.curricula import Recorded
from tests.tracking.conftest import client
from vectorclm.evaluation.item_scores import ITEMS, TEXTS


def test_each_item_is_a_row_and_rows_are_logged_once(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = recorded.store.find("evaluate", recorded.handles["evaluate"]["fingerprint"])
    assert scores is not None
    found, folder = client(recorded.store), Path(scores.uri)
    place = found.create_experiment("items", (tmp_path / "files").as_uri())
    run_id = found.create_run(place).info.run_id

    def table(name: str) -> dict[str, list[object]]:
        kept = json.loads(Path(found.download_artifacts(run_id, name)).read_text())
        return {name: [row[number] for row in kept["data"]] for number, name in enumerate(kept["columns"])}

    items, texts = (pq.read_table(folder / name).to_pydict() for name in (ITEMS, TEXTS))
    monkeypatch.setattr(item_tables, "ROWS", len(items["task"]) - 1)
    for _ in range(2):  # a request that is repeated adds no row
        log_item_tables(found, run_id, scores)
    asked = table(QUESTIONS)
    assert asked["task"] == items["task"][:-1]
    assert [json.loads(str(row)) for row in asked["log_likelihoods"] if row] == [
        list(row) for row in items["log_likelihoods"][:-1] if row is not None
    ]
    assert found.get_run(run_id).data.tags[f"rows left out of {QUESTIONS}"] == "1"
    bits = [nats / math.log(2) / size for nats, size in zip(texts["nats"], texts["bytes"], strict=True)]
    assert table(DOCUMENTS)["bits_per_byte"] == [pytest.approx(bit) for bit in bits[: item_tables.ROWS]]
    assert table(ANSWERS)["prompt"] == [sample["prompt"] for sample in scores.summary["samples"]]
