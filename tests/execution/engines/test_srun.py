"""Slurm: `train.sbatch` runs a curriculum on two nodes, and goes on after a requeue to the same bytes."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.execution.engines import srun
from tests.conftest import KILLS, one_of
from tests.services.slurm import Slurm, slurm_cluster
from tests.test_curriculum import mini
from tests.training.test_checkpoint import the_same
from vectorclm.config import ExperimentConfig, override
from vectorclm.errors import ConfigError
from vectorclm.runtime.devices import Runtime

SCRIPT = Path(__file__).parents[3] / "infra" / "cluster" / "train.sbatch"
SECONDS = 150  # for a job, from its start to its end
SHARED = ("sample", "tokenizer", "shards")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


class Jobs:
    """Jobs of one experiment, each with a store of its own."""

    def __init__(self, slurm: Slurm, folder: Path, experiment: ExperimentConfig) -> None:
        self.slurm, self.folder, self.experiment = slurm, folder, folder / "experiment.json"
        self.experiment.write_text(experiment.model_dump_json())
        slurm.environment = {
            name: value for name, value in slurm.environment.items() if not name.startswith(("PREFECT_", "MLFLOW_"))
        } | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def submit(self, store: Path) -> str:
        options = ["--parsable", "--nodes=2", f"--chdir={self.folder}", f"--output={store}.log"]
        words = [str(self.experiment), "--store", str(store), "--threads", "1", "--checkpoint-interval", "1000"]
        job = self.slurm.command("sbatch", *options, str(SCRIPT), *words, "--json")
        assert job.isdigit(), job
        return job

    def end(self, job: str, store: Path) -> str:
        """What a job printed, once it has succeeded."""
        log = Path(f"{store}.log")
        self.slurm.until(lambda: self.slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), SECONDS)
        assert self.slurm.state(job) == "COMPLETED", log.read_text()
        return log.read_text()


def steps(store: Path) -> int:
    """How many lines of metrics the pretraining that runs in a store has written."""
    found = [path.read_text().count("\n") for path in (store / "work").glob("pretrain-*/*/metrics.jsonl")]
    return max(found, default=0)


INTERRUPTIONS = {  # in the middle of a training
    "requeue": ("scontrol", "requeue"),  # as preemption with PreemptMode=REQUEUE does
    "notice": ("scancel", "--batch", "--signal=TERM"),  # as --signal in train.sbatch does before the time limit
}


@pytest.mark.parametrize("interruption", one_of([*INTERRUPTIONS]))
def test_a_job_trains_on_two_nodes_and_after_a_requeue_to_the_same_bytes(
    slurm: Slurm, tmp_path: Path, interruption: str
) -> None:
    smaller = override(mini(), ["pretrain.phases=[{tokens = 40960}]", "evaluate.instructions=0"])
    jobs = Jobs(slurm, tmp_path, smaller.model_copy(update={"chat": None, "finetune": None}))
    whole, requeued = tmp_path / "whole", tmp_path / "requeued"
    jobs.end(jobs.submit(whole), whole)
    requeued.mkdir()
    for stage in SHARED:
        (requeued / stage).symlink_to(whole / stage)
    job = jobs.submit(requeued)
    slurm.until(lambda: steps(requeued) >= 10, SECONDS)
    slurm.command(*INTERRUPTIONS[interruption], job)
    slurm.until(lambda: slurm.state(job) in ("PENDING", "COMPLETED", "FAILED"), 60)
    assert slurm.state(job) == "PENDING", Path(f"{requeued}.log").read_text()
    slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now")
    said = jobs.end(job, requeued)
    assert "continues from step" in said, said
    (made,) = (whole / "pretrain").iterdir()
    the_same(made, requeued / "pretrain" / made.name)
    assert json.loads((made / "manifest.json").read_text())["environment"]["world_size"] == 2
    assert [path.name for path in (whole / "export").iterdir()] == [
        path.name for path in (requeued / "export").iterdir()
    ]


@pytest.mark.skipif(KILLS < 10, reason="one more job: VECTORCLM_KILLS=10")
def test_a_cancelled_job_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    job = Jobs(slurm, tmp_path, mini()).submit(tmp_path / "cancelled")
    log = tmp_path / "cancelled.log"
    slurm.until(lambda: log.is_file() and "sample built" in log.read_text(), SECONDS)
    slurm.command("scancel", job)
    slurm.until(lambda: slurm.command("squeue", "--noheader") == "", 60)
    assert slurm.state(job) == "CANCELLED" and "requeued" not in log.read_text()


@pytest.mark.parametrize(
    ("environment", "nodes", "message"),
    [
        ({}, (1, 2), "engine srun works inside a Slurm job: submit infra/cluster/train.sbatch"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, (1, 2), "starts from the job's first node"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"},
            (3, 4),
            r"this Slurm job has 2 nodes, but nodes is \[3, 4\]",
        ),
    ],
)
def test_what_srun_lacks_is_one_line(
    environment: dict[str, str], nodes: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        srun.check(Runtime(engine="srun", nodes=nodes))
    assert "\n" not in str(caught.value)
