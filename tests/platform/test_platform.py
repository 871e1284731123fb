"""The platform, for real: `vectorclm up`, a browser at the run form, a broken stage, Retry, a cancelled training.

Servers, workers and browser are the real ones, on ports of their own and in a temporary store.
"""

import getpass
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelling, Crashed
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from flows.net import answers
from flows.platform.prefect_server import accepts_writes
from tests.conftest import following, in_turn, one_of
from tests.kill_matrix import CHANGES, RUNTIME, Cell, Killer, Reference
from tests.services.browser import browser, by_text, click, fill, log_in, page, rest, says
from tests.services.platform import Platform, platform_at, until
from tests.services.trigger import (
    by_prefect,
    check_form,
    check_links,
    mlflow_status,
    offered,
    on_platform,
    torch_processes,
)
from vectorclm.config import EXPERIMENTS
from vectorclm.stages import TABLE
from vectorclm.store.artifact import Store
from vectorclm.store.layout import STAGES

__all__ = ["browser", "page"]  # fixtures


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("own")
    place = tmp_path_factory.mktemp("platform") / "store"
    with platform_at(place, new_database=True, vectorclm_experiments=str(folder)) as made:
        yield made


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_the_form_of_an_experiment_shows_its_values_in_the_pipelines_order(platform: Platform, name: str) -> None:
    check_form(platform, name)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"experiment": "tinny"}, "experiment"),
    ({"changes": {"finetune": {"epochs": -1}}}, "changes.finetune.epochs"),
    ({"changes": {"tokenizer": {"vocab_size": 5}}}, "changes.tokenizer.vocab_size"),
    ({"runtime": {"threads": "many"}}, "runtime.threads"),
    ({"changes": {"pretrian": {}}}, "pretrian"),
]


@pytest.mark.parametrize(("parameters", "message"), REFUSED)
def test_bad_values_are_refused_with_their_path(platform: Platform, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefectHTTPStatusError) as refused:
        platform.start(**parameters)
    assert message in refused.value.response.text


@in_turn(0, 2)
def test_a_run_from_the_form_breaks_is_retried_and_reuses(platform: Platform, page: WebDriver) -> None:
    """A person opens the form, is refused, mends it, and starts; the disk breaks a stage, Retry goes on."""
    store = Path(platform.config.vectorclm_store)
    (store / "shards").write_text("a file where a folder must be: the stage cannot write its artifact")
    deployment = platform.client.read_deployment_by_name("curriculum/tiny")
    page.get(f"{platform.config.prefect_url}/deployments/deployment/{deployment.id}/run")
    log_in(page, platform)
    fill(page, "Pretraining", "Token budget", "5")
    fill(page, "Fine-tuning", "Epochs", "0.02")
    fill(page, "Evaluation", "Held-out conversations", "3")
    assert "(Optional)" not in page.find_element(By.TAG_NAME, "body").text.partition("Machine")[0]
    click(page, "button", "Submit")
    until(lambda: says(page, "5 is less than the minimum of 1000"), "the form refuses", 60)
    assert "changes.pretrain.tokens" in page.find_element(By.TAG_NAME, "body").text
    fill(page, "Pretraining", "Token budget", "16384")
    page.execute_script("window.scrollTo(0, 0)")

    def started() -> list[FlowRun]:
        """The run; presses Submit again where the page lost it, which shows the form as long as nothing started."""
        if not (found := platform.client.read_flow_runs()) and page.current_url.endswith("/run"):
            click(page, "button", "Submit")
        return found

    (run,) = until(started, "the run is there", 120)
    rest(page)
    assert run.parameters["changes"]["pretrain"]["tokens"] == 16384
    assert platform.ended(run.id) == "Failed"
    run = platform.run(run.id)
    message = str(run.state and run.state.message)
    todo = f"press Retry on the page of this run in Prefect, or run `vectorclm retry {run.id} --store {store}`"
    assert "stage shards failed" in message and todo in message
    assert run.name.startswith("tiny pretrain.tokens=16384 finetune.epochs=0.02 and 1 more, ")
    assert {"experiment: tiny", "setting: finetune.epochs", "from: UI"} <= set(run.tags)
    assert platform.tasks(run.id)["tokenizer"] == ["Completed"]
    log = until(lambda: [line for line in platform.log(run.id) if "stage shards failed" in line], "the log says why")
    assert len(log) == 1 and not [line for line in platform.log(run.id) if "Traceback" in line or "NoneType" in line]
    until(lambda: "| ✘ | shards" in platform.overview(run.id), "the overview shows what failed", 30)
    assert any("shards: " in line and "trying again" in line for line in platform.log(run.id))
    (store / "shards").unlink()
    page.get(f"{platform.config.prefect_url}/runs/flow-run/{run.id}")
    click(page, "button", "Retry")
    until(lambda: len(by_text(page, "button", "Retry")) > 1, "it asks whether to retry", 60)
    page.execute_script("arguments[0].click()", by_text(page, "button", "Retry")[-1])
    until(lambda: platform.run(run.id).run_count == 2, "the run starts again")
    rest(page)
    assert platform.ended(run.id) == "Completed"
    tasks = platform.tasks(run.id)
    ends = [tasks[name][-1] for name in ("sample", "tokenizer", "shards", "pretrain", "export")]
    assert ends == ["Reused", "Reused", "Completed", "Completed", "Completed"]
    page.get(f"{platform.config.prefect_url}/runs/flow-run/{run.id}")
    until(lambda: says(page, "Completed"), "the page shows the end", 60)
    until(lambda: all(says(page, name) for name in ("pretrain", "finetune", "export")), "the graph shows them", 60)
    shown = {str(found.key): found for found in platform.client.read_artifacts()}
    assert {"pretrain-progress", "finetune-progress", "mlflow", "overview"} <= set(shown)
    assert all(found.description for found in shown.values())
    assert {float(str(shown[f"{name}-progress"].data)) for name in ("pretrain", "finetune")} == {100.0}
    assert platform.config.mlflow_url in str(shown["mlflow"].data)
    assert "| tokenizer | **reused** |" in str(platform.client.read_deployment(deployment.id).description)


