"""MLflow's address, names and formats: flat parameters, metrics of a line of `metrics.jsonl`, pages of runs."""

import os
from collections.abc import Mapping
from typing import Any

from flows.net import without_password
from flows.paths import local_folder
from vectorclm.errors import VectorCLMError
from vectorclm.stages import MODELS
from vectorclm.store.artifact import Store

NOTE = "mlflow.note.content"  # the tag with the description of a run or an experiment
STORE = "store"  # the tag of a run with the address of the store that its artifacts are in
ALIAS = "candidate"
CHAMPION = "champion"
REGISTERED = {stage: f"vectorclm-{model}" for stage, model in MODELS.items()}


class RegistryError(VectorCLMError):
    """MLflow does not answer, or cannot be used; the message says what to do."""


class NotOpenError(Exception):
    """A job's run is not open, because MLflow did not accept it."""


def tracking_uri(store: Store) -> str:
    """MLFLOW_TRACKING_URI, else the SQLite database in the local folder of the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local_folder(store) / 'mlflow.db'}"


VALUE_LENGTH = 500  # of a parameter or tag, in every version of MLflow's servers
EVENT_LENGTH = 5000  # of a tag, in every version of MLflow from 2.0 on
BATCH = 900  # metrics in one request; MLflow takes 1,000


TRAINING_VIEW = "?workflowType=machine_learning"  # MLflow's view for training, not for prompts
EXPERIMENTS_PAGE = f"#/experiments{TRAINING_VIEW}"
MLFLOW_PAGE = "VECTORCLM_MLFLOW_URL"  # the variable with the address of MLflow's pages in a browser


def page_url(uri: str, path: str) -> str:
    """The address of a page of MLflow in a browser, which behind a proxy is not the address that programs use."""
    return f"{without_password(os.environ.get(MLFLOW_PAGE) or uri).rstrip('/')}/{path}"


def run_page(experiment_id: str, run_id: str) -> str:
    """The path of a run's page in MLflow's UI, in the view for machine learning, not for prompts."""
    return f"#/experiments/{experiment_id}/runs/{run_id}{TRAINING_VIEW}"


def readable(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of `metrics.jsonl` as MLflow metrics: `train/loss`, `validation/bits_per_byte.web`, `event/spike`, …"""
    if "event" in line:
        return {f"event/{line['event']['kind']}": 1.0}
    if "validation" in line:
        return {
            f"validation/{figure}.{label}": float(value)
            for label, figures in line["validation"].items()
            for figure, value in figures.items()
        }
    return {f"train/{key}": float(value) for key, value in line.items() if key != "step"}


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers in nested mappings, their keys joined by dots."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: keys like `a.b.0.c`, values cut to VALUE_LENGTH."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = str(value)[:VALUE_LENGTH]
    return found
