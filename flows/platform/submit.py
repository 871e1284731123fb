"""`vectorclm run --on-platform`: start an experiment on the platform of a store, as its form does."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.net import has_own_server, without_password
from flows.platform.config import read_platform
from flows.platform.doctor import point_at
from flows.platform.ownership import remembered
from vectorclm.command_line import Place
from vectorclm.config import assignments
from vectorclm.runtime.devices import Runtime


def submit(named: str, place: Place, settings: Sequence[str], runtime: Runtime, *, dry_run: bool) -> str:
    """Start the experiment of a name, or of a file in the platform's folder; returns the page of the run.

    The platform is the one of PREFECT_API_URL, else the one that `up` started with this store. Raises ConfigError where
    the platform has no such experiment or refuses a setting, and VectorCLMError where it does not run.
    """
    if not has_own_server():
        point_at(remembered(read_platform(None, vectorclm_store=place.store)))
    from flows.platform.retry import start  # Prefect reads the environment when it is imported

    parameters: dict[str, Any] = {
        "settings": assignments(settings),
        "data": str(place.data.absolute()) if place.data is not None else "",
        "runtime": runtime.model_dump(exclude_defaults=True),
        "dry_run": dry_run,
    }
    name = Path(named).stem if named.endswith((".toml", ".json")) else named
    page = without_password(os.environ["PREFECT_API_URL"]).rstrip("/").removesuffix("/api")
    return f"{page}/runs/flow-run/{start(name, parameters)}"