def test_the_overview_links_what_a_browser_opens(platform: Platform, page: WebDriver) -> None:
    """First under the artifacts of the run before: 100 %, the results, and links, the report behind the password."""
    (run,) = platform.client.read_flow_runs()
    text = platform.overview(run.id)
    assert ": 100 %" in text and "| world | 25.0% |" in text and text.count("| 100 % |") == len(STAGES)
    check_links(platform, text, page)


def test_both_pages_show_the_values_and_a_dry_run_shows_the_plan(platform: Platform, page: WebDriver) -> None:
    run_id = platform.start(name="my-own name", dry_run=True, changes={"finetune": {"epochs": 2.5}})
    deployment = platform.client.read_deployment_by_name("curriculum/tiny")
    page.get(f"{platform.config.prefect_url}/v2/deployments/deployment/{deployment.id}/run")

    def filled() -> set[str]:
        return {str(field.get_attribute("value")) for field in page.find_elements(By.TAG_NAME, "input")}

    asked = "input[type='password']"
    until(lambda: filled() > {"0.004"} or page.find_elements(By.CSS_SELECTOR, asked), "the new page is there", 60)
    if page.find_elements(By.CSS_SELECTOR, asked):
        log_in(page, platform)
    until(lambda: filled() >= {"6000000", "0.02", "0.004", "1000000", "1.2"}, "the new page shows the values", 60)
    assert "Fine-tuning (Optional)" not in page.find_element(By.TAG_NAME, "body").text and says(page, "Token budget")
    assert platform.ended(run_id) == "DryRun"
    run = platform.run(run_id)
    assert run.name == "my-own name" and run.work_queue_name == "default"  # it waits for nobody
    (plan,) = [found for found in platform.client.read_artifacts() if found.key == "plan"]
    assert "| sample | **reused** |" in str(plan.data) and "| finetune | **built** |" in str(plan.data)


