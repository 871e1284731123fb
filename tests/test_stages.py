"""The table of stages agrees with what the store knows of them, and a stage builds with its own builder only."""

from dataclasses import replace
from pathlib import Path

import pytest

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
