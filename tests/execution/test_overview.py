"""The overview of a run: one artifact on a real server that renews itself, with what a person wants to know."""

import json
import time
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter
from prefect.runtime import flow_run

from flows.execution import overview as module
from flows.execution.overview import BUILT, FAILED, KEY, REUSED, Overview, show
from tests.services.platform import until
from vectorclm.runtime.progress import Tick, say

STAGES = ("sample", "pretrain", "export")


def row(text: str, stage: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if f" {stage}: " in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def write(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": step, "loss": 5 - step / 100} for step in range(1, steps + 1)]
    text = "\n".join(json.dumps(line) for line in (*lines, {"step": steps, "validation": {}}))
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 9999, "lo', encoding="utf-8")  # the last line is half
    answers = [{"prompt": f"Who {name}?", "answer": answer} for name, answer in (("a", "x\ny"), ("b", ""), ("c", "z"))]
    (folder / "samples.jsonl").write_text(json.dumps({"step": steps, "samples": answers}) + "\n", encoding="utf-8")


def test_it_shows_stages_with_progress_and_a_training_with_losses_and_samples(tmp_path: Path) -> None:
    overview = Overview("tiny", STAGES)
    assert overview.as_markdown().startswith("## tiny: 0 %\n") and row(overview.as_markdown(), "sample")[2] == "waiting"
    overview.ends("sample", REUSED)
    overview.begins("pretrain", tmp_path / "work")
    assert row(overview.as_markdown(), "pretrain")[2:] == ["running", "", ""] and "###" not in overview.as_markdown()
    write(tmp_path / "work" / "attempt", 100)
    text = overview.as_markdown()
    assert text.startswith("## tiny: 0 %\n") and row(text, "sample")[2:] == ["reused", "100 %", ""]
    assert "| step | 1 | 15 | 29 | 43 | 58 | 72 | 86 | 100 |" in text and "| 4.990 |" in text and "| 4.000 |" in text
    assert "### Samples at step 100" in text and "**Who a?**\n\n    x\n    y\n" in text
    assert "    (nothing)" in text and "Who c?" not in text
    overview.ends("pretrain", BUILT, 65)
    assert overview.as_markdown().startswith("## tiny: 90 %\n")  # 10 of 11: the reused stage is no work
    overview.ends("export", FAILED, note="no disk")
    assert row(overview.as_markdown(), "pretrain")[2:] == ["built", "100 %", "1 min 05 s"]
    assert row(overview.as_markdown(), "export") == ["✘", row(text, "export")[1], "failed", "", "no disk"]
    overview.results, overview.links = "| world | 1 |", {"report": "http://x/r", "data": "http://x/d"}
    assert overview.as_markdown().endswith("### Results\n\n| world | 1 |")
    assert "[report](http://x/r) · [data](http://x/d)" in overview.as_markdown()


def test_the_progress_is_that_of_the_work_and_a_long_sample_is_wrapped(tmp_path: Path) -> None:
    overview = Overview("tiny", STAGES)
    for stage in STAGES:
        overview.ends(stage, BUILT)
    assert overview.as_markdown().startswith("## tiny: 100 %\n")
    again = Overview("tiny", STAGES)
    for stage in STAGES:
        assert int(again.as_markdown().partition(" %")[0].rpartition(" ")[2]) == 0
        again.ends(stage, REUSED)
    assert again.as_markdown().startswith("## tiny: 100 %\n")
    training = Overview("tiny", STAGES)
    training.begins("pretrain", tmp_path)
    said = {"step": 1, "samples": [{"prompt": "Who?", "answer": "frog " * 60}]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(said) + "\n", encoding="utf-8")
    frogs = [line for line in training.as_markdown().splitlines() if line.startswith("    ")]
    assert len(frogs) == 4 and max(map(len, frogs)) <= 100 and " ".join(frogs).split() == ["frog"] * 60


def shown(client: SyncPrefectClient, run_id: str) -> str:
    mine = {"key": {"any_": [KEY]}, "flow_run_id": {"any_": [run_id]}}
    found = client.read_artifacts(artifact_filter=ArtifactFilter.model_validate(mine))
    assert len(found) <= 1  # renewed, not written again
    return str(found[0].data) if found else ""


def test_the_artifact_renews_itself_and_shows_the_end(
    prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.05)
    seen: list[str] = []

    @flow
    def watched() -> None:
        run_id = str(flow_run.id)
        seen.append(run_id)
        with Overview("tiny", STAGES) as overview:
            overview.begins("pretrain")
            say(Tick("pretrain", 10, 100, "tokens"))
            time.sleep(0.01)  # the time left needs two ticks at two times
            say(Tick("pretrain", 40, 100, "tokens"))
            say(Tick("another", 1, 2, "tokens"))
            until(lambda: "| running | 40 % |" in shown(prefect_client, run_id), "the progress is shown", 30)
            assert shown(prefect_client, run_id).startswith("## tiny: 33 %")  # 10 of 12 are pretrain
            assert row(shown(prefect_client, run_id), "pretrain")[4].endswith(" s left")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        watched()
    assert row(shown(prefect_client, seen[0]), "pretrain")[:1] == ["✘"]
    assert prefect_client.read_flow_run(UUID(seen[0])).state_name == "Failed"


def test_a_retry_renews_the_artifacts_of_the_attempt_before(prefect_client: SyncPrefectClient) -> None:
    @flow
    def twice() -> str:
        for attempt in ("first", "second"):
            with Overview(attempt, STAGES):
                show("mlflow", f"[{attempt}](http://there)", "a link")
        return str(flow_run.id)

    run_id = twice()
    assert shown(prefect_client, run_id).startswith("## second: 0 %")
    mine = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run_id]}})
    assert sorted(str(found.key) for found in prefect_client.read_artifacts(artifact_filter=mine)) == ["mlflow", KEY]


def test_a_lost_server_stops_no_run(prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    tried: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        tried.append("")
        raise ConnectionError("away")

    monkeypatch.setattr(SyncPrefectClient, "update_artifact", refuse)

    @flow
    def goes_on() -> str:
        with Overview("tiny", STAGES) as overview:
            overview.ends("sample", BUILT)
            until(lambda: tried, "it tries to renew the overview", 30)
        return "done"

    assert goes_on() == "done"
    monkeypatch.setattr(module, "create_markdown_artifact", refuse)
    with Overview("tiny", STAGES) as overview:
        overview.ends("sample", BUILT)
