"""Artifacts, sources and benchmarks as MLflow data sets, and the data set that each score was measured on."""

import json
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Dataset

from vectorclm.stages import TABLE
from vectorclm.store.artifact import Artifact, Store

DIGEST_LENGTH = 36  # of a data set
PROFILE_LENGTH = 16_000  # of a data set
COLUMNS: dict[str, Mapping[str, str]] = {
    stage.name: stage.columns for stage in TABLE if stage.columns is not None
}  # of data sets
TEXTS = ("text.", "bits_per_byte.", "loss.")  # scores of held-out text begin with these
CONVERSATIONS = "chat."  # scores of held-out conversations begin with this


def artifact_dataset(artifact: Artifact, name: str) -> Dataset:
    """The artifact of a data stage as a data set, with its columns and its summary."""
    store = artifact.store
    columns = COLUMNS[artifact.stage]
    return Dataset(
        name,
        artifact.fingerprint[:DIGEST_LENGTH],
        "local" if store.is_local else store.uri.partition(":")[0],
        json.dumps({"uri": artifact.uri, "sha256": artifact.identity}),
        schema=json.dumps({"mlflow_colspec": [{"name": key, "type": kind} for key, kind in columns.items()]}),
        profile=json.dumps(artifact.summary)[:PROFILE_LENGTH],
    )


def source_dataset(source: Mapping[str, Any]) -> Dataset:
    """A source or a benchmark at its revision as a data set, from its settings or from what a manifest keeps of them.

    The digest is the revision: a commit of the hub, or the SHA-256 of the content.
    """
    revision = source.get("revision") or "none"
    place = {
        "path": source.get("path") or source["label"],
        "config_name": source.get("name"),
        "split": source.get("split"),
        "revision": revision,
    }
    kind = "local" if revision.startswith("sha256:") else "hugging_face"
    digest = revision.removeprefix("sha256:")[:DIGEST_LENGTH]
    return Dataset(source["label"], digest, kind, json.dumps(place), profile=json.dumps(dict(source)))


def measured_on(artifact: Artifact, store: Store, prefix: str) -> dict[str, Dataset]:
    """The data sets of an evaluation by the beginning of its scores' names: `tasks.world.`, `text.`, `chat.`.

    `prefix` precedes the names of data sets that are artifacts of the store.
    """
    config = artifact.manifest["config"]
    found = {}
    for task in config.get("tasks", ()):
        for score in (f"tasks.{task['label']}.", f"acc.{task['label']}", f"acc_norm.{task['label']}"):
            found[score] = source_dataset(task)
    read = {**artifact.manifest["inputs"], **config.get("data", {})}
    texts = "shards" if "shards" in read else "sample"
    for stage, scores in ((texts, TEXTS), ("chat_shards", (CONVERSATIONS,))):
        if stage in read and (data := store.look_up(stage, read[stage])) is not None:
            found |= dict.fromkeys(scores, artifact_dataset(data, f"{prefix}{stage}"))
    return found


def dataset_of(score: str, found: Mapping[str, Dataset]) -> Dataset | None:
    """The data set that a score was measured on, among those of `measured_on`; None for a score of none of them."""
    return next((data for start, data in found.items() if score.startswith(start)), None)


def named(data: Dataset | None) -> tuple[str | None, str | None]:
    """Name and digest of a data set, as MLflow's metrics refer to it."""
    return (None, None) if data is None else (data.name, data.digest)
