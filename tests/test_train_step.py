"""A bad batch is skipped or ends the training, as the experiment says, and leaves no trace in the weights."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.test_checkpoint import write_experiment
from vectorclm.config import ExperimentConfig, load_experiment, override
from vectorclm.errors import DivergedError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Artifact, Store
from vectorclm.train_step import TrainStep
from vectorclm.training.metrics import SKIPPED, Metrics

RUNTIME = Runtime(device="cpu", threads=1, checkpoint_interval=1000)
STEPS, BAD = 60, 56  # the rule needs 50 steps before


def experiment(folder: Path, bad_batches: str, steps: int = STEPS) -> ExperimentConfig:
    path = write_experiment(folder)
    values = json.loads(path.read_text())
    values["pretrain"] |= {"phases": [{"tokens": steps * 8 * 64}], "bad_batches": bad_batches}
    path.write_text(json.dumps(values))
    return pin(load_experiment(str(path))[0], path, None, resolve=False)[0]


def not_a_number(step: TrainStep, loss: Tensor) -> None:
    """As an overflow leaves them."""
    for p in step.model.parameters():
        assert p.grad is not None
        p.grad.fill_(math.nan)


def wild(step: TrainStep, loss: Tensor) -> None:
    loss *= 10


def trained(
    folder: Path, bad_batches: str, spoil: Callable[[TrainStep, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> Artifact:
    """A training in which a batch is spoiled."""
    made, calls = TrainStep.accumulate, [0]

    def accumulate(self: TrainStep, *arguments: object) -> Tensor:
        loss = made(self, *arguments)  # type: ignore[arg-type]
        calls[0] += 1
        if calls[0] == BAD:
            spoil(self, loss)
        return loss

    config, store = experiment(folder, bad_batches), Store(str(folder / "store"))
    for stage in ("sample", "tokenizer", "shards"):
        run_stage(stage, config, store, RUNTIME, None)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "accumulate", accumulate)
        return run_stage("pretrain", config, store, RUNTIME, None)[0]


def test_a_bad_batch_is_skipped_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(tmp_path, "skip", not_a_number, monkeypatch)
    lines = [json.loads(line) for line in found.read("metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [n for n in range(1, STEPS + 1) if n != BAD]
    (event,) = [line for line in lines if "event" in line]
    assert (event["step"], event["event"]["kind"], event["event"]["told"]) == (BAD, "skipped", "gradient norm nan")
    assert "train-" in event["event"]["windows"]
    found.store.remove(f"pretrain/{found.fingerprint}")
    again = trained(tmp_path, "skip", wild, monkeypatch)
    hashes = {artifact.manifest["files"]["model.safetensors"]["sha256"] for artifact in (found, again)}
    assert len(hashes) == 1
    with pytest.raises(DivergedError, match=rf"bad batch in step {BAD}: loss .*bad_batches = \"skip\""):
        trained(tmp_path, "stop", wild, monkeypatch)


def test_many_bad_batches_are_no_single_one_also_after_a_resume(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", lambda step: f"stories/train-00000.arrow {step}")
    metrics.restart("")
    metrics.add(1, 10, torch.tensor(3.0), torch.tensor(1.0), 0.1)
    metrics.flush()
    for step in range(2, SKIPPED + 1):
        assert not metrics.accepts(step, 10 * step, 3.0, math.inf, stop=False)
        metrics.restart(metrics.text())  # as a resume does
    with pytest.raises(DivergedError, match=f"{SKIPPED} batches one after another stand out, the last in step 11"):
        metrics.accepts(SKIPPED + 1, 0, 3.0, math.inf, stop=False)
    assert metrics.accepts(SKIPPED + 2, 0, 3.0, 1.0, stop=False)


def test_a_training_that_diverged_goes_on_from_the_checkpoint_before_with_a_smaller_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = TrainStep.accumulate, [0]

    def overflowing(self: TrainStep, *arguments: object) -> Tensor:
        loss = made(self, *arguments)  # type: ignore[arg-type]
        calls[0] += 1
        return loss * (math.nan if calls[0] == 25 else 1)

    config, runtime = experiment(tmp_path, "record", 40), RUNTIME.model_copy(update={"checkpoint_interval": 10})
    stores = [Store(str(tmp_path / name)) for name in ("store", "other")]
    for stage in ("sample", "tokenizer", "shards"):
        run_stage(stage, config, stores[0], runtime, None)
    shutil.copytree(stores[0].uri, stores[1].uri)
    with monkeypatch.context() as patch, pytest.raises(DivergedError) as ended:
        patch.setattr(TrainStep, "accumulate", overflowing)
        run_stage("pretrain", config, stores[0], runtime, None)
    (setting,) = re.findall(r"--set '(.+)'$", str(ended.value))
    assert setting == "pretrain.schedule.changes=[{from_step=20, factor=0.5}]"
    changed = override(config, [setting])
    begun, made_by = [], list[Artifact]()
    for store in stores:
        calls[0] = 100  # beyond the overflow
        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "accumulate", overflowing)
            made_by.append(run_stage("pretrain", changed, store, runtime, None)[0])
        begun.append(40 - (calls[0] - 100))
    found, again = made_by
    assert begun == [20, 0]  # the steps that a checkpoint has saved
    assert len({each.manifest["files"]["model.safetensors"]["sha256"] for each in (found, again)}) == 1
    lines = [json.loads(line) for line in found.read("metrics.jsonl").splitlines()]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates[20] < 0.6 * rates[19]
    assert plans(config)["pretrain"].fingerprint != found.fingerprint
