"""Checks of what a platform offers and shows: an experiment's form, an overview's links, a deployment of a file."""

import re
import subprocess
import sys
from contextlib import suppress
from uuid import UUID

import httpx
import psutil
from mlflow import MlflowClient
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from selenium.webdriver.remote.webdriver import WebDriver

from flows.form import Changes, chosen, values
from tests.services.browser import says
from tests.services.platform import Platform, clean, until
from vectorclm.config import load_experiment

SECTIONS = ["seed", "sample", "tokenizer", "shards", "chat", "model", "pretrain", "finetune", "evaluate"]
PARAMETERS = ["experiment", "dry_run", "changes", "settings", "data", "again_from", "runtime"]


def check_form(platform: Platform, name: str) -> None:
    """The form of an experiment has its values, with title, bounds and unit each, in the order of the pipeline."""
    deployment = platform.client.read_deployment_by_name(f"curriculum/{name}")
    schema, experiment = deployment.parameter_openapi_schema, load_experiment(name)[0]
    assert schema is not None
    fields = schema["properties"]
    assert sorted(fields, key=lambda each: fields[each]["position"]) == PARAMETERS
    sections = fields["changes"]["properties"]
    assert sorted(sections, key=lambda each: sections[each]["position"]) == SECTIONS
    of_fields = [sections[each] for each in SECTIONS if each != "seed"]
    for section in (schema, fields["changes"], *of_fields):
        assert set(section["required"]) == set(section["properties"])  # Prefect calls others optional
    for field in (field for section in of_fields for field in section["properties"].values()):
        assert field["title"] and field["description"] and "anyOf" not in field and "default" in field
        assert {"minimum", "exclusiveMinimum"} & set(field)
    for field in schema["definitions"]["Runtime"]["properties"].values():
        assert field["description"] and "anyOf" not in field
        assert field["type"] not in ("integer", "number") or {"minimum", "exclusiveMinimum"} & set(field)
    given = deployment.parameters["changes"]
    assert given == values(experiment) and given["pretrain"]["tokens"] == experiment.pretrain.tokens
    assert chosen(name, Changes.model_validate(given))[0] == experiment
    about = str(deployment.description)
    assert "| pretrain | **built" in about and "training on A100" in about


def check_links(platform: Platform, text: str, page: WebDriver) -> None:
    """The links of an overview open in a browser; the report asks for the platform's password."""
    links = dict(re.findall(r"\[([\w ]+)\]\((\S+?)\)", text))
    assert {"run in MLflow", "report", "chat model", "base model", "data"} <= set(links)
    user, password = str(platform.config.prefect_password).split(":")
    report = links["report"]
    assert httpx.get(report).status_code == httpx.get(report, auth=(user, "another")).status_code == 401
    found = httpx.get(report, auth=(user, password))
    assert found.status_code == 200 and "<svg" in found.text and "<script" not in found.text
    for outside in ("/reports/..%2Flocks", "/reports/own.html"):
        place = report.partition("/reports/")[0] + outside
        assert httpx.get(place, auth=(user, password)).status_code == 404
    page.get(report.replace("http://", f"http://{user}:{password}@"))
    until(lambda: says(page, "chat model"), "the browser shows the report", 60)
    for title, said in (("run in MLflow", "tiny"), ("chat model", "vectorclm-chat"), ("data", "shards")):
        page.get(links[title])
        until(lambda said=said: says(page, said), f"{title} opens", 60)


def offered(platform: Platform, name: str) -> DeploymentResponse | None:
    """The deployment of an experiment, if there is one."""
    with suppress(ObjectNotFound):
        return platform.client.read_deployment_by_name(f"curriculum/{name}")
    return None


def on_platform(platform: Platform, name: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """`vectorclm run NAME --on-platform` with these options."""
    command = [sys.executable, "-m", "flows.cli", "run", name, "--on-platform", *options]
    command += ["--store", platform.config.vectorclm_store]
    return subprocess.run(command, env=clean(), capture_output=True, text=True, timeout=100, check=False)


def by_prefect(platform: Platform, deployment: str, *parameters: str) -> None:
    """Prefect's own command line starts a deployment."""
    command = [sys.executable, "-m", "prefect", "deployment", "run", deployment]
    command += [part for parameter in parameters for part in ("--param", parameter)]
    environment = clean() | platform.config.client_environment()
    subprocess.run(command, env=environment, capture_output=True, timeout=100, check=True)


def torch_processes(platform: Platform) -> list[psutil.Process]:
    """Processes that train or score for this platform's store."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "vectorclm" in line and "--relay" in line and platform.config.vectorclm_store in line:
            found.append(process)
    return found


def mlflow_status(platform: Platform, run_id: UUID, name: str = "tiny") -> set[str]:
    """The statuses of the unfinished and killed runs of a flow run in MLflow: its own and those of its trainings."""
    client = MlflowClient(platform.config.mlflow_url)
    (experiment,) = client.search_experiments(filter_string=f"name = '{name}'")
    query = f"tags.`prefect.flow_run_id` = '{run_id}' and attributes.status != 'FINISHED'"
    return {run.info.status for run in client.search_runs([experiment.experiment_id], query)}