def test_a_file_of_ones_own_is_offered_without_a_restart_and_the_command_line_starts_it(platform: Platform) -> None:
    folder = Path(str(platform.config.vectorclm_experiments))
    text = (EXPERIMENTS / "tiny.toml").read_text().replace('name = "tiny"', 'name = "own"')
    (folder / "own.toml").write_text(text.replace("epochs = 1.2", "epochs = 0.02"))

    until(lambda: offered(platform, "own"), "the file is offered", 60)
    (folder / "own.toml").write_text(text.replace("epochs = 1.2", "epochs = 0.03"))

    def shown() -> float:
        found = offered(platform, "own")
        return 0.0 if found is None else float(found.parameters["changes"]["finetune"]["epochs"])

    until(lambda: shown() == 0.03, "the form shows the new value", 60)
    done = on_platform(platform, "own", "--dry-run", "--set", "pretrain.batch_size=16")
    assert done.returncode == 0, done.stderr
    run_id = UUID(done.stdout.strip().rpartition("/")[2])
    by_prefect(platform, "curriculum/own", "dry_run=true", 'settings={"finetune.epochs": 3.0}')
    assert platform.ended(run_id) == "DryRun"
    started = platform.run(run_id)
    assert started.name.startswith("own pretrain.batch_size=16 dry run, ")
    user = f"user: {getpass.getuser()}"
    assert {"experiment: own", "setting: pretrain.batch_size", "from: command line", user} <= set(started.tags)
    named = "own finetune.epochs=3 dry run"

    def done_by_prefect() -> bool:
        runs = [run for run in platform.client.read_flow_runs() if named in run.name]
        return any(run.state is not None and run.state.is_final() for run in runs)

    until(done_by_prefect, "Prefect's own run is named, and ends")  # a deployment with a run that waits stays
    assert on_platform(platform, "owl").returncode == 2
    (folder / "own.toml").unlink()
    until(lambda: offered(platform, "own") is None, "what is gone is offered no more", 60)


def test_the_page_switches_a_schedule_on_and_off(platform: Platform, page: WebDriver) -> None:
    """With the password that it asked for once, as every other page."""
    deployment = platform.client.read_deployment_by_name("evaluate/evaluate")
    page.get(f"{platform.config.prefect_url}/deployments/deployment/{deployment.id}")

    def switches() -> list[WebElement]:
        return page.find_elements(By.CSS_SELECTOR, "[role='switch']")

    def shown(number: int) -> bool:
        return switches()[number].get_attribute("aria-checked") == "true"

    def active() -> bool:
        return any(schedule.active for schedule in platform.client.read_deployment(deployment.id).schedules)

    def click_to(on: bool, number: int) -> bool:
        """Click the switch where it shows the other state: a click while the page renews itself is lost."""
        if shown(number) != on:
            page.execute_script("arguments[0].click()", switches()[number])
        return active() == on and shown(number) == on

    asked = "input[type='password']"
    until(lambda: switches() or page.find_elements(By.CSS_SELECTOR, asked), "the page is there", 60)
    if not switches():  # this test runs alone
        log_in(page, platform)
    until(lambda: switches() and not all(map(shown, range(len(switches())))), "the schedules' switches", 60)
    number = max(number for number in range(len(switches())) if not shown(number))
    for on in (True, False):
        until(lambda on=on: click_to(on, number), f"the schedule's switch is {'on' if on else 'off'}", 60)


@in_turn(1, 2)
@in_turn(0, 3)
def test_retry_from_the_command_line(platform: Platform) -> None:
    """With another setting what depends on it is made anew; with none, stages are made again and compared."""
    (before,) = [run for run in platform.client.read_flow_runs() if run.name.startswith("tiny pretrain.tokens=16384")]
    changed = platform.command("retry", str(before.id), "--set", "finetune.epochs=0.03")
    assert changed.returncode == 0, changed.stderr
    run_id = UUID(changed.stdout.strip().rpartition("/")[2])
    assert platform.ended(run_id) == "Completed"
    tasks = platform.tasks(run_id)
    assert [tasks[name] for name in ("pretrain", "evaluate_base", "finetune", "export")] == [
        ["Reused"], ["Reused"], ["Completed"], ["Completed"]
    ]  # fmt: skip
    again = platform.command("retry", str(run_id), "--from", "finetune")
    again_id = UUID(again.stdout.strip().rpartition("/")[2])
    assert platform.ended(again_id) == "Completed"
    tasks = platform.tasks(again_id)
    assert [tasks[name] for name in ("pretrain", "evaluate_base", "finetune", "evaluate", "export")] == [
        ["Reused"], ["Reused"], ["Reproduced"], ["Reproduced"], ["Reproduced"]
    ]  # fmt: skip
    assert platform.command("retry", "no such run").returncode == 2


