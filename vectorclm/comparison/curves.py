"""Scores over training: each kept checkpoint of an experiment's trainings, measured on a suite."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vectorclm.comparison.config import Limits
from vectorclm.comparison.measurement import measure
from vectorclm.config import ExperimentConfig, Suite
from vectorclm.errors import DataError
from vectorclm.evaluation.statistics import figures
from vectorclm.export.hugging_face import write_model_files
from vectorclm.formats.parquet import read_small_table
from vectorclm.model_config import write_config
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.stages import BY_NAME, READS, plans
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.layout import CURVES, MEASURE, STEP
from vectorclm.store.model_ref import content_of, find_model
from vectorclm.store.storage import Storage

SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("step", pa.int64()),
        ("score", pa.string()),  # as `figures` names it: `acc.<task>`, `bits_per_byte.<text>`
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("uri", pa.string()),  # the whole result
    ]
)


class Point(NamedTuple):
    """A checkpoint, or the finished model of a training."""

    stage: str
    step: int
    artifact: Artifact


def points(experiment: ExperimentConfig, store: Store) -> list[Point]:
    """The checkpoints of a pinned experiment's trainings in the store, and the finished models after them.

    Raises DataError where the store has none.
    """
    found = []
    specs = plans(experiment)
    for stage in (name for name in READS if name in specs):
        spec = specs[stage]
        root = f"checkpoints/{spec.fingerprint}"
        by_step = {int(match[1]): name for name in sorted(store.list(root)) if (match := STEP.fullmatch(name))}
        for step, name in by_step.items():  # one of several attempts at a step
            if (artifact := store.find(root, name)) is not None:
                found.append(Point(stage, step, artifact))
        if (model := store.find(stage, spec.fingerprint)) is not None:
            found.append(Point(stage, int(model.summary["steps"]), model))
    if not found:
        raise DataError(
            f"{store.uri} has no checkpoint of {experiment.name}: train with keep_checkpoints = true in --runtime FILE"
        )
    return found


def measure_checkpoints(
    experiment: ExperimentConfig, suite: Suite, limits: Limits, store: Store, runtime: Runtime, data: Path | None
) -> Iterator[tuple[Point, Artifact]]:
    """Measure each point that is not measured yet, in the order of the trainings. Both configs must be pinned."""
    tokenizer = store.find("tokenizer", plans(experiment)["tokenizer"].fingerprint)
    for point in points(experiment, store):
        with temporary_folder("checkpoint-") as folder:
            if point.artifact.stage == point.stage:  # a model, with all its files
                address = point.artifact.uri
            elif tokenizer is not None:
                weights = point.artifact.local("model.safetensors") / "model.safetensors"
                (folder / "model.safetensors").symlink_to(weights.absolute())
                write_config(experiment.model, folder)
                length = experiment.model.max_position_embeddings
                write_model_files(tokenizer.local(), length, chat=BY_NAME[point.stage].model == "chat", out=folder)
                address = str(folder)
            else:
                raise DataError(f"{store.uri} has no tokenizer of {experiment.name}, which its checkpoints need")
            yield point, measure(suite, limits, find_model(address), store, runtime, data)[0]


def write_curves(measured: list[tuple[Point, Artifact]], suite: Suite, store: Store) -> str:
    """Write all scores at all points as one Parquet file into the store, and return the file's URI."""
    rows: list[dict[str, Any]] = [
        {"stage": point.stage, "step": point.step, "score": name, "uri": result.uri, **figure._asdict()}
        for point, result in measured
        for name, figure in figures(result.summary).items()
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    key = f"{CURVES}/{suite.name}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    store.write(key, content)
    return store.uri_of(key)


def curves_of(training: Artifact) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The curves of a finished training in its store: for each suite and score, the steps with their values.

    Curves belong to the training whose model is their last point; of several of one suite, the longest is taken.
    Raises DataError where a file of curves cannot be read.
    """
    store, content = training.store, content_of(training)
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name in store.list(CURVES):
        rows = [row for row in _rows(store, f"{CURVES}/{name}") if row["stage"] == training.stage]
        if not rows:
            continue
        last = max(rows, key=lambda row: int(row["step"]))
        result = store.find(MEASURE, last["uri"].rstrip("/").rpartition("/")[2])
        if result is None or result.manifest["inputs"].get("model") != content:
            continue
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in sorted(rows, key=lambda row: int(row["step"])):
            curves.setdefault(row["score"], []).append((row["step"], row["value"]))
        suite = name.rpartition("-")[0]
        found[suite] = max(found.get(suite, {}), curves, key=lambda each: sum(map(len, each.values())))
    return found


def _rows(store: Storage, key: str) -> list[dict[str, Any]]:
    try:
        table = read_small_table(store.read(key) or b"", SCHEMA, SCHEMA.names, store.uri_of(key))
    except DataError as error:
        raise DataError(f"{error}: it is not a file of curves; delete it and measure again") from error
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
