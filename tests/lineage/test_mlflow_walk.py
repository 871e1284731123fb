"""A person's walk through MLflow's pages: from a version to its run, its data and back; deletions, and the next run."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from tests.conftest import in_turn
from tests.lineage.conftest import curriculum, pinned
from tests.services.browser import browser, click, says
from tests.services.mlflow_server import MLflowServer
from tests.services.platform import until

__all__ = ["browser"]  # a fixture


@pytest.fixture
def client(world: SimpleNamespace, server: MLflowServer) -> Iterator[MlflowClient]:
    yield MlflowClient(server.uri)


def shown(browser: WebDriver, css: str, what: str) -> list[WebElement]:
    return until(lambda: browser.find_elements(By.CSS_SELECTOR, css), what, 60)


def visit(browser: WebDriver, page: str, said: str) -> None:
    browser.get("about:blank")  # else a page that differs behind its # would not load anew
    browser.get(page)
    until(lambda: says(browser, said), f"{page} says {said!r}", 60)


def delete_version(browser: WebDriver) -> None:
    """Press Delete in the menu of a version's page, and again where it asks."""
    shown(browser, "[data-testid='overflow-menu-trigger']", "the menu")[0].click()
    shown(browser, "[role='menuitem'][data-testid='delete']", "its entry")[0].click()
    until(lambda: says(browser, "Delete Model Version"), "it asks", 60)
    shown(browser, ".du-bois-light-modal-footer .du-bois-light-btn-primary", "its button")[0].click()


def delete_experiment(browser: WebDriver, place: str) -> None:
    """Choose an experiment in the list, and press Delete, and again where it asks."""
    (box,) = shown(browser, f"input[id='{place}'][type='checkbox']", "the box of the experiment")
    browser.execute_script("arguments[0].click()", box)
    click(browser, "button", "Delete")
    until(lambda: says(browser, "Delete 1 Experiment"), "it asks", 60)
    shown(browser, ".du-bois-light-modal-footer .du-bois-light-btn-primary", "its button")[0].click()


@in_turn(0, 2)
def test_the_pages_lead_from_a_version_to_its_run_its_data_and_back(
    client: MlflowClient, server: MLflowServer, browser: WebDriver
) -> None:
    version = client.get_model_version("vectorclm-chat", "1")
    page = f"{server.uri}/#/models/vectorclm-chat/versions/1"
    visit(browser, page, "what it holds")
    assert says(browser, "The chat model of the experiment mini.") and says(browser, "identified by its content")
    click(browser, "a", client.get_run(str(version.run_id)).info.run_name)
    until(lambda: browser.current_url.endswith(f"/runs/{version.run_id}"), "its run opens", 60)
    (data,) = client.get_run(str(version.run_id)).inputs.dataset_inputs
    name = f"{data.dataset.name} ({data.dataset.digest})"
    until(lambda: says(browser, name), "the run has its data", 60)
    click(browser, "*[not(*)]", name)
    for said in ("Data details", f"Digest: {data.dataset.digest}", "Source type: Local", "input_ids"):
        until(lambda said=said: says(browser, said), f"the data's {said}", 60)
    visit(
        browser, f"{page.partition('#')[0]}#/experiments/{experiment(client)}/runs/{version.run_id}", "vectorclm-chat"
    )
    click(browser, "a", "vectorclm-chat v1")
    until(lambda: browser.current_url.endswith("/models/vectorclm-chat/versions/1"), "and back to the version", 60)


def experiment(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(pinned().name)
    assert found is not None
    return str(found.experiment_id)


@in_turn(1, 2)
def test_what_the_pages_delete_is_made_again_and_said_once(
    world: SimpleNamespace,
    client: MlflowClient,
    server: MLflowServer,
    browser: WebDriver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "flows.tracking")
    visit(browser, f"{server.uri}/#/models/vectorclm-chat/versions/2", "what it holds")
    delete_version(browser)
    gone = "name = 'vectorclm-chat'"
    until(lambda: {str(found.version) for found in client.search_model_versions(gone)} == {"1"}, "the version goes", 60)
    curriculum(pinned(f"finetune.epochs={pinned().finetune.epochs / 2}"), world.store)
    assert str(client.get_model_version_by_alias("vectorclm-chat", "candidate").version) == "3"
    assert [item.getMessage() for item in caplog.records if item.name.startswith("flows.tracking")] == []
    place = experiment(client)
    visit(browser, f"{server.uri}/#/experiments", "Time created")
    delete_experiment(browser, place)
    until(lambda: client.get_experiment(place).lifecycle_stage == "deleted", "the experiment goes", 60)
    curriculum(pinned(), world.store)
    (said,) = (item.getMessage() for item in caplog.records if item.name.startswith("flows.tracking"))
    assert f"was deleted, so this run is recorded in {pinned().name} 2" in said
    visit(browser, f"{server.uri}/#/models/vectorclm-chat/versions/3", "what it holds")
