"""Names and tags of runs: what they run, what was changed, when and from where; a name that a person typed stays."""

import getpass
from datetime import datetime
from typing import Any

import pytest
from coolname import generate_slug

from flows.run_names import (
    command_line_tags,
    differences,
    evaluation_name,
    is_generated,
    of_the_command_line,
    run_name,
    run_tags,
)

USUAL = {"experiment": "tiny", "changes": {"seed": 1, "sample": {"bytes": 5}, "finetune": {"epochs": 1.2}}}
NOON = datetime(2026, 11, 3, 12, 5)


def named(**given: Any) -> str:
    return run_name(USUAL, {**USUAL, **given}, NOON, "abcdef")


def test_names_that_prefect_makes_up_are_replaced_and_typed_ones_stay() -> None:
    proposed = ["beta3-canis-majoris", "omega-lyrae", "Rustic-Otter", *(generate_slug(2) for _ in range(50))]
    assert [name for name in proposed if not is_generated(name)] == []
    typed = ["baseline", "my-own name", "tiny, 3 Nov 12:05", "lower-rate", "Rustic", "beta", "a-b-c", "2026-11-03"]
    assert [name for name in typed if is_generated(name)] == []


def test_a_name_says_the_experiment_its_changes_and_the_time() -> None:
    assert named() == "tiny, 03 Nov 12:05 (abcd)"
    assert named(changes={"finetune": {"epochs": 2.0}}) == "tiny finetune.epochs=2, 03 Nov 12:05 (abcd)"
    four = {"seed": 2, "sample": {"bytes": 6}, "settings": {"model.rope_theta": 7.5}}
    assert named(changes=four, settings={"name": "x" * 99}) == (
        "tiny seed=2 sample.bytes=6 and 2 more, 03 Nov 12:05 (abcd)"
    )
    assert named(settings={"name": "x" * 99}) == f"tiny name={'x' * 23}…, 03 Nov 12:05 (abcd)"
    assert named(again_from="export", dry_run=True) == "tiny rebuilt from export dry run, 03 Nov 12:05 (abcd)"
    assert named(stage="finetune", again=True) == "finetune of tiny rebuilt, 03 Nov 12:05 (abcd)"
    assert named(experiment={"name": "own"}).startswith("own, ")


def test_an_evaluation_is_told_apart_by_its_model_its_suite_and_the_time() -> None:
    given = {"model": "models:/vectorclm-chat@candidate", "suite": "small"}
    assert evaluation_name(given, NOON, "abcdef") == "vectorclm-chat@candidate on small, 03 Nov 12:05 (abcd)"
    given["model"] = f"s3://bucket/store/finetune/{'0123456789abcdef' * 4}"
    assert evaluation_name(given, NOON, "abcdef") == "finetune/0123456789ab on small, 03 Nov 12:05 (abcd)"
    given["model"] = "/home/me/models/mine"
    assert evaluation_name(given, NOON, "abcdef") == "models/mine on small, 03 Nov 12:05 (abcd)"


def test_a_field_that_is_left_out_or_empty_is_no_difference() -> None:
    given = {"changes": {"seed": None, "sample": {"bytes": 5}, "finetune": {}}, "settings": None}
    assert differences(USUAL, given) == {} == differences({}, {})


def test_tags_say_from_where_a_run_comes_unless_they_did() -> None:
    given = {**USUAL, "settings": {f"key{number}": number for number in range(9)}}
    tags = run_tags(USUAL, given, ["mine"])
    assert tags[:2] == ["mine", "experiment: tiny"] and tags[-1] == "from: API"
    assert [tag for tag in tags if tag.startswith("setting: ")] == [f"setting: key{number}" for number in range(8)]
    assert run_tags(USUAL, USUAL, [], scheduled=True) == ["experiment: tiny", "from: schedule"]
    assert run_tags(USUAL, USUAL, ["from: UI", "experiment: tiny"]) == ["from: UI", "experiment: tiny"]


def test_the_command_line_and_its_user_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name, tags = of_the_command_line("tiny", {"seed": 3})
    assert name.startswith("tiny seed=3, ") and not is_generated(name)
    assert set(tags) == {"from: command line", f"user: {getpass.getuser()}", "experiment: tiny", "setting: seed"}
    monkeypatch.setattr(getpass, "getuser", lambda: {}["no such user"])
    monkeypatch.setattr("os.getuid", lambda: 4711)
    assert command_line_tags() == ["from: command line", "user: 4711"]
