"""Against one real Prefect server: the pools of infra/pools/ as it stores them, and its password."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import yaml

from flows.net import HEARTBEAT_SECONDS
from flows.platform import password
from flows.platform.prefect_server import prefect_server
from tests.platform.test_config import ROOT, placeholders, pool_template, program_passes
from vectorclm.errors import ConfigError
from vectorclm.runtime.processes import process_identity

IN_BLOCK = "from a block"
# Creates the pool and its blocks on the server, then renders a job from what the server stored, as a worker does.
RENDER = """
import asyncio, json, sys
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values, resolve_block_document_references
from prefect.workers.base import BaseJobConfiguration as Job

async def main():
    kind, template, values, secrets = json.load(sys.stdin)
    for name in secrets:
        await Secret(value="from a block").save(name, overwrite=True)
    async with get_client() as client:
        pool = await client.create_work_pool(
            WorkPoolCreate(name=f"{kind}-{len(values)}", type=kind, base_job_template=template), overwrite=True
        )
        stored = pool.base_job_template
        defaults = Job._get_base_config_defaults(stored["variables"]["properties"])
        rendered = apply_values(stored["job_configuration"], {**defaults, **values})
        rendered = await resolve_block_document_references(rendered, client=client)
    print(json.dumps(rendered))

asyncio.run(main())
"""


OWN_SERVER = """
import os, sys
from pathlib import Path
from flows.platform.prefect_server import prefect_server

with prefect_server(Path(sys.argv[1])) as server:
    print(server, os.environ["PREFECT_API_AUTH_STRING"])
