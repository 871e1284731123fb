"""System metrics of a stage by MLflow's monitors: load of processors, memory, disk, network and GPUs.

MLflow's own thread requests the whole run at each sample, and ends at the first request that fails. This one only
takes samples, and keeps them until the server has accepted them.
"""

import time

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from flows.tracking.client import BATCH

SAMPLE_SECONDS = 10


class SystemMetrics(SystemMetricsMonitor):
    """The load of this machine as metrics `system/…` of a run: `start`, then `send` repeatedly, then `finish`."""

    def __init__(self, run_id: str, tracking_uri: str) -> None:
        super().__init__(run_id, SAMPLE_SECONDS, tracking_uri=tracking_uri)  # type: ignore[no-untyped-call]
        self.waiting: list[Metric] = []

    def start(self) -> None:
        """Start taking samples."""
        super().start()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Stop taking samples."""
        super().finish()  # type: ignore[no-untyped-call]

    def monitor(self) -> None:
        """Take samples until `finish`; the thread's main function."""
        samples = 0
        while not self._shutdown_event.wait(self.sampling_interval):
            self.collect_metrics()  # type: ignore[no-untyped-call]
            now, found = int(time.time() * 1000), self.aggregate_metrics()  # type: ignore[no-untyped-call]
            self.waiting += [Metric(f"system/{key}", value, now, samples) for key, value in found.items()]
            for part in self.monitors:
                part.clear_metrics()  # type: ignore[no-untyped-call]
            samples += 1

    def send(self, client: MlflowClient) -> None:
        """Send the waiting samples. Raises the client's errors, and keeps the samples then."""
        while batch := self.waiting[:BATCH]:
            client.log_batch(self._run_id, metrics=batch)
            del self.waiting[: len(batch)]
