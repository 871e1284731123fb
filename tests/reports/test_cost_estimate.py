"""`vectorclm run --dry-run`: fingerprints, tokens and costs, without a network and without a trace in the store."""

import json
import re
from pathlib import Path

import pytest

from flows.cli import main
from flows.reports.cost_estimate import HERE
from tests.test_curriculum import mini
from vectorclm.config import load_experiment
from vectorclm.lineage.pinning import pin
from vectorclm.planner.hardware import DEVICES
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store
from vectorclm.store.layout import STAGES


def test_a_dry_run_prints_fingerprints_and_touches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", "tiny", "--store", str(tmp_path), "--dry-run", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    tiny, path = load_experiment("tiny")
    pinned, _ = pin(tiny, path, None, resolve=False)
    assert costs["stages"] == {name: plan.fingerprint for name, plan in plans(pinned).items()}
    assert costs["parameters"] == tiny.model.parameters and costs["pretrain_tokens"] == tiny.pretrain.tokens
    assert costs["epochs"] is None  # there are no shards yet
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_the_mission_needs_no_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("COLUMNS", "120")
    base, _ = load_experiment("base")
    copy = tmp_path / "base.json"  # no lock file lies beside this one
    copy.write_text(base.model_dump_json())
    assert main(["run", str(copy), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("unresolved") == len(STAGES)
    assert "50,348,544" in said and "3,500,000,000 tokens" in said
    assert re.search(r"H200 +\d{3} +5\d min \d\d s +\d min \d\d s", said)
    assert re.search(r"pretrain +\d+ h \d\d min", said)
    assert " 0.0 " not in said


def test_a_dry_run_counts_tuning_and_small_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "mini.json"
    path.write_text(mini().model_dump_json())
    dry = ["run", str(path), "--store", str(tmp_path / "store"), "--dry-run"]
    assert main([*dry, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuning"] is None
    dry += ["--set", "pretrain.phases=[{tokens = 9000, weights = {stories = 0.005, lessons = 0.995}}]"]
    dry += ["--set", "chat.tokens=1_000_000", "--set", "finetune.epochs=1.5"]
    assert main([*dry, "--json"]) == 0
    tuning, model = json.loads(capsys.readouterr().out)["tuning"], mini().model
    assert tuning["tokens"] == 1_500_000
    assert tuning["flops"] == pytest.approx(1_500_000 * model.flops_per_token(mini().chat.sequence_length))
    for key in HERE:
        assert tuning["hours"][DEVICES[key].name] > tuning["flops"] / DEVICES[key].product_flops / 3600
    assert main(dry) == 0
    told = capsys.readouterr().out
    assert "stories 0.5%, lessons 99.5%" in told and "about 1,500,000 tokens" in told and " fine-tuning " in told


def test_a_dry_run_says_what_is_reused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    experiment, path = mini(), tmp_path / "mini.json"
    path.write_text(experiment.model_dump_json())
    pinned, _ = pin(experiment, path, None, resolve=True)
    for stage in ("sample", "tokenizer"):
        run_stage(stage, pinned, Store(str(tmp_path / "store")), Runtime(threads=1), None)
    assert main(["run", str(path), "--store", str(tmp_path / "store"), "--dry-run", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)["here"]
    assert here["reused"] == ["sample", "tokenizer"]
    assert here["seconds"]["sample"] == here["seconds"]["tokenizer"] == 0 < here["seconds"]["shards"]
