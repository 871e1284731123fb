"""Evaluations on a platform for tests: start one, read its table, schedule one by the page, break the candidate."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import torch
from mlflow import MlflowClient
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import Artifact, FlowRun
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select

from tests.services.browser import click, log_in
from tests.services.platform import Platform, until
from vectorclm.model import CausalLM
from vectorclm.model_config import read_model_config
from vectorclm.store.manifest import SEAL, sealed

LIMITS = {"items": 40, "documents": 20, "prompts": 3, "max_new_tokens": 8}
RUNTIME = {"threads": 1}


def start(platform: Platform, **parameters: Any) -> UUID:
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    values = {"limits": LIMITS, "runtime": RUNTIME, **parameters}
    return platform.client.create_flow_run_from_deployment(deployment.id, parameters=values).id


def rows(platform: Platform) -> list[dict[str, str]]:
    """The newest table of the chat model's results."""
    return list(json.loads(str(_newest(platform, "evaluation-vectorclm-chat-candidate-tiny").data)))


def history_page(platform: Platform) -> str:
    """The page of the chat model's scores over time, to which the newest chart links."""
    chart = _newest(platform, "scores-vectorclm-chat-candidate-tiny")
    (link,) = re.findall(r"\((http\S+/reports/[0-9a-f]{64}\.html)\)", str(chart.data))
    user, _, password = (platform.config.prefect_password or "").partition(":")
    return httpx.get(link, auth=(user, password)).raise_for_status().text


def shows_history(platform: Platform, window: WebDriver) -> bool:
    """Whether Prefect's page of the newest chart draws it."""
    place = f"/artifacts/artifact/{_newest(platform, 'scores-vectorclm-chat-candidate-tiny').id}"
    if not window.current_url.endswith(place):
        window.get(f"{platform.config.prefect_url}{place}")
    drawn = "image => image.src.startsWith('data:image/svg') && image.complete && image.naturalWidth > 500"
    return bool(window.execute_script(f"return [...document.images].some({drawn})"))


def _newest(platform: Platform, key: str) -> Artifact:
    wanted = ArtifactFilter.model_validate({"key": {"any_": [key]}})
    return max(platform.client.read_artifacts(artifact_filter=wanted), key=lambda found: str(found.created))


def register_untrained(platform: Platform, mlflow: MlflowClient, folder: Path) -> None:
    """The candidate's twin with random weights, an artifact of the store `folder`, as the new candidate."""
    version = mlflow.get_model_version_by_alias("vectorclm-chat", "candidate")
    fingerprint = hashlib.sha256(b"untrained").hexdigest()
    place = folder / "finetune" / fingerprint
    shutil.copytree(version.tags["uri"], place)
    config = json.loads((place / "config.json").read_text())
    torch.manual_seed(0)
    CausalLM(read_model_config(config, "config.json")).save_pretrained(place)
    manifest = json.loads((place / "manifest.json").read_text())
    del manifest[SEAL]
    content = {name: (place / name).read_bytes() for name in manifest["files"]}
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}
    (place / "manifest.json").write_bytes(sealed(manifest | {"fingerprint": fingerprint, "files": files}))
    experiment = mlflow.get_experiment_by_name("tiny")
    model = mlflow.create_logged_model(experiment.experiment_id, name="untrained")
    tags = {"uri": str(place), "fingerprint": fingerprint}
    made = mlflow.create_model_version(
        "vectorclm-chat", f"models:/{model.model_id}", model_id=model.model_id, tags=tags
    )
    mlflow.set_registered_model_alias("vectorclm-chat", "candidate", made.version)


def scheduled(platform: Platform, slug: str) -> list[FlowRun]:
    """The runs of the deployment that the scheduler made for a schedule and that ended well."""
    (mine,) = _schedules(platform, slug)
    runs = _runs(platform, "COMPLETED")
    assert all(run.created_by is not None for run in runs if run.auto_scheduled)
    return [run for run in runs if run.created_by is not None and run.created_by.id == mine]


@contextmanager
def schedule_ends(platform: Platform, slug: str) -> Iterator[None]:
    """A schedule that is set in the block, removed after it with the runs that are still to come."""
    try:
        yield
    finally:
        deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
        for mine in _schedules(platform, slug):  # none where the block failed before it was set
            platform.client.delete_deployment_schedule(deployment.id, mine)
            for run in _runs(platform, "SCHEDULED"):  # those that are late stay when a schedule goes
                if run.created_by is not None and run.created_by.id == mine:
                    platform.client.delete_flow_run(run.id)
        until(lambda: not _runs(platform, "PENDING", "RUNNING"), "its last run ends")


def _runs(platform: Platform, *states: str) -> list[FlowRun]:
    """The runs of the deployment `evaluate` in these states."""
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    wanted = {"deployment_id": {"any_": [deployment.id]}, "state": {"type": {"any_": list(states)}}}
    return platform.client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))


def set_schedule(platform: Platform, window: WebDriver, slug: str) -> None:
    """Add a schedule of 10 seconds to the deployment `evaluate`, in its page.

    The page may draw its form anew while its data arrive, and then loses what was written: it is filled in again.
    """
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    window.get(f"{platform.config.prefect_url}/deployments/deployment/{deployment.id}")
    log_in(window, platform)
    for _ in range(3):
        _fill_schedule(window, slug)
        with suppress(AssertionError):
            until(lambda: _schedules(platform, slug), "the schedule is saved", 20)
            return
        window.refresh()
    raise AssertionError(f"the page did not save the schedule: {window.find_element(By.TAG_NAME, 'body').text}")


def _fill_schedule(window: WebDriver, slug: str) -> None:
    click(window, "button", "Schedule")
    place = "//input[@placeholder='Enter a unique identifier for this schedule']"
    until(lambda: window.find_elements(By.XPATH, place), "the form of a schedule", 60)[0].send_keys(slug)
    (value,) = window.find_elements(By.XPATH, "//div[contains(@class, 'p-modal')]//input[@type='number']")
    value.send_keys(Keys.CONTROL, "a")
    value.send_keys("10")
    place = "//div[contains(@class, 'p-modal')]//select[option[normalize-space(.)='Seconds']]"
    Select(window.find_element(By.XPATH, place)).select_by_visible_text("Seconds")
    click(window, "button", "Save")


def _schedules(platform: Platform, slug: str) -> list[UUID]:
    """The ids of the schedules of the deployment `evaluate` that bear this name: one or none."""
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    return [schedule.id for schedule in deployment.schedules if schedule.slug == slug]
