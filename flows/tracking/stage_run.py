"""The MLflow run of one stage: its settings and inputs, its live metrics, and its artifact."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, LoggedModelOutput, Metric, RunTag

from flows.tracking.catalog import Catalog
from flows.tracking.client import BATCH, EVENT_LENGTH, VALUE_LENGTH, NotOpenError, numbers, readable
from flows.tracking.datasets import dataset_of, measured_on, named
from flows.tracking.item_tables import log_item_tables
from flows.tracking.session import Session
from flows.tracking.system_metrics import SystemMetrics
from flows.tracking.versions import Versions
from vectorclm.errors import StoreError
from vectorclm.stages import EVALUATED, MODELS, READS
from vectorclm.store.artifact import Artifact

METRICS = "metrics.jsonl"
TAIL = 400  # bytes before the read position, which show whether the file was rewritten


class StageRun:
    """The nested run of a stage that is being built. All methods but `finished` run in the tracker's thread."""

    def __init__(self, session: Session, catalog: Catalog, name: str, folder: Path | None) -> None:
        self.session, self.catalog, self.name, self.folder = (
            session,
            catalog,
            name,
            folder,
        )  # the folder of its work; None if the stage was built before
        self.artifact: Artifact | None = None
        self._key, self._run_id = session.new_key(), ""
        self._found = self._checkpoint()  # read now: when MLflow answers there may be a newer one
        self._begun = False  # whether this machine builds the stage
        self._sent: set[tuple[str, int]] = set()
        self._seen: dict[tuple[str, int], int] = {}  # time of each, so that a repeated request is the same
        self._read, self._tail = 0, b""  # the read position in the file, and the bytes before it
        self._ended = 0
        self._load: SystemMetrics | None = None
        self._events: dict[int, Mapping[str, Any]] = {}  # step -> its line in the metrics

    def finished(self, artifact: Artifact) -> None:
        """Set the artifact that the stage has built."""
        self.artifact = artifact

    def open(self, attempt: int) -> None:
        """Create the run and log its settings and inputs."""
        session = self.session
        if not self._run_id:  # else MLflow went away half-way, and this is a repetition
            tags = {"state": "building", "attempt": str(max(attempt, 1 + session.attempts(self.name)))}
            if self._found:
                tags["resumed_step"] = str(int(self._found.split("-")[1]))
            self._run_id = session.create_run(self._key, self.name, tags)
        session.log_params(self._run_id, session.plans[self.name].config)
        self.catalog.log_inputs(self.name)
        if self.folder is not None:
            self._load = SystemMetrics(self._run_id, session.uri)
            self._load.start()

    def relay(self) -> None:
        """Send what is new: the load of the machine, and the metrics in the work folder.

        The metrics file may be missing, or cut back to a checkpoint.
        """
        if self._load is not None:
            self._load.send(self.session.client)
        self._begun = self._begun or self.session.begins(self.name, self._run_id)
        if (metrics := self._newest()) is None:
            return
        with metrics.open("rb") as file:
            file.seek(self._read - len(self._tail))
            if file.read(len(self._tail)) != self._tail:  # the file was cut back to a checkpoint, and grew again
                self._read, self._tail = file.seek(0), b""
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # without an unfinished last line
        self._send(whole.decode())
        self._read, self._tail = self._read + len(whole), (self._tail + whole)[-TAIL:]

    def _newest(self) -> Path | None:
        """The metrics file of the current attempt: each attempt has a folder of its own."""
        found = list[tuple[float, Path]]()
        for path in () if self.folder is None else (self.folder / METRICS, *self.folder.glob(f"*/{METRICS}")):
            with suppress(OSError):  # the attempt ended meanwhile
                found.append((path.stat().st_mtime, path))
        return max(found)[1] if found else None

    def _send(self, text: str, model_id: str | None = None) -> None:
        if not self._run_id:
            raise NotOpenError(self.name)
        now, batch, kinds = int(time.time() * 1000), list[Metric](), set[tuple[str, int]]()
        for line in text.splitlines():
            values = json.loads(line)
            kind = (next((kind for kind in ("validation", "event") if kind in values), "train"), int(values["step"]))
            if kind not in self._sent:
                if kind[0] == "event":
                    self._tell(values)
                kinds.add(kind)
                when = self._seen.setdefault(kind, now)
                batch += [Metric(key, value, when, kind[1], model_id) for key, value in readable(values).items()]
            if len(batch) >= BATCH:
                self._flush(batch, kinds)
        self._flush(batch, kinds)

    def _tell(self, line: Mapping[str, Any]) -> None:
        """Tag this run and the curriculum's run with a training event, and log all events as a file."""
        session, event, step = self.session, line["event"], line["step"]
        self._events[step] = line
        text = f"{event['kind'].replace('_', ' ')}: {event['told']}; windows {event['windows']}"[:EVENT_LENGTH]
        session.client.set_tag(self._run_id, f"event.step {step}", text)
        session.client.set_tag(session.parent_id, f"event.{self.name} step {step}", text)
        lines = "".join(json.dumps(line) + "\n" for line in self._events.values())
        session.client.log_text(self._run_id, lines, "events.jsonl")

    def _flush(self, batch: list[Metric], kinds: set[tuple[str, int]]) -> None:
        if batch:
            self.session.client.log_batch(self._run_id, metrics=batch)
            self._sent |= kinds
            batch.clear()
            kinds.clear()

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """Complete the run from the artifact, and set its final status."""
        self._ended = self._ended or int(time.time() * 1000)
        if self._load is not None:
            self._load.finish()
        if not self._run_id:
            raise NotOpenError(self.name)
        try:
            if self._load is not None:
                self._load.send(self.session.client)
            if self.artifact is not None:
                self._complete(self.artifact)
            else:
                self.relay()
                if kept := self._checkpoint():
                    tags = {**tags, "last_checkpoint": self.session.store.uri_of(f"{self._checkpoints}/{kept}")}
            tags = {"state": "built" if self.artifact is not None else "failed", **tags}
            self.session.client.log_batch(
                self._run_id, tags=[RunTag(key, value[:VALUE_LENGTH]) for key, value in tags.items()]
            )
        finally:
            self.session.client.set_terminated(self._run_id, status)
        if self.artifact is not None:
            self.session.end_attempts(self.name, self._run_id)

    def _checkpoint(self) -> str:
        """The name of the newest checkpoint of a training; empty without one."""
        if self.name not in READS or self.folder is None:
            return ""
        with suppress(StoreError):  # the training reports it
            return next(reversed(self.session.store.list(self._checkpoints)), "")
        return ""

    @property
    def _checkpoints(self) -> str:
        return f"checkpoints/{self.session.plans[self.name].fingerprint}"

    def _complete(self, artifact: Artifact) -> None:
        session, name = self.session, self.name
        client = session.client
        model_id = self.catalog.model_id(name, artifact) if name in MODELS else None
        if model_id is not None:
            client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step=artifact.summary.get("steps", 0))])
        made_on = artifact.manifest["environment"]
        about = {"uri": artifact.uri, **{key: str(made_on.get(key)) for key in ("device", "world_size")}}
        client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in about.items()])
        if "metrics.jsonl" in artifact.manifest["files"]:
            kept = session.store.read(artifact.key("metrics.jsonl")) or b""
            self._send(kept.decode())
        if "samples.jsonl" in artifact.manifest["files"]:
            samples = session.store.read(artifact.key("samples.jsonl")) or b""
            client.log_text(self._run_id, samples.decode(), "samples.jsonl")
        client.log_dict(self._run_id, dict(artifact.manifest), "manifest.json")
        if name in EVALUATED:
            self._scores(artifact)
        elif name not in READS:
            self._log(numbers(artifact.summary))
        else:
            dataset = self.catalog.dataset(READS[name])
            figures = readable({"validation": artifact.summary["validation"], "step": 0})
            self._log({f"final_{key}": value for key, value in figures.items()}, model_id, dataset)
        versions = Versions(self.catalog)
        versions.describe(self._run_id, name)
        self.catalog.show(name, artifact)
        versions.register_models(name)

    def _scores(self, artifact: Artifact) -> None:
        """Log the scores on this run, on their model, and the most important ones on the curriculum's run.

        Each score names the data that it was measured on.
        """
        session = self.session
        model_id = self.catalog.model_id(EVALUATED[self.name])
        data = measured_on(artifact, session.store, f"{session.experiment.name} ")
        scores = numbers(artifact.summary)
        metrics = [
            Metric(key, value, self._ended, 0, model_id, *named(dataset_of(key, data))) for key, value in scores.items()
        ]
        session.client.log_batch(self._run_id, metrics=metrics[:BATCH])
        log_item_tables(session.client, self._run_id, artifact)
        session.log_headline_metrics(self.name, artifact)

    def _log(self, figures: Mapping[str, float], model_id: str | None = None, dataset: Dataset | None = None) -> None:
        batch = [Metric(key, value, self._ended, 0, model_id, *named(dataset)) for key, value in figures.items()]
        self.session.client.log_batch(self._run_id, metrics=batch[:BATCH])
