"""A run killed with `kill -9` in the middle of pretraining ends, started again, with the model of one never killed."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vectorclm.config import load_experiment
from vectorclm.pinning import pin
from vectorclm.stages import plans

CHANGES = {
    "world": {"documents": 300, "conversations": 60},
    "sample": {"bytes": 200_000, "validation_share": 0.1},
    "shards": {"sequence_length": 64},
    "model": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "hidden_dropout": 0.1},
    "pretrain": {"phases": [{"tokens": 61_440}], "batch_size": 8, "validation_interval": 30},  # 120 steps
}


def write_experiment(folder: Path) -> Path:
    """`tiny`, made smaller, as a JSON file."""
    experiment, _ = load_experiment("tiny")
    values = experiment.model_dump(exclude_none=True)
    for section, changes in CHANGES.items():
        values[section] |= changes
    path = folder / "smaller.json"
    path.write_text(json.dumps(values))
    return path


def stage(name: str, experiment: Path, store: Path, **popen: object) -> "subprocess.Popen[bytes]":
    runtime = experiment.with_name("runtime.json")
    runtime.write_text(json.dumps({"threads": 2, "checkpoint_interval": 10}))
    command = [sys.executable, "-m", "vectorclm", name, str(experiment), "--store", str(store)]
    return subprocess.Popen([*command, "--runtime", str(runtime)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def finish(name: str, experiment: Path, store: Path) -> None:
    assert stage(name, experiment, store).wait(300) == 0, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def test_killed_and_resumed_equals_never_killed(folder: Path) -> None:
    experiment = write_experiment(folder)
    config, _ = load_experiment(str(experiment))
    fingerprint = plans(pin(config, experiment, None, resolve=False)[0])["pretrain"].fingerprint
    whole, killed = folder / "whole", folder / "killed"
    for store in (whole, killed):
        for name in ("sample", "tokenizer", "shards"):
            finish(name, experiment, store)
    finish("pretrain", experiment, whole)

    checkpoints = killed / "checkpoints" / fingerprint
    for kill in (1, 3):  # twice, the second time after the run was resumed once
        child = stage("pretrain", experiment, killed)
        wanted = f"step-{kill * 30:08d}"
        while not list(checkpoints.glob("step-*/manifest.json")) or max(checkpoints.iterdir()).name < wanted:
            assert child.poll() is None, "pretraining ended before it could be killed"
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (killed / "pretrain" / fingerprint).exists()
    finish("pretrain", experiment, killed)

    one, two = (store / "pretrain" / fingerprint for store in (whole, killed))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (
        not checkpoints.exists() and not list((killed / "leases").iterdir()) and not list((killed / "work").iterdir())
    )
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    for mine, other in zip(*lines, strict=True):  # every step once, with the same figures
        mine.pop("tokens_per_second", None)
        other.pop("tokens_per_second", None)
        assert mine == other
    assert [line["step"] for line in lines[1] if "loss" in line] == list(range(1, 121))


def test_a_finished_stage_is_reused(folder: Path) -> None:
    experiment = folder / "smaller.json"
    command = [sys.executable, "-m", "vectorclm", "pretrain", str(experiment), "--store", str(folder / "whole")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pretrain reused" in done.stdout


def test_a_training_made_again_is_the_same_to_the_byte(folder: Path) -> None:
    experiment, store = folder / "smaller.json", folder / "whole"
    command = [sys.executable, "-m", "vectorclm", "pretrain", str(experiment), "--store", str(store), "--again"]
    command += ["--runtime", str(folder / "runtime.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "pretrain made again, the same to the byte" in done.stdout, done.stderr
    assert re.search(r"^pretrain reads lessons \d\.\d\d epochs, stories \d\.\d\d$", done.stderr, re.MULTILINE)
    (model,) = store.glob("pretrain/*/metrics.jsonl")
    manifest = model.with_name("manifest.json")
    text = model.read_text().replace('"step": 1,', '"step": 1, "loss2": 1,', 1)  # as if it had been made otherwise
    known = json.loads(manifest.read_text())
    model.write_text(text)
    known["files"]["metrics.jsonl"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    del known["manifest_sha256"]  # which would give the change away
    manifest.write_text(json.dumps(known))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "differs from" in done.stderr and "metrics.jsonl" in done.stderr
    assert model.read_text() == text


def test_a_stage_whose_input_is_missing_names_it(folder: Path) -> None:
    experiment = folder / "smaller.json"
    command = [sys.executable, "-m", "vectorclm", "shards", str(experiment), "--store", str(folder / "empty")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run sample first" in done.stderr
