"""A run killed with `kill -9` in the middle of pretraining ends, started again, with the model of one never killed."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vectorclm.config import load_experiment
from vectorclm.lineage.pinning import pin
from vectorclm.stages import plans
from vectorclm.store.artifact import Store

CHANGES = {
    "world": {"documents": 300, "conversations": 60},
    "sample": {"bytes": 200_000, "validation_share": 0.1},
    "shards": {"sequence_length": 64},
    "model": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "hidden_dropout": 0.1},
    "chat": {"sequence_length": 64, "tokens": 4_000},
    "finetune": {"replay": 0.25, "epochs": 6.0, "batch_size": 8, "validation_interval": 20},
    "pretrain": {"phases": [{"tokens": 61_440}], "batch_size": 8, "validation_interval": 30},  # 120 steps
}


def write_experiment(folder: Path) -> Path:
    """`tiny`, made smaller, as a JSON file."""
    experiment, _ = load_experiment("tiny")
    values = experiment.model_dump(exclude_none=True)
    for section, changes in CHANGES.items():
        values[section] |= changes
    values["chat"]["sources"].pop()  # code, too long for windows so short
    path = folder / "smaller.json"
    path.write_text(json.dumps(values))
    return path


def stage(name: str, experiment: Path, store: Path, **popen: object) -> "subprocess.Popen[bytes]":
    runtime = experiment.with_name("runtime.json")
    runtime.write_text(json.dumps({"threads": 1, "checkpoint_interval": 10}))
    command = [sys.executable, "-m", "vectorclm", name, str(experiment), "--store", str(store)]
    streams = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **popen}
    return subprocess.Popen([*command, "--runtime", str(runtime)], **streams)  # type: ignore[call-overload]


def finish(name: str, experiment: Path, store: Path) -> str:
    """Run a stage to its end; what it printed for a person."""
    child = stage(name, experiment, store, stderr=subprocess.PIPE)
    said = child.communicate(timeout=300)[1]
    assert child.returncode == 0, said
    return str(said, "utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def test_killed_and_resumed_equals_never_killed(folder: Path) -> None:
    experiment = write_experiment(folder)
    config, _ = load_experiment(str(experiment))
    fingerprint = plans(pin(config, experiment, None, resolve=False)[0])["pretrain"].fingerprint
    whole, killed = folder / "whole", folder / "killed"
    for name in ("sample", "tokenizer", "shards"):
        finish(name, experiment, whole)
    shutil.copytree(whole, killed)
    finish("pretrain", experiment, whole)

    for kill in (30, 90):  # twice, the second time after the run was resumed once
        kill_at(kill, "pretrain", experiment, killed, fingerprint)
    said = finish("pretrain", experiment, killed)
    (step,) = re.findall(r"pretrain continues from step (\d+) of 120", said)
    assert int(step) >= 90
    lines, samples = the_same(whole / "pretrain" / fingerprint, killed / "pretrain" / fingerprint)
    assert not (killed / "checkpoints" / fingerprint).exists()
    assert not list((killed / "leases").iterdir()) and not list((killed / "work").iterdir())
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 121))
    assert [line["step"] for line in samples] == [0, 60, 120]


def kill_at(step: int, name: str, experiment: Path, store: Path, fingerprint: str) -> None:
    """Begin a training, and end it with no time to clean up once the checkpoint of a step is there."""
    checkpoints = store / "checkpoints" / fingerprint
    child = stage(name, experiment, store)
    while not list(checkpoints.glob("step-*/manifest.json")) or max(checkpoints.iterdir()).name < f"step-{step:08d}":
        assert child.poll() is None, f"{name} ended before it could be killed"
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (store / name / fingerprint).exists()


def the_same(one: Path, two: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Assert that two trainings made the same, every step once; the lines of both files."""
    for name in ("model.safetensors", "samples.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    read = lambda file: [json.loads(line) for line in file.read_text().splitlines()]  # noqa: E731
    lines = [read(run / "metrics.jsonl") for run in (one, two)]
    for mine, other in zip(*lines, strict=True):
        mine.pop("tokens_per_second", None)
        other.pop("tokens_per_second", None)
        assert mine == other
    return lines[1], read(two / "samples.jsonl")


def test_a_tuning_that_replays_text_resumes_exactly(folder: Path) -> None:
    """A quarter of its windows is text; what is held out of each source, text or conversations, is validated on."""
    experiment, whole, killed = folder / "smaller.json", folder / "whole", folder / "killed"
    config, _ = load_experiment(str(experiment))
    plan = plans(pin(config, experiment, None, resolve=False)[0])["finetune"]
    assert set(plan.inputs) == {"pretrain", "chat_shards", "shards"}
    finish("chat_shards", experiment, whole)
    shutil.copytree(whole / "chat_shards", killed / "chat_shards")
    finish("finetune", experiment, whole)
    kill_at(30, "finetune", experiment, killed, plan.fingerprint)
    finish("finetune", experiment, killed)
    made = whole / "finetune" / plan.fingerprint
    lines, samples = the_same(made, killed / "finetune" / plan.fingerprint)
    validated = [set(line["validation"]) for line in lines if "validation" in line]
    assert validated == [{"lessons", "stories", "world-chat-messages", "world-chat-turns"}] * len(validated)

    summary = json.loads((made / "manifest.json").read_text())["summary"]
    steps, epochs = summary["steps"], summary["epochs"]
    assert samples[0]["step"] == 0 and samples[-1]["step"] == steps > 40
    (shards,), (chat,) = (list(whole.glob(f"{name}/*/manifest.json")) for name in ("shards", "chat_shards"))
    sizes = {label: count["train"]["windows"] for label, count in json.loads(shards.read_text())["summary"].items()}
    read = sum(epochs.pop(label) * size for label, size in sizes.items())
    assert read == pytest.approx(0.25 * steps * 8, abs=3)
    counts = json.loads(chat.read_text())["summary"]
    for label, epoch in epochs.items():  # but for a last step that is not full
        assert epoch == pytest.approx(6.0, abs=0.25)
        tokens = counts["sources"][label]["tokens"]
        assert tokens["budget"] == 2_000 <= tokens["train"] < 2_064 and tokens["validation"]
    assert len(epochs) == 2 and counts["train"]["tokens"] < 2 * 2_064


def test_a_finished_stage_is_reused(folder: Path) -> None:
    experiment = folder / "smaller.json"
    command = [sys.executable, "-m", "vectorclm", "pretrain", str(experiment), "--store", str(folder / "whole")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pretrain reused" in done.stdout


def test_a_training_made_again_is_the_same_to_the_byte(folder: Path) -> None:
    experiment, store = folder / "smaller.json", folder / "whole"
    (made,) = store.glob("pretrain/*")
    kept, saved = f"checkpoints/{made.name}/step-00000110", folder / "saved"
    saved.mkdir()
    (saved / "model.safetensors").write_text("of the training before, which would do nearly all of this one's work")
    Store(str(store)).publish_directory(kept, saved, {"step": 110, "order": "another", "data": "another"})
    command = [sys.executable, "-m", "vectorclm", "pretrain", str(experiment), "--store", str(store), "--again"]
    command += ["--runtime", str(folder / "runtime.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "pretrain built again, the same to the byte" in done.stdout, done.stderr
    assert (store / kept / "manifest.json").exists() and len(list((store / kept).parent.iterdir())) == 1
    assert re.search(r"^pretrain reads lessons \d\.\d\d epochs, stories \d\.\d\d$", done.stderr, re.MULTILINE)
    model = made / "metrics.jsonl"
    manifest = model.with_name("manifest.json")
    text = model.read_text().replace('"step": 1,', '"step": 1, "loss2": 1,', 1)  # as if it had been made otherwise
    known = json.loads(manifest.read_text())
    model.write_text(text)
    changed = text.encode()
    known["files"]["metrics.jsonl"] |= {"bytes": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
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
