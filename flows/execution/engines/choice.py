"""Choose the engine of a training: a row for each engine of more than one machine."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.execution.engines import ray_cluster, srun
from flows.execution.engines.node import RUNTIME
from vectorclm.runtime.devices import Runtime

ENGINES = {"srun": srun, "ray": ray_cluster}


def check_engine(runtime: Runtime) -> None:
    """Raise ConfigError where the engine of these settings cannot start nodes from this process."""
    if runtime.engine in ENGINES:
        ENGINES[runtime.engine].check(runtime)


def on_nodes(runtime: Runtime, stage: Sequence[str], experiment: Path) -> list[str]:
    """The command that trains on the nodes of the runtime's engine.

    `stage` is the command of one rank, without Python. Every node gets a copy of `experiment` and the runtime settings
    in the folder where it runs `stage`, so the nodes need to share nothing but the store.
    """
    files = {experiment.name: experiment.read_text(encoding="utf-8"), RUNTIME: runtime.model_dump_json()}
    job = experiment.with_name("job.json")
    job.write_text(json.dumps({"stage": list(stage), "files": files}), encoding="utf-8")
    return [sys.executable, "-m", ENGINES[runtime.engine].__name__, str(job)]


def with_workers(runtime: Runtime, stage: Sequence[str]) -> list[str]:
    """The command that builds a data set with workers on the machines of the runtime's engine."""
    return [sys.executable, "-m", ENGINES[runtime.engine].__name__, *stage[2:]]
