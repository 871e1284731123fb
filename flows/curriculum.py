"""The curriculum as a Prefect flow: all stages of an experiment, from raw text to an evaluated chat model."""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture

from flows.execution.stage_tasks import CURRICULUM, Stages
from flows.handle import Handle
from vectorclm.config import ExperimentConfig
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import stages_of


@flow(name=CURRICULUM, flow_run_name="{experiment.name}", persist_result=False)
def curriculum(
    experiment: ExperimentConfig, runtime: Runtime, store: str, data: str | None = None, again_from: str | None = None
) -> dict[str, Handle]:
    """Build or reuse every artifact of a pinned experiment; returns the handle of each stage by name.

    A stage starts when the stages of its inputs are done. The stage `again_from` and all stages that depend on it are
    rebuilt beside their artifacts and compared with them. Raises StageFailedError naming the first stage that failed;
    finished artifacts are kept, and the next run reuses them.
    """
    with Stages(experiment, runtime, store, Path(data) if data else None, again_from) as stage:
        submitted: dict[str, PrefectFuture[Any]] = {}
        for row in stages_of(experiment):  # in topological order
            submitted[row.name] = stage(row.name, *(submitted[name] for name in row.inputs_of(experiment)))
        return stage.handles()
