"""Prefect flows around the core package `vectorclm`, tracked in MLflow.

In: an experiment.
Out: its stages as Prefect tasks, its record in MLflow, and the command `vectorclm`.
"""

import os

# MLflow reads the environment once, at import. An unreachable server must cost little time.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for results
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
