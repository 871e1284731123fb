"""The plan of a run as Markdown: what it reuses and builds, and what that costs."""

import re
from pathlib import Path

from flows.reports.plan import plan_of
from tests.services.curricula import Recorded
from vectorclm.config import changed, load_experiment
from vectorclm.stages import plans
from vectorclm.store.artifact import Store
from vectorclm.store.layout import STAGES


def states(plan: str) -> dict[str, str]:
    rows = [line.split(" | ") for line in plan.splitlines() if "**" in line]
    return {row[0].removeprefix("| "): row[1].strip("*") for row in rows}


def test_a_plan_says_which_stages_are_reused(recorded: Recorded, tmp_path: Path) -> None:
    lock = tmp_path / "mini.json"
    whole = plan_of(recorded.experiment, lock, None, recorded.store)
    assert states(whole) == dict.fromkeys(STAGES, "reused") and f"{len(STAGES)} of {len(STAGES)} stages" in whole
    other = changed(recorded.experiment, {"finetune.epochs": 3.0})
    plan = plan_of(other, lock, None, recorded.store)
    built = {"finetune", "evaluate", "export"}
    assert states(plan) == {name: "built" if name in built else "reused" for name in STAGES}
    assert f"{len(STAGES) - 3} of {len(STAGES)} stages are reused." in plan
    size = recorded.experiment.model.parameters
    assert f"| model | {size:,} parameters |" in plan and "| pretraining | 8,192 tokens in 16 steps |" in plan
    assert "| fine-tuning | up to 180 conversations, 3 times |" in plan
    assert re.search(r"\| training on A100 \| about \d\.\d s \|", plan)


def test_an_experiment_that_ends_at_the_base_model_has_no_fine_tuning(recorded: Recorded, tmp_path: Path) -> None:
    lock = tmp_path / "mini.json"
    kept = recorded.experiment.model_dump(mode="json", exclude={"chat", "finetune"})
    base = type(recorded.experiment).model_validate(kept)
    plan = plan_of(base, lock, None, recorded.store)
    assert list(states(plan)) == list(plans(base)) and "finetune" not in states(plan) and "fine-tuning" not in plan


def test_sources_without_a_commit_leave_it_open_and_hours_are_counted(tmp_path: Path) -> None:
    plan = plan_of(load_experiment("base")[0], tmp_path / "base.json", None, Store(str(tmp_path / "store")))
    assert set(states(plan).values()) == {"built, or reused where its sources are unchanged"}
    assert f"0 of {len(STAGES)} stages are reused." in plan
    assert re.search(r"\| training on 2 CPU cores \| about \d+ h \d\d min \|", plan)
    assert not (tmp_path / "base.json").exists()
