"""The nested run of one stage: its settings and inputs, its live metrics, and what it made."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import Dataset, LoggedModelOutput, Metric, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from flows.catalog import MODELS
from flows.figures import VALUE_LENGTH, numbers, readable
from vectorclm.artifact import Artifact
from vectorclm.stages import EVALUATED, TRAININGS

if TYPE_CHECKING:
    from flows.tracking import Tracker

TAIL = 400  # bytes of a file by which it is known again
BATCH = 900  # metrics in one request; MLflow takes 1,000


class NotOpenError(Exception):
    """MLflow did not take the run that a job belongs to."""


class StageRun:
    """The nested run of a stage in the making. All but `finished` happens in the tracker's thread."""

    def __init__(self, tracker: "Tracker", name: str, metrics: Path | None) -> None:
        self.tracker, self.name, self.metrics = tracker, name, metrics  # without a file it was made before
        self.artifact: Artifact | None = None
        self._run_id = ""
        self._sent: set[tuple[str, int]] = set()
        self._seen: dict[tuple[str, int], int] = {}  # when, so that what is sent again is the same
        self._read, self._tail = 0, b""  # how far the file was read, and what it ended with there
        self._ended = 0
        self._monitor: Any = None

    def finished(self, artifact: Artifact) -> None:
        """The stage has made this."""
        self.artifact = artifact

    def open(self, attempt: int) -> None:
        """Create the run, with its settings and what it is made from."""
        tracker, plan = self.tracker, self.tracker.plans[self.name]
        if not self._run_id:  # else MLflow went away half-way through this
            tags = {"state": "building", "attempt": str(attempt)}
            if self.name in TRAININGS and (saved := tracker.store.list(f"checkpoints/{plan.fingerprint}")):
                tags["resumed_step"] = str(int(saved[-1].rpartition("-")[2]))
            self._run_id = tracker.create_run(self.name, tags)
        tracker.log_params(self._run_id, plan.config)
        tracker.catalog.log_inputs(self.name)
        if self.metrics is not None:
            monitor: Any = SystemMetricsMonitor  # MLflow's is untyped
            self._monitor = monitor(self._run_id, sampling_interval=5, tracking_uri=tracker.uri)
            self._monitor.start()
            tracker.active.append(self)

    def relay(self) -> None:
        """Send the work folder's metrics that were not sent yet; the file may be missing, or cut back."""
        if self.metrics is None or not self.metrics.is_file():
            return
        with self.metrics.open("rb") as file:
            file.seek(self._read - len(self._tail))
            if file.read(len(self._tail)) != self._tail:  # it was cut back to a checkpoint, and grew again
                self._read, self._tail = file.seek(0), b""
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # without a line that is still being written
        self._send(whole.decode())
        self._read, self._tail = self._read + len(whole), (self._tail + whole)[-TAIL:]

    def _send(self, text: str, model_id: str | None = None) -> None:
        if not self._run_id:
            raise NotOpenError(self.name)
        now, batch, kinds = int(time.time() * 1000), list[Metric](), set[tuple[str, int]]()
        for line in text.splitlines():
            values = json.loads(line)
            kind = ("validation" if "validation" in values else "train", int(values["step"]))
            if kind not in self._sent:
                kinds.add(kind)
                when = self._seen.setdefault(kind, now)
                batch += [Metric(key, value, when, kind[1], model_id) for key, value in readable(values).items()]
            if len(batch) >= BATCH:
                self._flush(batch, kinds)
        self._flush(batch, kinds)

    def _flush(self, batch: list[Metric], kinds: set[tuple[str, int]]) -> None:
        if batch:
            self.tracker.client.log_batch(self._run_id, metrics=batch)
            self._sent |= kinds
            batch.clear()
            kinds.clear()

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """Complete the run from the artifact, and end it."""
        if self in self.tracker.active:
            self.tracker.active.remove(self)
        self._ended = self._ended or int(time.time() * 1000)
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if not self._run_id:
            raise NotOpenError(self.name)
        try:
            if self.artifact is not None:
                self._complete(self.artifact)
            else:
                self.relay()
            tags = {"state": "built" if self.artifact is not None else "failed", **tags}
            self.tracker.client.log_batch(
                self._run_id, tags=[RunTag(key, value[:VALUE_LENGTH]) for key, value in tags.items()]
            )
        finally:
            self.tracker.client.set_terminated(self._run_id, status)
        if self.artifact is not None:
            self.tracker.end_attempts(self.name, self._run_id)

    def _complete(self, artifact: Artifact) -> None:
        tracker, name = self.tracker, self.name
        client = tracker.client
        model_id = tracker.catalog.model_id(name, artifact) if name in MODELS else None
        if model_id is not None:
            client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step=artifact.summary.get("steps", 0))])
        made_on = artifact.manifest["environment"]
        about = {"uri": artifact.uri, **{key: str(made_on.get(key)) for key in ("device", "world_size")}}
        client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in about.items()])
        if "metrics.jsonl" in artifact.manifest["files"]:
            kept = tracker.store.read(f"{artifact.stage}/{artifact.fingerprint}/metrics.jsonl") or b""
            self._send(kept.decode())
        if "samples.jsonl" in artifact.manifest["files"]:
            said = tracker.store.read(f"{artifact.stage}/{artifact.fingerprint}/samples.jsonl") or b""
            client.log_text(self._run_id, said.decode(), "samples.jsonl")
        client.log_dict(self._run_id, dict(artifact.manifest), "manifest.json")
        if name in EVALUATED:
            self._scores(artifact)
        elif name not in TRAININGS:
            self._log(numbers(artifact.summary))
        else:
            dataset = tracker.catalog.dataset("chat_shards" if name == "finetune" else "shards")
            figures = readable({"validation": artifact.summary["validation"], "step": 0})
            self._log({f"final_{key}": value for key, value in figures.items()}, model_id, dataset)
        if name == "export":
            tracker.catalog.register_models()

    def _scores(self, artifact: Artifact) -> None:
        """The scores, on this run, on the model they are of, and at a glance on the curriculum's run."""
        tracker = self.tracker
        figures = numbers(artifact.summary)
        model_id = tracker.catalog.model_id(EVALUATED[self.name])
        self._log(figures, model_id, tracker.catalog.dataset("shards"))
        tracker.glance(self.name, figures)

    def _log(self, figures: Mapping[str, float], model_id: str | None = None, dataset: Dataset | None = None) -> None:
        linked = (model_id, dataset.name, dataset.digest) if dataset is not None else (model_id, None, None)
        batch = [Metric(key, value, self._ended, 0, *linked) for key, value in figures.items()]
        self.tracker.client.log_batch(self._run_id, metrics=batch[:BATCH])
