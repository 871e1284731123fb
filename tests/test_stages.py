"""The table of stages agrees with what the store knows of them, and a stage builds with its own builder only."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import one_of
from tests.test_curriculum import mini
from vectorclm import stages
from vectorclm.config import load_experiment
from vectorclm.errors import ConfigError
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import BY_NAME, TABLE, TRAININGS, run_stage
from vectorclm.store.artifact import Store
from vectorclm.store.layout import EXPORT, STAGES, TRAINED


def test_the_store_knows_every_stage_and_every_training() -> None:
    """Otherwise garbage collection takes a checkpoint of a running training for garbage, and no model has the name."""
    assert tuple(BY_NAME) == STAGES and EXPORT in BY_NAME
    assert tuple(stage.name for stage in TABLE if stage.name in TRAININGS) == TRAINED


def test_a_training_without_a_builder_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would otherwise train another model from the beginning under the new name."""
    anneal = replace(BY_NAME["pretrain"], name="anneal", inputs=())  # type: ignore[arg-type]
    monkeypatch.setattr(stages, "TABLE", (*TABLE, anneal))
    monkeypatch.setitem(BY_NAME, "anneal", anneal)
    with pytest.raises(ConfigError, match="trains pretrain and finetune only: stage anneal needs a builder of its own"):
        run_stage("anneal", load_experiment("tiny")[0], Store(str(tmp_path)), Runtime(), None)


@pytest.mark.parametrize("workers", one_of([2, 4]))
def test_the_number_of_workers_changes_no_manifest(workers: int, tmp_path: Path) -> None:
    """Of the stage as its command builds it: one process, and several."""
    experiment = tmp_path / "mini.json"
    experiment.write_text(mini().model_dump_json())
    found = []
    for number in (1, workers):
        runtime, store = tmp_path / f"{number}.json", tmp_path / f"store-{number}"
        runtime.write_text(json.dumps({"data_workers": number, "threads": 1}))
        if found:
            store.mkdir()
            for stage in ("sample", "tokenizer"):
                (store / stage).symlink_to(tmp_path / "store-1" / stage)
        for stage in ("shards",) if found else ("sample", "tokenizer", "shards"):
            command = [sys.executable, "-m", "vectorclm", stage, str(experiment), "--store", str(store)]
            subprocess.run([*command, "--runtime", str(runtime)], check=True, capture_output=True, timeout=120)
        (path,) = (store / "shards").glob("*/manifest.json")
        manifest = json.loads(path.read_text())
        found.append({key: manifest[key] for key in ("fingerprint", "files", "summary")})
    assert found[0] == found[1]
