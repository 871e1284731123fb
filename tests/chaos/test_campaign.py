"""The tool finds what is lost, goes on where it was killed, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import KILLS, S3, SEED
from vectorclm.__main__ import main
from vectorclm.chaos.campaign import Campaign
from vectorclm.chaos.disturbances import BY_NAME, Disturbance, Strike, kill
from vectorclm.chaos.place import Place
from vectorclm.chaos.results import read_outcomes
from vectorclm.chaos.stage_process import MARK, marked
from vectorclm.chaos.trial import Outcome, run_trial
from vectorclm.errors import ConfigError, InUseError
from vectorclm.store.artifact import Store

QUICK = [name for name in BY_NAME if name not in ("stop", "outage")]  # the others wait for most of a minute


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def options(*kinds: str) -> list[str]:
    return [word for kind in kinds for word in ("--only", kind)]


def test_a_killed_call_goes_on_and_what_was_disturbed_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A seeded sample: the first stages, with VECTORCLM_KILLS=10 all, each disturbed once."""
    store, results = tmp_path / "store", tmp_path / "results.jsonl"
    command = ["chaos", "--store", str(store), "--seed", str(SEED), "--minutes", "30", "--results", str(results)]
    command += options(*QUICK)
    with subprocess.Popen([sys.executable, "-m", "vectorclm", *command], stderr=subprocess.PIPE) as child:
        while not read_outcomes(results):
            assert child.poll() is None
            time.sleep(0.1)
        child.kill()
    campaign = Campaign(Store(str(store)), SEED, 30, QUICK, most=9 if KILLS >= 10 else 3, results=results)
    assert campaign.own.files("")
    outcomes = campaign.run()
    assert [outcome.trial for outcome in outcomes] == list(range(len(outcomes))) and len(outcomes) >= 4
    assert [line for outcome in outcomes for line in outcome.problems] == []
    assert any(outcome.struck for outcome in outcomes)
    assert list(store.iterdir()) == [] and not campaign.folder.exists() and not marked(str(campaign.folder))
    # No minute is left: the table of what is known.
    assert main([*command[:6], "0.001", *command[7:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trials"] == len(outcomes) and told["lost"] == 0 and "holds" in told["verdict"]


class Tokenizer:
    """The second stage alone, which takes a second, in a store that has the first."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.place = Place(Store(str(folder / "own")), folder, None, None)
        self.store = Store(str(folder / "store"))
        self.place.build("sample", self.store)

    def disturb(self, strike: Callable[[Strike], None]) -> Outcome:
        kind = Disturbance("test", "of a test", strike)
        while not (found := run_trial(self.place, self.store, "tokenizer", kind, (0, "local", 1))).struck:
            self.store.remove("tokenizer")  # it had ended before: the next moment is chosen in a shorter time
        return found


def test_what_is_lost_left_or_unclear_is_found(tmp_path: Path) -> None:
    stage = Tokenizer(tmp_path / "work")

    def flip(strike: Strike) -> None:
        strike.wait()
        (file,) = Path(strike.store.root, "tokenizer").glob("*/tokenizer.json")
        file.chmod(0o600)
        file.write_bytes(file.read_bytes().replace(b"the", b"teh", 1))

    outcome = stage.disturb(flip)
    assert len(outcome.problems) == 1 and "tokenizer.json" in outcome.problems[0], outcome.problems
    stage.store.remove("tokenizer")

    def leave(strike: Strike) -> None:
        environment = {**os.environ, MARK: strike.place.mark}
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
        kill(strike)

    (problem,) = stage.disturb(leave).problems
    assert problem.startswith("left an orphan: ") and "sleep(600)" in problem
    assert not marked(stage.place.mark)
    stage.store.remove("tokenizer")

    def twice(strike: Strike) -> None:
        kill(strike)
        Path(strike.store.root, "tokenizer", "0" * 64).mkdir(parents=True)

    (problem,) = stage.disturb(twice).problems
    assert "and not the one artifact" in problem


def test_of_two_calls_with_a_seed_one_runs(tmp_path: Path) -> None:
    campaign = Campaign(Store(str(tmp_path / "store")), 3, 0.001)
    campaign.folder.parent.mkdir(parents=True)
    with campaign._alone(), pytest.raises(InUseError, match="another --seed"):
        Campaign(Store(str(tmp_path / "store")), 3, 0.001).run()


def test_what_cannot_be_tried_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["chaos", "--store", str(tmp_path / "store")]
    for words, said in (
        (["--only", "flood"], "no disturbance 'flood': there are kill, "),
        (["--only", "outage"], "none of these can be tried here: needs an S3 store"),
        (["--minutes", "0"], "minutes is 0: give the minutes to try"),
    ):
        assert main([*place, *words]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError):
        Campaign(Store(str(tmp_path / "store")), 1, 1, ["flood"]).run()


def test_faults_of_an_s3_server_meet_a_stage(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**s3.environment(), "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    store = Store(f"s3://{s3.bucket}/{tmp_path.name}")
    kinds = ["errors", "cuts"] if KILLS < 10 else ["errors", "cuts", "slow", "outage", "clock", "kill"]
    campaign = Campaign(store, SEED, 30, kinds, most=2 if KILLS < 10 else 9)
    outcomes = campaign.run()
    assert [line for outcome in outcomes for line in outcome.problems] == []
    assert any(outcome.struck for outcome in outcomes) and not campaign.untried
    assert store.files("") == {}


def test_a_stage_ends_with_the_tool(tmp_path: Path) -> None:
    """Also by SIGKILL of the tool: its children get SIGTERM."""
    store = str(tmp_path / "store")
    command = [sys.executable, "-m", "vectorclm", "chaos", "--store", store, "--minutes", "30"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
        while not (stages := [each for each in psutil.Process(child.pid).children() if "--relay" in each.cmdline()]):
            assert child.poll() is None
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    assert psutil.wait_procs(stages, 30)[1] == []
