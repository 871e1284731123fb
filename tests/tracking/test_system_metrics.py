"""The load of the machine as metrics of a run: samples wait for the server, and none is lost or sent twice."""

from collections.abc import Sequence

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from flows.tracking import system_metrics
from flows.tracking.client import tracking_uri
from flows.tracking.system_metrics import SystemMetrics
from tests.services.curricula import Recorded
from tests.services.platform import until
from tests.tracking.conftest import client


class Failing(MlflowClient):
    """A client whose server goes away after some requests."""

    def __init__(self, uri: str, accepted: int) -> None:
        super().__init__(uri)
        self.accepted = accepted

    def log_batch(self, run_id: str, metrics: Sequence[Metric] = (), **_: object) -> None:  # type: ignore[override]
        if not self.accepted:
            raise ConnectionError("away")
        self.accepted -= 1
        super().log_batch(run_id, metrics=metrics)


def test_samples_wait_for_the_server_and_each_arrives_once(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "BATCH", 3)
    uri, found = tracking_uri(recorded.store), client(recorded.store)
    run_id = found.create_run(found.create_experiment("load")).info.run_id
    load = SystemMetrics(run_id, uri)
    load.sampling_interval = 0.05
    load.start()
    until(lambda: len({metric.step for metric in load.waiting}) >= 3, "samples are taken", 60)
    load.finish()
    taken = list(load.waiting)
    with pytest.raises(ConnectionError):
        load.send(Failing(uri, 1))
    assert load.waiting == taken[3:]  # what was accepted is not sent again
    load.send(found)
    assert load.waiting == []
    for key in ("system/cpu_utilization_percentage", "system/system_memory_usage_percentage"):
        sent = sorted((metric.step, metric.value) for metric in found.get_metric_history(run_id, key))
        assert sent == [(metric.step, metric.value) for metric in taken if metric.key == key]
        assert [step for step, _ in sent] == list(range(len(sent))) and 0 <= sent[0][1] <= 100
    before = len(taken)
    assert len(load.waiting) == 0 and before == len({(metric.key, metric.step) for metric in taken})
