"""Every stage of the table can be placed on a worker: it has a deployment, in a pool that exists."""

import re
from pathlib import Path

from flows.execution.placement import deployment_of
from flows.platform.config import POOLS
from flows.platform.provision import prefect_file
from vectorclm.stages import TABLE


def test_every_stage_has_a_deployment_of_its_own_in_a_pool() -> None:
    content = prefect_file()
    entrypoint = "flows.deployments.stage_run"
    stages = {found["name"]: found for found in content["deployments"] if found["entrypoint"] == entrypoint}
    assert list(stages) == [deployment_of(row.name) for row in TABLE]
    for row in TABLE:
        found = stages[deployment_of(row.name)]
        assert found["parameters"] == {"stage": row.name} and found["work_pool"]["name"] in POOLS
    names = [found["name"] for found in content["deployments"]]
    assert len({*names}) == len(names)  # one address in the UI and in `prefect deployment run`
    assert stages["pretrain"]["work_pool"]["name"] == "gpu" and stages["sample"]["work_pool"]["name"] == "cpu"


def test_the_page_names_every_stage_with_its_deployment_and_pool() -> None:
    page = Path(__file__).parents[2].joinpath("flows", "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`[^|]* \| `stage/(\w+)`[^|]* \| `(\w+)` \|$", page, re.MULTILINE)
    pools = {found["name"]: found["work_pool"]["name"] for found in prefect_file()["deployments"]}
    assert rows == [(row.name, deployment_of(row.name), pools[deployment_of(row.name)]) for row in TABLE]
