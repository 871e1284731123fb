"""What MLflow is told, against a real database."""

import json
import logging
import socket
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import pytest

from flows.handle import StageCancelledError
from flows.tracking.tracker import Tracker
from tests.services.curricula import Recorded
from tests.services.platform import until
from tests.tracking.conftest import client, step, tracker
from vectorclm.config import ExperimentConfig
from vectorclm.runtime.processes import process_identity
from vectorclm.stages import plans
from vectorclm.store.artifact import Store

DEAD = 2**22 + 1  # above the largest process id of Linux


def test_a_failed_stage_and_its_curriculum_are_marked_failed(
    store: Store, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    with (
        pytest.raises(ValueError, match="too hot"),
        tracker(store, experiment, "failing") as told,
        told.stage("sample", 2, tmp_path),
    ):
        raise ValueError("too hot")
    stage, parent = (client(store).get_run(told.run_ids[name]) for name in ("sample", "curriculum"))
    assert (stage.info.status, parent.info.status) == ("FAILED", "FAILED")
    assert stage.data.tags["error"] == "ValueError: too hot" and stage.data.tags["attempt"] == "2"
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_runs_of_dead_processes_are_closed_and_those_of_the_living_are_not(
    store: Store, experiment: ExperimentConfig
) -> None:
    with tracker(store, experiment, "orphans") as told:
        pass
    found, here = client(store), socket.gethostname()
    place = found.get_run(told.run_ids["curriculum"]).info.experiment_id
    ours = told.plans["pretrain"].fingerprint
    alive = process_identity(psutil.Process())
    dead, later = {**alive, "pid": DEAD}, {**alive, "started": alive["started"] - 1}
    left = {
        "dead here": {"host": here, "process": json.dumps(dead), "fingerprint": "another"},
        "another got its number": {"host": here, "process": json.dumps(later), "fingerprint": "another"},
        "alive here": {"host": here, "process": json.dumps(alive), "fingerprint": ours},
        "elsewhere, an earlier attempt": {"host": "another", "process": "{}", "prefect.flow_run_id": "this"},
        "elsewhere, alike": {"host": "another", "fingerprint": ours, "prefect.flow_run_id": "other"},
    }
    ids = {name: found.create_run(place, tags=tags).info.run_id for name, tags in left.items()}
    with Tracker(store, told.experiment, told.plans, "this"):
        pass
    assert {name: found.get_run(run_id).info.status for name, run_id in ids.items()} == {
        "dead here": "KILLED",
        "another got its number": "KILLED",
        "alive here": "RUNNING",
        "elsewhere, an earlier attempt": "KILLED",
        "elsewhere, alike": "RUNNING",
    }


def test_an_attempt_left_running_on_another_machine_is_closed_once_its_successor_makes_the_stage(
    store: Store, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    """Not before: until it has the lease, the other may be the one that makes it."""
    with tracker(store, experiment, "successor") as told:
        until(lambda: "curriculum" in told.run_ids, "its run is open", 60)
        found, plan = client(store), told.plans["sample"]
        tags = {"host": "another", "stage": "sample", "fingerprint": plan.fingerprint, "state": "building"}
        left = found.create_run(told.experiment_id, tags=tags).info.run_id
        with told.stage("sample", 1, tmp_path) as run:
            looked: list[str] = []

            def look() -> None:
                run.relay()
                looked.append(found.get_run(left).info.status)

            for held in (False, True):
                with store.lease(plan.lease) if held else nullcontext():
                    told.do(look)
                    until(lambda held=held: len(looked) > held, "it looked", 60)
    assert looked == ["RUNNING", "KILLED"]
    assert found.get_run(told.run_ids["sample"]).data.tags["attempt"] == "2"


def test_a_stage_placed_on_another_machine_is_told_under_its_curriculum(
    store: Store, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    renamed = experiment.model_copy(update={"name": "placed"})
    with Tracker(store, renamed, plans(renamed), "the whole", "the whole") as told:
        until(lambda: "curriculum" in told.run_ids, "its run is open", 60)
        with Tracker(store, renamed, told.plans, "a part", "the whole") as there, there.stage("sample", 1, tmp_path):
            pass
        found = client(store)
        assert there.run_ids["curriculum"] == told.run_ids["curriculum"]
        assert found.get_run(told.run_ids["curriculum"]).info.status == "RUNNING"  # its own process ends it
        stage = found.get_run(there.run_ids["sample"])
        assert stage.data.tags["mlflow.parentRunId"] == told.run_ids["curriculum"]
        assert told.run_of("sample") == there.run_ids["sample"]
    assert found.get_run(told.run_ids["curriculum"]).info.status == "FINISHED"


def test_a_reused_stage_is_recorded_and_one_that_mlflow_missed_is_recorded_later(recorded: Recorded) -> None:
    found = client(recorded.store)
    renamed = recorded.experiment.model_copy(update={"name": "missed"})
    for expected in ({"built", "recorded"}, {"reused"}):
        with Tracker(recorded.store, renamed, plans(renamed)) as told:
            for name in ("tokenizer", "evaluate_base"):
                artifact = recorded.store.find(name, recorded.handles[name]["fingerprint"])
                assert artifact is not None
                told.reused(name, artifact)
        for name in ("tokenizer", "evaluate_base"):
            run = found.get_run(told.run_ids[name])
            assert run.info.status == "FINISHED" and run.data.tags["uri"] == recorded.handles[name]["uri"]
            assert {run.data.tags["state"], *({"recorded"} & set(run.data.tags))} == expected
        parent = found.get_run(told.run_ids["curriculum"])
        assert "base/acc.world" in parent.data.metrics and parent.info.status == "FINISHED"
        assert run.inputs.dataset_inputs != []


def test_the_champion_is_named_and_the_report_is_kept(recorded: Recorded) -> None:
    found = client(recorded.store)
    version = found.get_model_version_by_alias("vectorclm-chat", "candidate")
    renamed = recorded.experiment.model_copy(update={"name": "reported"})
    with Tracker(recorded.store, renamed, plans(renamed)) as told:
        assert told.champion(60) is None
        found.set_registered_model_alias("vectorclm-chat", "champion", version.version)
        try:
            assert told.champion(60) == recorded.handles["finetune"]["uri"]
        finally:
            found.delete_registered_model_alias("vectorclm-chat", "champion")
        assert told.report("<p>a page</p>") is None and told.page(0) is None  # a database has no pages
    kept = found.download_artifacts(told.run_ids["curriculum"], "report.html")
    assert Path(kept).read_text() == "<p>a page</p>"


def test_an_unreachable_server_is_warned_of_once(
    store: Store,
    experiment: ExperimentConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")
    with (
        caplog.at_level(logging.WARNING, "flows.tracking.tracker"),
        tracker(store, experiment, "nowhere") as told,
        told.stage("pretrain", 1, tmp_path),
    ):
        (tmp_path / "metrics.jsonl").write_text(step(1, 3.0))
    said = [record.getMessage() for record in caplog.records if record.name == "flows.tracking.tracker"]
    assert len(said) == 1 and "goes on without it" in said[0]


def test_a_password_in_an_address_is_never_told(
    store: Store, experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:s3cr3t@127.0.0.1:9")
    with tracker(store, experiment, "secret"):
        pass
    assert "the run goes on without it" in caplog.text
    assert "s3cr3t" not in caplog.text and "bob" not in caplog.text


def test_the_number_of_a_curriculum_is_that_of_the_run_before_it_and_one(
    store: Store, experiment: ExperimentConfig
) -> None:
    """The newest runs before it are read, of which there may be any number."""
    with tracker(store, experiment, "numbered") as first:
        pass
    found = client(store)
    before = found.get_run(first.run_ids["curriculum"])
    found.update_run(before.info.run_id, name=f"{before.info.run_name} run 1207")
    names = []
    for _ in range(2):
        with tracker(store, experiment, "numbered") as again:
            pass
        names.append(str(found.get_run(again.run_ids["curriculum"]).info.run_name))
    assert names == [f"{before.info.run_name} run {number}" for number in (1208, 1209)]


def test_a_cancelled_stage_is_killed_and_runs_are_told_apart(
    store: Store, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    for _ in range(2):
        with (
            suppress(StageCancelledError),
            tracker(store, experiment, "names") as told,
            told.stage("sample", 1, tmp_path),
        ):
            raise StageCancelledError("ended with the curriculum")
    runs = client(store).search_runs([told.experiment_id])
    names, short = (
        sorted(run.info.run_name for run in runs),
        {key: spec.fingerprint[:8] for key, spec in told.plans.items()},
    )
    assert names == [
        f"names {short['export']}",
        f"names {short['export']} run 2",
        f"sample {short['sample']}",
        f"sample {short['sample']} attempt 2",
    ]
    assert {run.info.status for run in runs if run.data.tags["stage"] == "sample"} == {"KILLED"}


def test_a_curriculum_has_the_name_of_its_run_in_prefect(store: Store, experiment: ExperimentConfig) -> None:
    renamed = experiment.model_copy(update={"name": "titles"})
    title = "titles finetune.epochs=2, 30 Nov 17:31 (57e6)"
    for name in (title, title, "another"):
        with Tracker(store, renamed, plans(renamed), title=name) as told:
            pass
    names = sorted(run.info.run_name for run in client(store).search_runs([told.experiment_id]))
    assert names == sorted([title, f"{title} run 2", "another"])