"""


def test_a_run_finds_the_password_of_the_platform_of_its_store_and_asks_for_another(
    prefect_api: dict[str, str], tmp_path: Path
) -> None:
    auth = prefect_api["PREFECT_API_AUTH_STRING"]
    without = {name: value for name, value in prefect_api.items() if "AUTH" not in name}
    command = [sys.executable, "-m", "flows.cli", "run", "tiny", "--store", str(tmp_path)]
    done = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "set PREFECT_AUTH=user:password" in done.stderr
    assert done.stderr.count("\n") == 1 and auth not in done.stderr
    file = password.place(tmp_path)
    file.parent.mkdir()
    port = urlsplit(prefect_api["PREFECT_API_URL"]).port
    (process,) = [
        each.pid for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr[1] == port
    ]
    record = process_identity(psutil.Process(process))  # as `vectorclm up` leaves it
    file.with_name("prefect-server.json").write_text(json.dumps(record))
    file.write_text(f"PREFECT_API_URL={prefect_api['PREFECT_API_URL']}\nPREFECT_API_AUTH_STRING={auth}\n")
    command = [sys.executable, "-c", OWN_SERVER, str(tmp_path / ".prefect")]
    done = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert done.stdout == f"None {auth}\n" and done.stderr == ""
    for named, line in (
        ({"PREFECT_AUTH": auth}, ""),
        ({"PREFECT_API_AUTH_STRING": auth}, ""),  # as in a shell that has loaded the file
    ):
        done = subprocess.run(command, env=without | named, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == (f"None {auth}\n", line)
    file.unlink()
    older = {"PREFECT_API_AUTH_STRING": auth}
    done = subprocess.run(command, env=without | older, capture_output=True, text=True, check=False)
    assert done.stdout == f"None {auth}\n"
    assert done.stderr == "PREFECT_API_AUTH_STRING is read: PREFECT_AUTH is its name for vectorclm\n"


def test_a_retry_in_a_container_uses_the_server_that_the_environment_names(
    prefect_api: dict[str, str], tmp_path: Path
) -> None:
    """There the server is another machine, and nothing listens at a port of this one."""
    without = {name: value for name, value in prefect_api.items() if "AUTH" not in name}
    environment = without | {"PREFECT_AUTH": prefect_api["PREFECT_API_AUTH_STRING"], "VECTORCLM_HOME": str(tmp_path)}
    environment["VECTORCLM_STORE"] = str(tmp_path / "store")
    command = [sys.executable, "-m", "flows.cli", "retry", "nowhere"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: no run 'nowhere': give the id or the name that Prefect shows\n"


def _rendered(kind: str, environment: dict[str, str], **values: object) -> dict[str, Any]:
    """What a real server stores of the pool, rendered by Prefect's own templating."""
    pool = pool_template(kind)
    blocks = [name.rsplit(".", 1)[1] for name in placeholders(pool["variables"]) if "blocks" in name]
    done = subprocess.run(
        [sys.executable, "-c", RENDER],
        input=json.dumps([kind, pool, values, blocks]),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_process_pool_on_a_server(prefect_api: dict[str, str]) -> None:
    job = _rendered("process", prefect_api)
    assert job["stream_output"] is False
    assert job["env"] == {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "vectorclm,flows",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    assert _rendered("process", prefect_api, visible_gpus="0,1")["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_the_docker_pool_on_a_server(prefect_api: dict[str, str]) -> None:
    from docker.types import HostConfig

    gpus = [{"driver": "nvidia", "count": -1, "capabilities": [["gpu"]]}]
    for job, devices in (
        (_rendered("docker", prefect_api), 0),
        (_rendered("docker", prefect_api, device_requests=gpus, image="vectorclm:0.1.0-gpu"), 1),
    ):
        assert job["env"]["AWS_SECRET_ACCESS_KEY"] == IN_BLOCK
        host = HostConfig(version="1.50", **job["container_create_kwargs"])
        assert host["ShmSize"] == 16 * 2**30
        assert len(host["DeviceRequests"]) == devices


@pytest.mark.parametrize("gpus", (None, 8))
def test_the_kubernetes_pool_makes_valid_jobs(prefect_api: dict[str, str], tmp_path: Path, gpus: int | None) -> None:
    tolerated = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    values = {"gpus": gpus, "tolerations": tolerated, "node_selector": {"gpu": "yes"}} if gpus else {}
    job = _rendered("kubernetes", prefect_api, name="curriculum", memory_limit="64Gi", **values)
    manifest = job["job_manifest"]
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    manifest["metadata"]["name"] = manifest["metadata"].pop("generateName") + "x7k2p"  # as the cluster does
    container["env"] = [{"name": name, "value": value} for name, value in job["env"].items()]  # as the worker does
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(manifest), encoding="utf-8")
    program_passes("kubernetes-validate", "--strict", str(file))


CLUSTER = """
import sys
from prefect.client.orchestration import get_client
from flows.platform.doctor import process_workers
from flows.platform.config import read_platform
from flows.platform.provision import provision

config = read_platform(None, vectorclm_store=sys.argv[1])
with get_client(sync_client=True) as client:
    stored = client.read_work_pool("gpu")
    provision(client, lambda line: None, config)
    pool = client.read_work_pool("gpu")
    assert (pool.type, pool.base_job_template) == ("kubernetes", stored.base_job_template)
    assert client.read_work_pool("cpu").type == "process"
    assert client.read_deployment_by_name("stage/pretrain").work_pool_name == "gpu"
print([pool for _, pool in process_workers(config)])
"""


def test_a_pool_of_a_cluster_takes_the_place_of_the_one_for_processes(
    prefect_api: dict[str, str], tmp_path: Path
) -> None:
    """By the line that the pages tell."""
    lines = {line for page in ("infra", "docker") for line in (ROOT / page / "README.md").read_text().splitlines()}
    (line,) = (line for line in lines if line.startswith("prefect work-pool "))
    remove, create = (shlex.split(part) for part in line.split(" && "))
    before = [sys.executable, "-m", "prefect", "work-pool", "create", "gpu", "--type", "process"]
    for command in (before, *([sys.executable, "-m", *words] for words in (remove, create))):
        done = subprocess.run(command, env=prefect_api, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(tmp_path)],
        env=prefect_api,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['cpu']\n"


def test_a_password_in_the_address_of_prefect_is_refused_unsaid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://someone:hunter2@127.0.0.1:1/api")
    with pytest.raises(ConfigError, match="set PREFECT_AUTH=") as refused, prefect_server(tmp_path):
        pass
    assert "hunter2" not in str(refused.value)
