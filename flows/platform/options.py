"""The command-line options that name a platform."""

import os
from dataclasses import dataclass, replace
from typing import Annotated

from cyclopts import Parameter

from flows.platform.config import PlatformConfig, read_platform
from vectorclm.command_line import LOCAL_STORE, STORE, EnvFile


@Parameter(name="*")
@dataclass(frozen=True)
class PlatformOptions:
    """The options that name a platform."""

    # None, and not the default itself, which would override the file.
    store: Annotated[str | None, STORE, Parameter(show_default=lambda _: LOCAL_STORE)] = None
    env_file: EnvFile = None
    prefect_port: Annotated[int | None, Parameter(help="Port of Prefect's server [default: 4200]")] = None
    mlflow_port: Annotated[int | None, Parameter(help="Port of MLflow's server [default: 5000]")] = None

    def config(self) -> PlatformConfig:
        """Read the platform's settings; options override the environment, which overrides the file."""
        ports = {"prefect_port": self.prefect_port, "mlflow_port": self.mlflow_port}
        return read_platform(self.env_file, vectorclm_store=self.store, **ports)

    @property
    def is_given(self) -> bool:
        """Whether the command line names a platform; VECTORCLM_STORE alone does not, as a container has it, too."""
        others = replace(self, store=None) != PlatformOptions()
        return others or self.store not in (None, os.environ.get("VECTORCLM_STORE"))
