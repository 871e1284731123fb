"""`vectorclm run --on-platform`: start an experiment on the platform of a store, as its form does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.platform.config import read_platform
from flows.platform.ownership import remembered
from flows.platform.prefect_server import platform_server
from vectorclm.command_line import Place
from vectorclm.config import assignments
from vectorclm.runtime.devices import Runtime


def submit(named: str, place: Place, settings: Sequence[str], runtime: Runtime, *, dry_run: bool) -> str:
    """Start the experiment of a name, or of a file in the platform's folder; returns the page of the run.

    The platform is the one of PREFECT_API_URL, else the one that `up` started with this store. Raises ConfigError where
    the platform has no such experiment or refuses a setting, and VectorCLMError where it does not run.
    """
    parameters: dict[str, Any] = {
        "settings": assignments(settings),
        "data": str(place.data.absolute()) if place.data is not None else "",
        "runtime": runtime.model_dump(exclude_defaults=True),
        "dry_run": dry_run,
    }
    name = Path(named).stem if named.endswith((".toml", ".json")) else named
    config = remembered(read_platform(None, vectorclm_store=place.store))
    with platform_server(config, is_named=False) as page:
        from flows.platform.retry import start  # Prefect reads the environment when it is imported

        return f"{page}/runs/flow-run/{start(name, parameters)}"
