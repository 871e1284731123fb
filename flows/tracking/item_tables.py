"""Scores of each item of an evaluation as tables that MLflow's UI shows and compares between runs."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq
from mlflow import MlflowClient

from vectorclm.evaluation.item_scores import ITEMS, TEXTS
from vectorclm.store.artifact import Artifact

ROWS = 20_000  # of a table; its run has a tag with the number of rows that were left out
QUESTIONS, DOCUMENTS, ANSWERS = "questions.json", "texts.json", "answers.json"


def log_item_tables(client: MlflowClient, run_id: str, scores: Artifact) -> None:
    """Log the tables of an evaluation on a run: questions, held-out texts and sampled answers. Repeating it is safe."""
    logged = {item.path for item in client.list_artifacts(run_id)}
    for name, columns in _tables(scores).items():
        rows = len(next(iter(columns.values()), ()))
        if not rows or name in logged:  # MLflow would append the rows again
            continue
        client.log_table(run_id, {key: values[:ROWS] for key, values in columns.items()}, name)
        if rows > ROWS:
            client.set_tag(run_id, f"rows left out of {name}", str(rows - ROWS))


def _tables(scores: Artifact) -> dict[str, Mapping[str, list[Any]]]:
    """The columns of each table by file name."""
    samples = scores.summary.get("samples", [])
    found: dict[str, Mapping[str, list[Any]]] = {
        ANSWERS: {key: [sample[key] for sample in samples] for key in ("prompt", "answer")}
    }
    if not {ITEMS, TEXTS} <= set(scores.manifest.get("files", ())):  # of an earlier version
        return found
    folder = scores.local("*.parquet", remembered=True)
    items = pq.read_table(folder / ITEMS).to_pydict()
    items["log_likelihoods"] = [None if item is None else json.dumps(item) for item in items["log_likelihoods"]]
    texts = pq.read_table(folder / TEXTS).to_pydict()
    bits = [nats / math.log(2) / max(1, size) for nats, size in zip(texts.pop("nats"), texts["bytes"], strict=True)]
    return {**found, QUESTIONS: items, DOCUMENTS: {**texts, "bits_per_byte": bits}}
