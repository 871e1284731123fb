"""The deployments of experiments on a real server: created, filled with their values, renewed and removed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema

from flows.deployments import curriculum_run, stage_run
from flows.experiments import FOLDER
from flows.platform.experiment_forms import ALONE, fill_forms, refresh_description
from tests.services.curricula import Recorded
from vectorclm.config import EXPERIMENTS
from vectorclm.store.layout import STAGES


@pytest.fixture(autouse=True)
def templates(prefect_client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployments with the schema of their flow, as `vectorclm up` creates them; a folder of experiments."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("VECTORCLM_STORE", str(tmp_path / "empty"))
    for pool in ("cpu", "gpu"):
        prefect_client.create_work_pool(WorkPoolCreate(name=pool, type="process"), overwrite=True)
    for flow, name, pool in ((curriculum_run, "tiny", "cpu"), (stage_run, "finetune", "gpu")):
        prefect_client.create_deployment(
            prefect_client.create_flow_from_name(flow.name),
            name,
            entrypoint=f"flows.deployments.{flow.fn.__name__}",
            parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
            work_pool_name=pool,
        )


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
    assert own.entrypoint == "flows.deployments.curriculum_run" and own.work_pool_name == "cpu"
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