LONG = {"settings": {"pretrain.phases": [{"tokens": 40_000_000}]}}


@in_turn(0, 2)
def test_a_cancelled_training_leaves_no_process(platform: Platform, page: WebDriver) -> None:
    """Another run waits for the devices meanwhile, shows so, and gets its turn."""
    run_id = platform.start(name="the first", changes=LONG, runtime={"threads": 1})
    until(lambda: torch_processes(platform), "a training runs")
    second, third = (platform.start(changes=LONG, runtime={"threads": 1}) for _ in range(2))
    until(lambda: platform.run(third).state_name == "Queued", "the others wait")
    state = platform.run(second).state
    assert state is not None and state.message == "waits for the first to end; place 1 in the queue"
    page.get(f"{platform.config.prefect_url}/runs/flow-run/{run_id}")
    until(lambda: says(page, "Running"), "the page shows it", 60)
    click(page, "button", "Cancel")
    click(page, "button", "Confirm")
    assert platform.ended(run_id) == "Cancelled"
    rest(page)
    until(lambda: mlflow_status(platform, run_id) == {"KILLED"}, "MLflow's runs are closed", 60)
    until(lambda: platform.run(second).state_name == "Running" and torch_processes(platform), "the second has its turn")
    assert platform.run(third).state_name == "Queued"
    platform.client.set_flow_run_state(third, Cancelling())
    platform.client.set_flow_run_state(second, Cancelling())
    assert {platform.ended(second), platform.ended(third)} == {"Cancelled"}
    until(lambda: not torch_processes(platform), "no process is left", 15)


@in_turn(1, 2)
@pytest.mark.parametrize("cell", one_of([Cell("flow", "pretrain"), Cell("flow", "finetune")]), ids=str)
def test_a_killed_run_starts_again_by_itself_and_ends_in_the_same_model(
    platform: Platform, reference: Reference, cell: Cell
) -> None:
    """kill -9 of the flow's process in a training: no child survives, and the automation starts the run again."""
    killer = Killer(platform.config, lambda: platform.command("doctor"), platform.client)
    outcome = killer.run(cell, reference)
    assert outcome.end == "by itself" and outcome.states.count("Rescued") == 1


@in_turn(1, 3)
def test_stages_are_placed_on_workers_of_the_pools_and_train_on_two_ranks(platform: Platform) -> None:
    """Of the curriculum before, tuning is changed: what follows are runs of their own, under one run in MLflow."""
    settings = {**CHANGES["settings"], "finetune.epochs": 1.0}
    runtime = {**RUNTIME, "placement": "pools", "processes": 2}
    run_id = platform.start(experiment="tiny", changes={**CHANGES, "settings": settings}, runtime=runtime)
    assert platform.ended(run_id) == "Completed"
    parts = {run.name: run for run in platform.client.read_flow_runs() if f"part of {run_id}" in run.tags}
    rerun = [row for row in TABLE if row.name in following("finetune")]
    pools = {f"{row.name} of tiny": "gpu" if row.own_process else "cpu" for row in rerun}
    assert {name: run.work_pool_name for name, run in parts.items()} == pools
    store, client = Store(platform.config.vectorclm_store), MlflowClient(platform.config.mlflow_url)
    (chat,) = [one for found in store.list("finetune") if (one := store.find("finetune", found)).summary["steps"] < 60]
    assert chat.manifest["environment"]["world_size"] == 2
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    query = f"tags.`prefect.flow_run_id` = '{run_id}' and tags.stage = 'curriculum'"
    (curriculum,) = client.search_runs([experiment.experiment_id], query)
    query = f"tags.`mlflow.parentRunId` = '{curriculum.info.run_id}' and tags.state = 'built'"
    made = {run.data.tags["stage"] for run in client.search_runs([experiment.experiment_id], query)}
    assert made == following("finetune")


