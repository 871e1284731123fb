"""Retention: for how long the platform keeps the records of Prefect and MLflow, and how large its logs become.

VECTORCLM_KEEP_RECORDS is a number of days. Prefect's server removes its old runs, with their logs and artifacts, and
its old events. Traces in MLflow are removed here. Runs in MLflow are the lineage of models, so they stay, and the store
is never touched.
"""

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from flows.platform.process import limit_log
from vectorclm.errors import ConfigError

KEEP = "VECTORCLM_KEEP_RECORDS"
TRACES_SECONDS = 3600  # between two removals of old traces, as Prefect's between two of its own


def kept_days(environment: Mapping[str, str]) -> int | None:
    """The days for which records are kept; None without the setting. Raises ConfigError for another value."""
    value = environment.get(KEEP, "")
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{KEEP}={value} is not a number of days, 1 or more")
    return int(value)


def prefect_settings(days: int | None) -> dict[str, str]:
    """The settings by which Prefect's server removes records that are older; without days, those of Prefect stay."""
    if days is None:
        return {}
    return {
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"P{days}D",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(int(timedelta(days=days).total_seconds())),
    }


class Retention:
    """Keeps the logs of a platform short, and removes old traces from MLflow."""

    def __init__(self, home: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.folder, self.days = home / "platform", kept_days(environment)
        self._next_traces = 0.0

    def look(self) -> None:
        """Look once at the logs, and once an hour at the traces."""
        for log in self.folder.glob("*.log"):
            limit_log(log)
        if self.days is not None and time.monotonic() >= self._next_traces:
            from flows.platform.mlflow_runs import delete_traces  # its client takes a tenth of a second to import

            self._next_traces = time.monotonic() + TRACES_SECONDS
            delete_traces(timedelta(days=self.days))
