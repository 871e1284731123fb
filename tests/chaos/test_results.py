"""The file of results outlives a kill, and table and verdict say what stands in it."""

from dataclasses import replace
from pathlib import Path

import pytest

from vectorclm.chaos.results import add_outcome, as_json, percentile, read_outcomes, rows, verdict
from vectorclm.chaos.trial import Outcome
from vectorclm.errors import DataError

GOOD = Outcome(0, "local", 1, "kill", "pretrain", 2.5, True, (), 7, 1.5)
BAD = replace(GOOD, trial=1, problems=("model.safetensors differs",), seconds=9.5)


def test_a_line_that_a_kill_cut_off_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    for outcome in (GOOD, BAD):
        add_outcome(file, outcome)
    whole = file.read_text()
    file.write_text(whole + whole[:30])
    assert read_outcomes(file) == [GOOD, BAD]
    assert file.read_text() == whole
    add_outcome(file, GOOD)
    assert read_outcomes(file) == [GOOD, BAD, GOOD]


def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("my notes\n")
    with pytest.raises(DataError, match="line 1, is not the result of a trial"):
        read_outcomes(file)
    assert file.read_text() == "my notes\n"


def test_the_table_counts_what_met_a_running_stage() -> None:
    elsewhere = replace(GOOD, store="s3", kind="term")
    missed = replace(GOOD, struck=False)
    first, second = rows([GOOD, BAD, elsewhere, missed], ["term", "kill"])
    assert (first.store, first.tried, first.survived, first.recomputed_steps) == ("local", 2, 1, 7)
    assert (first.mean_seconds, first.p95_seconds, second.disturbance) == (5.5, 9.5, "term")


def test_one_loss_decides_the_verdict() -> None:
    assert verdict([GOOD], "s3://b").startswith("s3://b holds: 1 disturbances")
    assert "1 of 2 trials lost something" in verdict([GOOD, BAD], "s3://b")
    assert "Nothing is known" in verdict([replace(GOOD, struck=False)], "s3://b")
    told = as_json([GOOD, BAD], ["kill"], "s3://b", {"errors": "needs S3"})
    assert (told["trials"], told["lost"], len(told["problems"]), told["rows"][0]["tried"]) == (2, 1, 1, 2)


@pytest.mark.parametrize(
    ("values", "share", "expected"), [([], 0.95, 0), ([3, 1, 2], 0.5, 2), ([*range(1, 101)], 0.95, 95), ([4], 0.95, 4)]
)
def test_the_percentile_is_a_value_that_was_seen(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected
