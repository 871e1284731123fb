"""The whole mission: raw text becomes an evaluated, instruction-tuned model."""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture

from flows.execution.stage_tasks import Stages
from flows.handle import Handle
from vectorclm.config import ExperimentConfig
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import TABLE


@flow(name="curriculum", flow_run_name="{experiment.name}", persist_result=False)
def curriculum(
    experiment: ExperimentConfig, runtime: Runtime, store: str, data: str | None = None, again_from: str | None = None
) -> dict[str, Handle]:
    """Make every artifact of a pinned experiment, or find it made: what each stage gave, by name.

    A stage starts when those named after it are done. Raises StageFailedError naming the first stage that
    failed; what was finished stays, and the next run reuses it. The stage `again_from` and all that is made from it
    are made again beside their artifacts, and must come out the same.
    """
    with Stages(experiment, runtime, store, Path(data) if data else None, again_from) as stage:
        submitted: dict[str, PrefectFuture[Any]] = {}
        for row in TABLE:  # inputs come before what reads them
            inputs = (*row.inputs, *row.optional_inputs(experiment))
            submitted[row.name] = stage(row.name, *(submitted[name] for name in inputs))
        return stage.handles()
