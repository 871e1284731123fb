"""A person's walks through the pages, for real: start, watch, run a stage again, cancel, and go on.

The platform offers a very small experiment of its own, so that its forms can be used as they are.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from tests.conftest import KILLS
from tests.services.browser import browser, by_text, click, fill, fill_new, log_in, page, rest, says
from tests.services.platform import Platform, platform_at, until
from tests.services.trigger import mlflow_status, torch_processes
from tests.test_curriculum import mini
from vectorclm.store.artifact import Store

__all__ = ["browser", "page"]  # fixtures

TYPED = "by the new page"
LONG = {"settings": {"pretrain.phases": [{"tokens": 40_000_000}]}}

pytestmark = pytest.mark.skipif(KILLS < 10, reason="minutes: VECTORCLM_KILLS=10; test_platform walks in every run")


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("own")
    own = mini().model_copy(update={"name": "walk"})
    (folder / "walk.json").write_text(own.model_dump_json())
    with platform_at(tmp_path_factory.mktemp("platform") / "store", vectorclm_experiments=str(folder)) as made:
        yield made


def open_form(platform: Platform, page: WebDriver, deployment: str, ui: str = "") -> None:
    """The run form of a deployment, in Prefect's page or in its new one (`/v2`)."""
    found = platform.client.read_deployment_by_name(deployment)
    page.get(f"{platform.config.prefect_url}{ui}/deployments/deployment/{found.id}/run")
    until(lambda: page.find_elements(By.CSS_SELECTOR, "input[type='password']") or says(page, "Epochs"), "the form", 60)
    if not says(page, "Epochs"):
        log_in(page, platform)
    until(lambda: says(page, "Epochs"), "the form", 60)


def submit(platform: Platform, page: WebDriver) -> UUID:
    """Press Submit; once more where no run began, as a page that renews itself loses a click."""
    before = {run.id for run in platform.client.read_flow_runs()}

    def new() -> list[UUID]:
        return [run.id for run in platform.client.read_flow_runs() if run.id not in before]

    for _ in range(3):
        click(page, "button", "Submit")
        with suppress(AssertionError):
            (run_id,) = until(new, "the run is there", 30)
            rest(page)
            return run_id
    raise AssertionError(f"the page started no run: {page.find_element(By.TAG_NAME, 'body').text}")


def cancel(platform: Platform, page: WebDriver, run_id: UUID) -> None:
    """Cancel a run in its page, which asks whether to."""
    page.get(f"{platform.config.prefect_url}/runs/flow-run/{run_id}")
    asked = "input[type='password']"
    until(lambda: page.find_elements(By.CSS_SELECTOR, asked) or by_text(page, "button", "Cancel"), "the page", 60)
    if page.find_elements(By.CSS_SELECTOR, asked):  # this test runs alone
        log_in(page, platform)
    click(page, "button", "Cancel")
    click(page, "button", "Confirm")


def configs(platform: Platform, stage: str) -> list[dict[str, Any]]:
    """The settings in the manifests of a stage's artifacts."""
    store = Store(platform.config.vectorclm_store)
    found = [store.find(stage, fingerprint) for fingerprint in store.list(stage)]
    return [artifact.manifest["config"] for artifact in found if artifact is not None]


def test_the_new_page_starts_a_run_with_a_typed_name_and_a_changed_value(platform: Platform, page: WebDriver) -> None:
    """The overview renews itself while the run is at work; in the end each of its links opens."""
    open_form(platform, page, "curriculum/walk", "/v2")
    fill_new(page, "Run Name", TYPED)
    fill_new(page, "Epochs", "0.75")
    run_id = submit(platform, page)
    texts: list[str] = []

    def ended() -> bool:
        if (text := platform.overview(run_id)) not in texts:
            texts.append(text)
        state = platform.run(run_id).state
        return state is not None and state.is_final()

    until(ended, "the run ends")
    run = platform.run(run_id)
    assert (run.name, run.state_name) == (TYPED, "Completed") and "setting: finetune.epochs" in run.tags
    assert [config["epochs"] for config in configs(platform, "finetune")] == [0.75]
    shares = [int(share) for text in texts for share in re.findall(r"^## .*: (\d+) %$", text, re.MULTILINE)]
    assert shares == sorted(shares) and len(set(shares)) > 2 and shares[-1] == 100
    links = re.findall(r"\]\((http\S+)\)", texts[-1])
    user, password = str(platform.config.prefect_password).split(":")
    assert len(links) >= 5 and {httpx.get(link, auth=(user, password)).status_code for link in links} == {200}


def test_the_form_of_a_stage_refuses_a_rate_and_tunes_again_with_another(platform: Platform, page: WebDriver) -> None:
    """The stages above it are those of the run before."""
    open_form(platform, page, "stage/walk-finetune")
    fill(page, "Fine-tuning", "Learning rate", "2")
    click(page, "button", "Submit")
    until(lambda: says(page, "2 is greater than the maximum of 1"), "the form refuses", 60)
    fill(page, "Fine-tuning", "Learning rate", "0.003")
    run_id = submit(platform, page)
    assert platform.ended(run_id) == "Completed"
    assert platform.tasks(run_id) == {"finetune": ["Completed"]}
    rates = {config["optimizer"]["learning_rate"] for config in configs(platform, "finetune")}
    assert 0.003 in rates and len(rates) == 2 and len(configs(platform, "pretrain")) == 1
    assert platform.run(run_id).name.startswith("finetune of walk finetune.learning_rate=0.003, ")


def test_the_page_cancels_a_training_and_retry_goes_on_from_its_step(platform: Platform, page: WebDriver) -> None:
    runtime = {"threads": 1, "checkpoint_interval": 4}
    run_id = platform.start("curriculum/walk", changes=LONG, runtime=runtime)
    checkpoints = Path(platform.config.vectorclm_store) / "checkpoints"
    until(lambda: list(checkpoints.glob("*/*")), "the training has a checkpoint")
    cancel(platform, page, run_id)
    assert platform.ended(run_id) == "Cancelled"
    until(lambda: not torch_processes(platform), "no process is left", 15)
    until(lambda: mlflow_status(platform, run_id, "walk") == {"KILLED"}, "MLflow's runs are closed", 60)
    before = platform.resumptions(run_id)  # an earlier run of the same training may have left a checkpoint
    page.get(f"{platform.config.prefect_url}/runs/flow-run/{run_id}")
    click(page, "button", "Retry")
    until(lambda: len(by_text(page, "button", "Retry")) > 1, "it asks whether to retry", 60)
    page.execute_script("arguments[0].click()", by_text(page, "button", "Retry")[-1])
    rest(page)
    until(lambda: platform.resumptions(run_id) > before, "it goes on and says so", 120)
    cancel(platform, page, run_id)
    assert platform.ended(run_id) == "Cancelled"
