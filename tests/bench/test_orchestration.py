"""The overhead of Prefect and MLflow is measured on both sides, and a figure is what the training's metrics say."""

import json
import os
import shutil
from pathlib import Path

import pytest

from flows.bench import orchestration as bench
from flows.bench.orchestration import SHARE, START, orchestration
from tests.services.curricula import Recorded
from tests.test_curriculum import mini
from vectorclm.config import ExperimentConfig

WHOLE = pytest.mark.skipif(os.environ.get("VECTORCLM_MATRIX") != "full", reason="a minute: VECTORCLM_MATRIX=full")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure a very small experiment in place of `tiny` and `small`."""

    def load(name: str) -> tuple[ExperimentConfig, Path]:
        return mini().model_copy(update={"name": name}), Path(f"{name}.toml")

    monkeypatch.setattr(bench, "load_experiment", load)
    monkeypatch.setattr(bench, "FIRST_CHANGES", {"finetune.epochs": 0.5})
    monkeypatch.setattr(bench, "LOOP_CHANGES", {"pretrain.batch_size": 4, "pretrain.validation_interval": 1000})


@WHOLE
@pytest.mark.usefixtures("small")
def test_both_sides_are_measured_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # of the user, and not measured
    whole, loop = orchestration(1, tmp_path)
    assert whole.ours is not None and whole.peer is not None and whole.unit == "s"
    assert whole.ask == pytest.approx(1 + SHARE + START / whole.peer, abs=1e-3)
    assert whole.met is (whole.ours / whole.peer <= whole.ask)
    assert loop.ours is not None and loop.peer is not None and loop.unit == "tokens/s" and min(loop.ours, loop.peer) > 0
    assert list(tmp_path.glob("vectorclm-bench-*")) == []


def test_without_a_text_the_loop_says_what_to_name(tmp_path: Path) -> None:
    row = bench._loop(tmp_path, 1, None)
    assert row.met is None and row.why == "no text: name a mirror with --data" and list(tmp_path.iterdir()) == []


def test_a_speed_is_that_of_all_steps_after_the_first_ten(recorded: Recorded, tmp_path: Path) -> None:
    shutil.copytree(Path(recorded.store.root, "pretrain"), tmp_path / "pretrain")
    (file,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    seconds = {11: 1.0, 12: 3.0}  # of steps of 12 tokens each
    for line in lines:
        if "loss" in line:
            line["tokens_per_second"] = 12 / seconds.get(line["step"], 1e9 if line["step"] <= 10 else 2.0)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    count = sum("loss" in line and line["step"] > 10 for line in lines)
    assert bench._speed(recorded.experiment, tmp_path) == pytest.approx(12 / 2.0) and count > 2


def test_between_rounds_artifacts_are_removed_and_databases_are_kept(tmp_path: Path) -> None:
    for name in ("sample/a/manifest.json", "pretrain/b/model.safetensors", ".prefect/prefect.db", "mlflow.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    bench._forget(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".prefect", "mlflow.db"]
