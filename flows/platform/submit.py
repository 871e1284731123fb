"""`vectorclm run --on-platform`: start an experiment on the platform of a store, as its form does."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.net import has_own_server
from flows.platform.config import read_platform
from flows.platform.doctor import point_at
from flows.platform.ownership import remembered


def submit(named: str, store: str, parameters: Mapping[str, Any]) -> str:
    """Start the experiment of a name, or of a file in the platform's folder; returns the page of the run.

    The platform is the one of PREFECT_API_URL, else the one that `up` started with this store. Raises ConfigError where
    the platform has no such experiment or refuses a setting, and VectorCLMError where it does not run.
    """
    if not has_own_server():
        point_at(remembered(read_platform(None, vectorclm_store=store)))
    from flows.platform.retry import start  # Prefect reads the environment when it is imported

    name = Path(named).stem if named.endswith((".toml", ".json")) else named
    place = os.environ["PREFECT_API_URL"].rstrip("/").removesuffix("/api")
    return f"{place}/runs/flow-run/{start(name, parameters)}"
