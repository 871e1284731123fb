"""The deployments of experiments on a real server: created, filled with their values, renewed and removed."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed

from flows.experiments import FOLDER
from flows.handle import CURRICULA
from flows.platform.experiment_forms import ALONE, fill_forms, refresh_description
from tests.services.curricula import Recorded
from vectorclm.config import EXPERIMENTS
from vectorclm.store.layout import STAGES


@pytest.fixture(autouse=True)
def pools(prefect_client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pools of the platform, and a folder of experiments."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("VECTORCLM_STORE", str(tmp_path / "empty"))
    for pool in ("cpu", "gpu"):
        prefect_client.create_work_pool(WorkPoolCreate(name=pool, type="process"), overwrite=True)


def filled(client: SyncPrefectClient) -> tuple[list[str], list[str]]:
    """What the forms need and what was changed, a line each."""
    lines: list[str] = []
    return fill_forms(client, lines.append), lines


def write(folder: Path, name: str, **changes: str) -> None:
    text = (EXPERIMENTS / "tiny.toml").read_text(encoding="utf-8").replace('name = "tiny"', f'name = "{name}"')
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def test_each_experiment_has_a_form_and_its_stages_have_theirs(
    prefect_client: SyncPrefectClient, tmp_path: Path
) -> None:
    write(tmp_path, "own")
    (tmp_path / "broken.toml").write_text("name = 3")
    problems, lines = filled(prefect_client)
    assert len(problems) == 1 and "broken.toml" in problems[0]
    assert "deployment curriculum/own created" in lines
    assert {f"deployment stage/own-{stage} created" for stage in ALONE} <= set(lines)
    own = prefect_client.read_deployment_by_name("curriculum/own")
    assert own.parameters["changes"]["finetune"]["epochs"] == 1.2 and own.enforce_parameter_schema
    assert own.entrypoint == "flows.deployments.curriculum_run"
    assert (own.work_pool_name, own.work_queue_name) == ("cpu", CURRICULA)
    schema: Any = own.parameter_openapi_schema
    assert schema["properties"]["experiment"]["enum"] == ["own"] and own.parameters["experiment"] == "own"
    assert "| pretrain | **built** |" in str(own.description)
    alone = prefect_client.read_deployment_by_name("stage/own-finetune")
    assert list(alone.parameters["changes"]) == ["finetune"] and alone.work_pool_name == "gpu"
    assert "The stages before it are reused." in str(alone.description)

    write(tmp_path, "own", **{"epochs = 1.2": "epochs = 0.5"})
    (tmp_path / "broken.toml").unlink()
    assert filled(prefect_client) == ([], [])
    again = prefect_client.read_deployment_by_name("curriculum/own")
    assert again.id == own.id and again.parameters["changes"]["finetune"]["epochs"] == 0.5

    untouched = prefect_client.read_deployment_by_name("stage/own-pretrain").updated
    assert filled(prefect_client) == ([], [])
    assert prefect_client.read_deployment_by_name("stage/own-pretrain").updated == untouched

    (tmp_path / "own.toml").unlink()
    _, lines = filled(prefect_client)
    assert "deployment curriculum/own removed: no experiment has its name" in lines
    with pytest.raises(ObjectNotFound):
        prefect_client.read_deployment_by_name("stage/own-finetune")


def test_an_experiment_without_conversations_has_no_chat_in_its_form(
    prefect_client: SyncPrefectClient, tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTORCLM_STORE", recorded.store.uri)
    kept = recorded.experiment.model_copy(update={"name": "base-only", "chat": None, "finetune": None})
    (tmp_path / "base-only.json").write_text(kept.model_dump_json())
    assert filled(prefect_client)[0] == []
    deployment = prefect_client.read_deployment_by_name("curriculum/base-only")
    assert not {"chat", "finetune"} & set(deployment.parameters["changes"])
    with pytest.raises(ObjectNotFound):
        prefect_client.read_deployment_by_name("stage/base-only-finetune")
    assert "| sample | **reused** |" in str(deployment.description)


def test_the_form_of_an_older_version_and_what_a_person_made_are_told_apart(prefect_client: SyncPrefectClient) -> None:
    flow_id = prefect_client.create_flow_from_name("curriculum")
    prefect_client.create_deployment(flow_id, "curriculum", tags=["vectorclm"])
    prefect_client.create_deployment(flow_id, "by-a-person", tags=["vectorclm"])
    _, lines = filled(prefect_client)
    assert "deployment curriculum/curriculum removed: no experiment has its name" in lines
    assert prefect_client.read_deployment_by_name("curriculum/by-a-person") is not None


def test_a_file_that_cannot_be_read_for_now_keeps_its_forms(prefect_client: SyncPrefectClient, tmp_path: Path) -> None:
    def forms() -> list[Any]:
        named = ["curriculum/typed", *(f"stage/typed-{stage}" for stage in ALONE)]
        return [prefect_client.read_deployment_by_name(name).id for name in named]

    write(tmp_path, "typed")
    filled(prefect_client)
    before, text = forms(), (tmp_path / "typed.toml").read_text(encoding="utf-8")
    for broken in (text[: len(text) // 2] + "[", text.replace('name = "typed"', 'name = "other"'), "\udcff"):
        (tmp_path / "typed.toml").write_text(broken, encoding="utf-8", errors="surrogateescape")
        (problem,), lines = filled(prefect_client)
        assert "typed.toml" in problem and lines == [] and forms() == before
    (tmp_path / "typed.toml").write_text(text, encoding="utf-8")
    assert filled(prefect_client) == ([], [])


def test_a_folder_that_is_gone_for_now_keeps_the_forms_of_its_files(
    prefect_client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mounted := tmp_path / "mounted").mkdir()
    monkeypatch.setenv(FOLDER, str(mounted))
    write(mounted, "afar")
    filled(prefect_client)
    before = prefect_client.read_deployment_by_name("curriculum/afar").id
    mounted.rename(tmp_path / "unmounted")
    (problem,), lines = filled(prefect_client)
    assert f"the folder {mounted}, which {FOLDER} names, cannot be read" in problem and lines == []
    assert prefect_client.read_deployment_by_name("curriculum/afar").id == before
    assert prefect_client.read_deployment_by_name("stage/afar-finetune") is not None
    monkeypatch.delenv(FOLDER)  # now its experiments are gone indeed
    assert "deployment curriculum/afar removed: no experiment has its name" in filled(prefect_client)[1]


def test_a_form_stays_as_long_as_a_run_of_it_has_not_ended(prefect_client: SyncPrefectClient, tmp_path: Path) -> None:
    write(tmp_path, "queued")
    filled(prefect_client)
    form = prefect_client.read_deployment_by_name("curriculum/queued").id
    waiting = prefect_client.create_flow_run_from_deployment(form)
    ended = prefect_client.create_flow_run_from_deployment(form)
    prefect_client.set_flow_run_state(ended.id, Completed(), force=True)
    (tmp_path / "queued.toml").unlink()
    (problem,), lines = filled(prefect_client)
    assert f"the deployment curriculum/queued has the run {waiting.name}, which has not ended" in problem
    assert "deployment stage/queued-finetune removed: no experiment has its name" in lines
    assert prefect_client.read_flow_run(waiting.id).state == waiting.state
    prefect_client.set_flow_run_state(waiting.id, Completed(), force=True)
    assert filled(prefect_client) == ([], ["deployment curriculum/queued removed: no experiment has its name"])
    assert prefect_client.read_flow_run(waiting.id).state is not None  # the record of a run outlives its form


def test_a_schedule_of_a_form_stays_with_its_form_and_is_named_where_its_experiment_is_gone(
    prefect_client: SyncPrefectClient, tmp_path: Path
) -> None:
    write(tmp_path, "mine")
    filled(prefect_client)
    mine = prefect_client.read_deployment_by_name("curriculum/mine")
    hourly = IntervalSchedule(interval=timedelta(hours=1))
    prefect_client.create_deployment_schedules(mine.id, [(hourly, True)])
    write(tmp_path, "mine", **{"epochs = 1.2": "epochs = 0.5"})
    assert filled(prefect_client) == ([], [])
    again = prefect_client.read_deployment_by_name("curriculum/mine")
    assert again.parameters["changes"]["finetune"]["epochs"] == 0.5 and len(again.schedules) == 1

    (tmp_path / "mine.toml").unlink()
    (problem,), lines = filled(prefect_client)
    assert "the deployment curriculum/mine has a schedule, but no experiment has its name" in problem
    assert "deployment stage/mine-finetune removed: no experiment has its name" in lines
    prefect_client.update_deployment_schedule(mine.id, again.schedules[0].id, active=False)  # paused is kept, too
    assert filled(prefect_client) == ([problem], [])
    prefect_client.delete_deployment_schedule(mine.id, again.schedules[0].id)
    assert filled(prefect_client) == ([], ["deployment curriculum/mine removed: no experiment has its name"])


def test_the_description_is_renewed_after_a_run(prefect_client: SyncPrefectClient) -> None:
    filled(prefect_client)
    before = prefect_client.read_deployment_by_name("curriculum/tiny")
    prefect_client.update_deployment(before.id, DeploymentUpdate(description="old"))
    refresh_description("tiny")
    assert prefect_client.read_deployment_by_name("curriculum/tiny").description == before.description
    refresh_description("nobody")  # the run is done whatever the server says


def test_a_form_needs_no_store(
    prefect_client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    for stage in STAGES:
        (tmp_path / "store" / stage).write_text("a file where a folder must be")
    monkeypatch.setenv("VECTORCLM_STORE", str(tmp_path / "store"))
    assert filled(prefect_client)[0] == []
    about = str(prefect_client.read_deployment_by_name("curriculum/tiny").description)
    assert "It is not known what would be reused: the store does not answer (" in about


def test_the_command_fills_the_forms(prefect_client: SyncPrefectClient, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text("")
    command = [sys.executable, "-m", "flows.platform.experiment_forms"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "tiny.toml is not offered" in done.stderr
    assert prefect_client.read_deployment_by_name("curriculum/small").parameters["experiment"] == "small"
