"""The lineage that MLflow recorded is that of the store, with the runs and versions of each artifact."""

from collections.abc import Sequence
from typing import Any

import pytest
from mlflow.entities import Run

from flows.tracking.recorded_lineage import record_of, registered_names
from flows.tracking.registry import Registry
from tests.services.curricula import Recorded
from vectorclm.lineage.chain import Lineage, Node, lineage


def test_mlflow_alone_tells_the_lineage_of_the_store(recorded: Recorded) -> None:
    registry = Registry(recorded.store)
    for name, stage in (("chat", "finetune"), ("base", "pretrain"), ("tokenizer", "tokenizer")):
        by_store = lineage(recorded.handles[stage]["uri"], recorded.store).root.names
        assert registered_names(registry, f"models:/vectorclm-{name}@candidate") == by_store


def test_the_record_names_runs_and_versions(recorded: Recorded) -> None:
    registry, handles = Registry(recorded.store), recorded.handles
    found = lineage(handles["finetune"]["uri"], recorded.store)
    record = record_of(registry, found)
    assert record.names == found.root.names and set(record.runs) == set(found.nodes)
    assert record.versions == {
        handles["tokenizer"]["fingerprint"]: ["vectorclm-tokenizer 1 @candidate @mini"],
        handles["pretrain"]["fingerprint"]: ["vectorclm-base 1 @candidate @mini"],
        handles["finetune"]["fingerprint"]: ["vectorclm-chat 1 @candidate @mini"],
    }
    unknown = Node("finetune", "0" * 64, None)
    nothing = record_of(registry, Lineage(unknown, nodes={"0" * 64: unknown}))
    assert (nothing.runs, nothing.versions, nothing.names) == ({}, {}, None)


def test_the_run_that_built_an_artifact_is_found_behind_any_number_that_reused_it(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, handle = Registry(recorded.store), recorded.handles["finetune"]
    found, search = lineage(handle["uri"], recorded.store), registry.client.search_runs
    before = record_of(registry, found).runs
    tags = {"stage": "finetune", "fingerprint": handle["fingerprint"], "state": "reused"}
    later = [registry.client.create_run(registry.experiment_id("mini"), tags=tags).info.run_id for _ in range(3)]
    read: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Sequence[Run]:
        runs = search(*arguments, **options)
        read.append(len(runs))
        return runs

    try:
        for run_id in later:
            registry.client.set_terminated(run_id)
        monkeypatch.setattr(registry.client, "search_runs", counted)
        assert record_of(registry, found).runs == before and set(read) == {1}
    finally:
        for run_id in later:
            registry.client.delete_run(run_id)
