"""Curricula in the queue of a platform: start many at once, and check that each was done once, in its turn."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import psutil
from mlflow import MlflowClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType

from flows.form import Changes, chosen
from flows.platform.process import Service
from tests.kill_matrix import RUNTIME, SETTINGS
from tests.services.platform import Platform, until
from tests.services.trigger import torch_processes
from vectorclm.lineage.pinning import pin
from vectorclm.stages import plans
from vectorclm.store.artifact import StageSpec, Store
from vectorclm.store.layout import STAGES


class Wanted(NamedTuple):
    """A curriculum that was queued, and what it must make."""

    run_id: UUID
    plans: Mapping[str, StageSpec]
    placement: str


@contextmanager
def second_worker(platform: Platform) -> Iterator[Service]:
    """Another worker of the pool cpu beside that of `up`, until the block ends."""
    usual = platform.config.workers()[0]
    name = usual.command[usual.command.index("--name") + 1]
    command = [f"{name}-2" if part == name else part for part in usual.command]
    worker = dataclasses.replace(usual, name="worker-cpu-2", command=command)
    worker.start()
    try:
        until(lambda: len(online(platform)) > 1, "the second worker is online", 60)
        yield worker
    finally:
        worker.stop()


def online(platform: Platform) -> list[str]:
    """The workers of the pool cpu that are online."""
    found = platform.client.read_workers_for_work_pool("cpu")
    return [worker.name for worker in found if worker.status == "ONLINE"]


def variant(number: int) -> tuple[dict[str, Any], str]:
    """The changes and the placement of curriculum `number`.

    The first is whole, the fourth changes the fine-tuning; of the others half change the evaluation, half repeat one.
    """
    group, place = divmod(number, 4)
    settings = {**SETTINGS, "finetune.epochs": 0.5} if number == 3 else SETTINGS
    more = int(place in (1, 2)) if group == 0 else (group + 1) * (place < 2)
    evaluate = {"chat_prompts": 3 + more, "max_new_tokens": 32}
    return {"seed": 5, "evaluate": evaluate, "settings": settings}, "pools" if (number + group) % 2 else "inline"


def enqueue(platform: Platform, folder: Path, numbers: Iterable[int]) -> list[Wanted]:
    """Start the curricula of these numbers at once."""
    found = []
    for number in numbers:
        changes, placement = variant(number)
        experiment, path = chosen("tiny", Changes.model_validate(changes))
        pinned, _ = pin(experiment, folder / path.name, None, resolve=True)
        runtime = {**RUNTIME, "placement": placement}
        run_id = platform.start(name=f"queued {number}", changes=changes, runtime=runtime)
        found.append(Wanted(run_id, plans(pinned), placement))
    return found


def check_order(platform: Platform, wanted: Sequence[Wanted]) -> None:
    """Each curriculum completed, was started once, and began after the one before it had ended."""
    times = [_times(platform, one.run_id) for one in wanted]
    for number, (before, after) in enumerate(pairwise(times)):
        assert before[1] <= after[0], f"curriculum {number} ended at {before[1]}, the next began at {after[0]}"


def _times(platform: Platform, run_id: UUID) -> tuple[datetime, datetime]:
    """When a run was taken by a worker and when it completed, both of which happened once."""
    states = sorted(platform.client.read_flow_run_states(run_id), key=lambda state: state.timestamp)
    names = [state.name for state in states]
    assert names.count("Pending") == 1 and names[-1] == "Completed", f"{platform.run(run_id).name}: {names}"
    assert platform.run(run_id).run_count == 1
    return states[names.index("Pending")].timestamp, states[-1].timestamp


def check_made(platform: Platform, wanted: Sequence[Wanted]) -> None:
    """Each artifact was made once: by one run of MLflow, in a pool by one run of Prefect, and its bytes are whole."""
    store, client = Store(platform.config.vectorclm_store), MlflowClient(platform.config.mlflow_url)
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    built = Counter[str]()
    for one in wanted:
        mine = f"tags.`prefect.flow_run_id` = '{one.run_id}' and tags.stage = 'curriculum'"
        (parent,) = client.search_runs([experiment.experiment_id], mine)
        children = client.search_runs(
            [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=1000
        )
        assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
        assert sorted(run.data.tags["stage"] for run in children) == sorted(STAGES)
        made = [run.data.tags["stage"] for run in children if run.data.tags["state"] == "built"]
        built.update(one.plans[stage].fingerprint for stage in made)
        expected = made if one.placement == "pools" else []
        parts = sorted((run.name, run.state_name, run.run_count) for run in parts_of(platform, one.run_id))
        assert parts == sorted((f"{stage} of tiny", "Completed", 1) for stage in expected)
    every = {(stage, plan.fingerprint) for one in wanted for stage, plan in one.plans.items()}
    assert built == Counter(fingerprint for _, fingerprint in every)
    assert {(stage, found) for stage in STAGES for found in store.list(stage)} == every
    for stage, fingerprint in every:
        artifact = store.find(stage, fingerprint)
        assert artifact is not None
        artifact.verify()


def parts_of(platform: Platform, run_id: UUID) -> list[FlowRun]:
    """The runs of the stages of a curriculum with the placement `pools`."""
    part = FlowRunFilter.model_validate({"tags": {"all_": [f"part of {run_id}"]}})
    return platform.client.read_flow_runs(flow_run_filter=part)


def check_nothing_left(platform: Platform, run_ids: Sequence[UUID]) -> None:
    """No process, no lease, no checkpoint and no unfinished run is left."""
    store = Store(platform.config.vectorclm_store)
    until(lambda: not torch_processes(platform) and not _processes(run_ids), "no process is left", 30)
    # A lease that was given back is an empty object on S3 until gc removes it.
    assert not any(file.bytes for file in store.files("leases").values()) and store.list("checkpoints") == []
    unfinished = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    left = FlowRunFilter.model_validate({"state": {"type": {"any_": unfinished}}})
    assert [(run.name, run.state_name) for run in platform.client.read_flow_runs(flow_run_filter=left)] == []


def _processes(run_ids: Sequence[UUID]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID", "") in {str(run_id) for run_id in run_ids}:
                found.append(process)
    return found
