"""The curriculum as a Prefect flow, tracked in MLflow. The core, `vectorclm`, knows neither."""

import os

# Before MLflow is imported: it asks the environment once, and an unreachable server must cost little.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for results
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
