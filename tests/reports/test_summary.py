"""The summary of a curriculum: the same figures as tables, as Markdown and as JSON."""

import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from flows.reports.summary import Summary, as_line
from tests.services.curricula import Recorded
from vectorclm.command_line import shell_line
from vectorclm.stages import BY_NAME, EVALUATED, READS


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def summary(recorded: Recorded) -> Summary:
    return Summary(recorded.experiment, recorded.store, recorded.handles)


def test_a_program_reads_stages_scores_and_models(recorded: Recorded, summary: Summary) -> None:
    line = as_line(summary)
    found = json.loads(line)
    assert "\n" not in line and list(found["stages"]) == list(recorded.handles)
    assert all(found["stages"][name]["uri"] == handle["uri"] for name, handle in recorded.handles.items())
    for kind, stage in (("base", "evaluate_base"), ("chat", "evaluate")):
        scores = json.loads(Path(recorded.handles[stage]["uri"], "scores.json").read_text())
        assert found["scores"][kind]["bits_per_byte"] == scores["bits_per_byte"]
        assert Path(found["models"][kind], "model.safetensors").is_file()
    tasks = [task["acc"] for task in found["scores"]["base"]["tasks"].values()]
    assert found["scores"]["multiple_choice"] == pytest.approx(sum(tasks) / len(tasks))
    assert all(pair["low"] <= pair["difference"] <= pair["high"] for pair in found["scores"]["followed"].values())


def test_a_person_reads_the_same_in_tables_and_in_markdown(
    recorded: Recorded, summary: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=160, record=True, file=sys.stderr)
    summary.show(console, details=True)
    shown, page = console.export_text(), summary.as_markdown()
    for text in (shown, page):
        for label, bits in summary.scores["chat"]["bits_per_byte"].items():
            assert label in text and f"{bits:.4f}" in text
        for training in EVALUATED.values():
            assert BY_NAME[training].result in text
        assert all(place in text for place in summary.models.values())
    assert all(name in shown for name in (*recorded.handles, *READS)) and "vectorclm chat" in shown
    widths = [len(line.split("|")) for line in page.splitlines() if line.startswith("|")]
    assert len(set(widths)) <= 3 and f"{summary.scores['chat']['tasks']['world']['acc']:.1%}" in page
    assert "mlflow ui" in shown and "localhost:5000" in shown
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:s3cr3t@tracking:5000/")
    summary.show(console, details=True)
    shown = console.export_text()
    assert "http://tracking:5000/#/experiments?workflowType=machine_learning" in shown and "s3cr3t" not in shown


@pytest.mark.parametrize("width", [50, 80])
def test_the_first_screen_is_a_line_the_scores_three_answers_and_three_commands(summary: Summary, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    summary.show(console)
    shown = console.export_text()
    commands = summary.next_commands()
    assert shown.endswith("next\n" + "".join(f"  {line}\n" for line in commands)) and len(commands) == 3
    above = shown.partition("\nnext\n")[0].splitlines()
    assert max(map(len, above)) <= width and above[1].startswith("mini: a chat model of ")
    for heading in ("chance", "counting", "world", "world-two-step", "counting: answers by words", "ends its answers"):
        assert heading in shown
    assert sum(line.startswith("you ") for line in above) == 3 == sum(line.startswith("model ") for line in above)
    for absent in ("instructions", "tokens/s", "fingerprint", "MLflow"):
        assert absent not in shown


def test_the_next_commands_are_short_and_do_what_they_say(
    recorded: Recorded, summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder whose store is the default one, with the program beside it as in a clone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    monkeypatch.setenv("VECTORCLM_STORE", recorded.store.uri)
    monkeypatch.setenv("BROWSER", "echo %s")
    commands = summary.next_commands()
    assert all(len(line) < 60 and line.startswith(".venv/bin/vectorclm ") for line in commands)
    done = [
        subprocess.run(shlex.split(line), input="Hello\n", capture_output=True, text=True, timeout=200, check=False)
        for line in commands
    ]
    assert [one.returncode for one in done] == [0, 0, 0], [one.stderr for one in done]
    assert "model> " in done[0].stdout and done[0].stdout.endswith("\n")
    assert (tmp_path / "report.html").as_uri() in done[1].stdout
    assert "Write an experiment for your own text" in done[2].stdout


def test_without_questions_the_screen_shows_held_out_text(recorded: Recorded) -> None:
    bare = Summary(recorded.experiment, recorded.store, recorded.handles)
    bare.scores = {kind: {**scores, "tasks": {}} for kind, scores in bare.scores.items()}
    console = Console(width=80, record=True, file=io.StringIO())
    bare.show(console)
    shown = console.export_text()
    assert (
        "held-out text" in shown
        and "held-out questions" not in shown
        and "held-out questions" not in bare.as_markdown()
    )


def test_a_command_can_be_pasted_where_its_folder_is_not_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell_line("sh", "a b") == "sh 'a b'"
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("vectorclm") is None
    assert Path(shell_line("vectorclm")).resolve() == Path(sys.executable).with_name("vectorclm").resolve()
    assert shell_line("no-such-program") == "no-such-program"