def test_the_doctor_starts_a_dead_worker_and_mends_what_was_removed(platform: Platform) -> None:
    """A run that outlives its worker goes on, also where it counts as crashed, and can still be cancelled."""
    run_id = platform.start(experiment="tiny", changes=LONG, runtime={"threads": 1})
    until(lambda: torch_processes(platform), "a training runs")
    (record,) = (Path(platform.config.vectorclm_store) / "platform").glob("worker-cpu.json")
    os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
    for automation in platform.client.read_automations():
        platform.client.delete_automation(automation.id)
    done = platform.command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker(s) online, started again" in done.stdout
    assert done.stdout.count("automation created") == 4
    again = platform.command("doctor")
    assert again.returncode == 0 and "started again" not in again.stdout and "created" not in again.stdout
    assert "job template" not in again.stdout
    assert torch_processes(platform)
    platform.client.set_flow_run_state(run_id, Crashed(message="as the automation does it"), force=True)
    until(lambda: platform.run(run_id).state_name == "Running", "it was only not heard, and puts itself right")
    pid = int(str(platform.run(run_id).infrastructure_pid).rpartition(":")[2])
    platform.client.set_flow_run_state(run_id, Cancelling())
    assert platform.ended(run_id) == "Cancelled"
    until(lambda: not torch_processes(platform) and not psutil.pid_exists(pid), "no process is left", 30)
    assert platform.run(run_id).state_name == "Cancelled"  # its process reported no crash when it ended


@in_turn(2, 3)
def test_a_run_whose_process_and_worker_and_server_are_killed_goes_on_after_up(platform: Platform) -> None:
    """It is noticed while the server lives, closed in MLflow, and starts again after the next `up`, from its step."""
    store = Store(platform.config.vectorclm_store)

    def kept() -> set[str]:
        return {f"{one}/{step}" for one in store.list("checkpoints") for step in store.list(f"checkpoints/{one}")}

    before = kept()
    run_id = platform.start(changes=LONG, runtime={"threads": 1, "checkpoint_interval": 4})
    until(lambda: torch_processes(platform) and kept() - before, "the training has a new checkpoint")
    until(lambda: mlflow_status(platform, run_id) == {"RUNNING"}, "MLflow has its runs")
    before_kill = platform.resumptions(run_id)  # checkpoints of an earlier run of the same training count
    killer = Killer(platform.config, lambda: None, platform.client)
    killer._gone(killer._kill("worker and flow", run_id))
    until(lambda: platform.run(run_id).state_name == "Crashed", "its end is noticed", 15)
    until(lambda: mlflow_status(platform, run_id) == {"KILLED"}, "MLflow's runs are closed", 15)
    until(lambda: any("it starts again by itself" in line for line in platform.log(run_id)), "the log says so", 15)
    platform.broken = True
    (process,) = [found for one in platform.config.servers()[:1] if (found := one.process())]
    process.kill()
    process.wait(60)
    assert platform.command("up").returncode == 0
    until(lambda: platform.resumptions(run_id) > before_kill, "it goes on", 120)
    assert [state.name for state in platform.client.read_flow_run_states(run_id)].count("Rescued") == 1
    platform.client.set_flow_run_state(run_id, Cancelling())
    assert platform.ended(run_id) == "Cancelled"
    until(lambda: not torch_processes(platform), "no process is left", 30)


def test_a_locked_database_is_noticed(platform: Platform) -> None:
    """Prefect's server stays healthy while nothing can be written."""
    platform.breaks()
    database = sqlite3.connect(platform.config.home / ".prefect" / "prefect.db", isolation_level=None, timeout=60)
    database.execute("BEGIN IMMEDIATE")
    assert answers(f"{platform.config.prefect_url}/api/health")
    assert not accepts_writes(platform.config, 2)
    database.execute("ROLLBACK")
    until(lambda: accepts_writes(platform.config, 2), "it is written again")


def test_up_with_other_settings_asks_for_down_first(platform: Platform) -> None:
    done = platform.command("up", environment={"PREFECT_AUTH": "admin:another"})
    assert done.returncode == 2
    assert "prefect-server runs with other settings: run `vectorclm down`" in done.stderr


def test_up_is_told_when_a_port_is_taken(platform: Platform, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "up", "--store", str(tmp_path)]
    command += ["--prefect-port", str(platform.config.prefect_port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert f"port {platform.config.prefect_port} is taken" in done.stderr
