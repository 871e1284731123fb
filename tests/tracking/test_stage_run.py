"""The run of a stage: live metrics of its file, through cuts and resumptions, and the record of its artifact."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from flows.tracking.stage_run import StageRun
from tests.services.curricula import Recorded
from tests.services.platform import until
from tests.tracking.conftest import client, step, tracker
from vectorclm.config import ExperimentConfig
from vectorclm.stages import BY_NAME, EVALUATED, READS
from vectorclm.store.artifact import Store
from vectorclm.training.metrics import Metrics


def test_each_step_is_sent_once_however_the_file_is_cut_back(
    store: Store, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    validation = json.dumps({"step": 2, "tokens": 20, "validation": {"a": {"bits_per_byte": 1.5}}}) + "\n"
    versions = [
        step(1, 3.0) + step(2, 2.5) + validation + '{"step": 3, "lo',  # a line in the making
        step(1, 3.0),  # back to a checkpoint
        step(1, 3.0) + step(2, 2.5) + validation + step(3, 2.25),
    ]
    with tracker(store, experiment, "relay") as told, told.stage("pretrain", 1, tmp_path) as run:
        for text in versions:

            def look(text: str = text, run: StageRun = run) -> None:
                file.write_text(text)
                run.relay()

            told.do(look)
    found = client(store)
    run_id = told.run_ids["pretrain"]
    assert [(m.step, m.value) for m in found.get_metric_history(run_id, "train/loss")] == [
        (1, 3.0),
        (2, 2.5),
        (3, 2.25),
    ]
    assert [m.step for m in found.get_metric_history(run_id, "validation/bits_per_byte.a")] == [2]


def test_the_curve_of_a_training_resumed_three_times_reads_as_one(
    store: Store, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    """Each attempt is a run that begins with the steps up to its checkpoint, and has every step once."""
    file, saved, runs = tmp_path / "metrics.jsonl", "", []
    for before, checkpoint, end in ((0, 4, 6), (4, 8, 9), (8, 0, 11), (8, 0, 14)):
        with (
            suppress(KeyboardInterrupt),
            tracker(store, experiment, "resumed") as told,
            told.stage("pretrain", 1, tmp_path),
        ):
            kept = Path(store.root, "checkpoints", told.plans["pretrain"].fingerprint)
            until(lambda told=told: "pretrain" in told.run_ids, "its run is open", 60)
            metrics = Metrics(file, lambda step: "")
            metrics.restart(saved)
            for number in range(before + 1, end + 1):
                metrics.add(number, 10 * number, torch.tensor(5 - number / 10), torch.tensor(1.0), 0.1)
                metrics.flush()
                if number == checkpoint:
                    saved = metrics.text()
                    (kept / f"step-{number:08d}").mkdir(parents=True)
            if end < 14:
                raise KeyboardInterrupt
        run_id = told.run_ids["pretrain"]
        points = sorted((m.step, round(m.value, 3)) for m in client(store).get_metric_history(run_id, "train/loss"))
        assert points == [(number, round(5 - number / 10, 3)) for number in range(1, end + 1)]
        runs.append(client(store).get_run(run_id))
    assert [run.info.status for run in runs] == ["KILLED", "KILLED", "KILLED", "FINISHED"]
    assert [(run.data.tags["attempt"], run.data.tags.get("resumed_step")) for run in runs] == [
        ("1", None), ("2", "4"), ("3", "8"), ("4", "8")
    ]  # fmt: skip
    shutil.rmtree(Path(store.root, "checkpoints"))


def test_the_record_of_a_built_stage_is_complete(recorded: Recorded) -> None:
    found = client(recorded.store)
    (place,) = found.search_experiments(filter_string="name = 'mini'")
    runs = {run.data.tags["stage"]: run for run in found.search_runs([place.experiment_id])}
    for name, handle in recorded.handles.items():
        run = found.get_run(runs[name].info.run_id)
        assert run.info.status == "FINISHED" and run.data.tags["state"] == "built"
        assert run.data.tags["fingerprint"] == handle["fingerprint"] and run.data.tags["uri"] == handle["uri"]
        data = sum(BY_NAME[part].columns is not None for part in BY_NAME[name].inputs)
        assert len(run.inputs.dataset_inputs) == data + len(BY_NAME[name].sources(recorded.experiment))
        assert "manifest.json" in [item.path for item in found.list_artifacts(run.info.run_id)]
    for name, data in READS.items():
        artifact = recorded.store.find(name, recorded.handles[name]["fingerprint"])
        assert artifact is not None
        run = runs[name]
        assert len(found.get_metric_history(run.info.run_id, "train/loss")) == artifact.summary["steps"]
        (label, *_) = artifact.summary["validation"]
        final = run.data.metrics[f"final_validation/bits_per_byte.{label}"]
        assert final == artifact.summary["validation"][label]["bits_per_byte"]
        named = [item.dataset.name for item in found.get_run(run.info.run_id).inputs.dataset_inputs]
        assert f"mini {data}" in named
    for name in EVALUATED:
        assert "tasks.world.acc" in runs[name].data.metrics
