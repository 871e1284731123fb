"""A training goes on with another number of processes: the same windows in each step, and nearly the same losses."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.execution.launch import under_torchrun
from tests.conftest import in_turn, read_lines
from tests.training.test_checkpoint import write_experiment
from vectorclm.config import load_experiment
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store

STEPS = 120
# A training that writes a hash of each window that it trains on, by the step's number.
HASHED = """
import hashlib, os, sys
from vectorclm import __main__, train
made, path = train._agreed, os.environ["HASHES"] + "-" + str(os.getpid())
def hashed(batch, group, record, done):
    found = made(batch, group, record, done)
    with open(path, "a") as file:
        for row in range(len(batch.input_ids)):
            print(done, hashlib.sha256(batch.input_ids[row].numpy().tobytes()).hexdigest(), file=file)
    return found
train._agreed = hashed
sys.exit(__main__.main(sys.argv[1:]))
"""


def windows(hashes: Path) -> dict[int, list[str]]:
    """The windows of each step, over all processes and attempts; a step that was repeated has those of the last."""
    found: dict[int, list[str]] = {}
    for attempt in sorted({path.name.split("-")[1] for path in hashes.iterdir()}):
        steps = defaultdict(list)
        for path in hashes.glob(f"attempt-{attempt}-*"):
            for line in path.read_text().splitlines():
                step, window = line.split()
                steps[int(step)].append(window)
        found |= {step: sorted(rows) for step, rows in steps.items()}
    return found


@in_turn(1, 3)  # test_nodes has the first
def test_a_training_on_one_then_two_then_one_process_is_the_same(tmp_path: Path) -> None:
    values = json.loads(write_experiment(tmp_path).read_text())
    values["model"] |= {"hidden_dropout": 0.0, "num_hidden_layers": 1}
    values["pretrain"] |= {"batch_size": 7, "phases": [{"tokens": STEPS * 7 * 64}]}  # the ranks' shares differ
    path = tmp_path / "even.json"
    path.write_text(json.dumps(values))
    experiment = pin(load_experiment(str(path))[0], path, None, resolve=False)[0]
    path.write_text(experiment.model_dump_json())
    runtime = Runtime(device="cpu", threads=1, checkpoint_interval=20)
    (tmp_path / "runtime.json").write_text(runtime.model_dump_json())
    for stage in ("sample", "tokenizer", "shards"):
        run_stage(stage, experiment, Store(str(tmp_path / "inputs")), runtime, None)
    fingerprint = plans(experiment)["pretrain"].fingerprint

    def train(name: str, attempt: int, processes: int, until: int = STEPS) -> None:
        """Train, and kill the training once there is a checkpoint of the step `until`."""
        store = tmp_path / name
        if not store.exists():
            store.mkdir()
            (tmp_path / f"{name}-hashes").mkdir()
            for stage in ("sample", "tokenizer", "shards"):
                (store / stage).symlink_to(tmp_path / "inputs" / stage)
        command: Sequence[str] = [sys.executable, "-c", HASHED, "pretrain", str(path), "--store", str(store)]
        command = [*command, "--relay", "--runtime", str(tmp_path / "runtime.json")]
        hashes = {**os.environ, "HASHES": str(tmp_path / f"{name}-hashes" / f"attempt-{attempt}")}
        command = under_torchrun(command, processes, 1) if processes > 1 else command
        child = subprocess.Popen(command, env=hashes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        kept = store / "checkpoints" / fingerprint
        while until < STEPS and not list(kept.glob(f"step-{until:08d}-*/manifest.json")):
            assert child.poll() is None
            time.sleep(0.005)
        if until < STEPS:
            child.kill()
        assert child.wait(300) == (0 if until == STEPS else -9)

    train("whole", 0, 1)
    for attempt, (processes, until) in enumerate(((1, 40), (2, 80), (1, STEPS))):
        train("parts", attempt, processes, until)
    one, other = (windows(tmp_path / f"{name}-hashes") for name in ("whole", "parts"))
    assert list(one) == list(range(STEPS)) and one == other and len(one[0]) == 7
    curves = []
    for name in ("whole", "parts"):
        lines = read_lines(tmp_path / name / "pretrain" / fingerprint / "metrics.jsonl")
        curves.append([float(str(line["loss"])) for line in lines if "loss" in line])
    assert len(curves[0]) == STEPS and curves[1] == pytest.approx(curves[0], rel=2e-5)
    assert len(list((tmp_path / "parts-hashes").iterdir())) == 4  # processes
