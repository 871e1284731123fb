"""The files of docker/, checked by the tools that read them: no network, no container engine."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from flows.net import HEARTBEAT_SECONDS
from flows.platform.config import RETIRED, PlatformConfig
from tests.platform.test_config import EXAMPLE, ROOT, SECRETS, example, pool_template, program_passes

COMPOSE = ROOT / "docker" / "compose.yaml"
PINNED = re.compile(r"[a-z0-9./-]+:\d+(\.\d+)+[a-z0-9.-]*(@sha256:[0-9a-f]{64})?")
OPTIONAL = ("VECTORCLM_SMTP_", "VECTORCLM_URL", "VECTORCLM_MLFLOW_URL", "VECTORCLM_KEEP_RECORDS")  # begin variables
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<rule>[^}]*)\}")


def _compose() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")))


def _services() -> dict[str, dict[str, Any]]:
    return dict(_compose()["services"])


def test_the_compose_file_follows_the_specification() -> None:
    program_passes("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))


def test_the_dockerfile_has_no_findings() -> None:
    program_passes("hadolint", "--failure-threshold", "info", str(ROOT / "docker" / "Dockerfile"))


def test_every_image_is_pinned_by_a_version() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, re.MULTILINE)
    bases = {image for image, _ in stages} - {stage for _, stage in stages}
    images = {service["image"] for service in _services().values()}
    images |= {pool_template(kind)["variables"]["properties"]["image"]["default"] for kind in ("docker", "kubernetes")}
    assert [image for image in bases | images if not PINNED.fullmatch(image)] == []
    ours = {image for image in images if image.startswith("vectorclm:")}
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert ours == {f"vectorclm:{version[1]}-{target}" for target in ("cpu", "gpu")}
    assert {"cpu", "gpu"} <= {stage for _, stage in stages}


def test_the_images_run_without_root() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    targets = [
        part for part in re.split(r"^(?=FROM )", dockerfile, flags=re.MULTILINE) if "AS cpu" in part or "AS gpu" in part
    ]
    assert [target.split()[-1] for target in targets] == ["10001", "10001"]
    assert "--uid 10001" in dockerfile


def test_the_images_have_the_sandbox_of_programs_that_a_model_wrote() -> None:
    """Its packages are those that this machine's tests of the sandbox need."""
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    (runtime,) = [part for part in re.split(r"^(?=FROM )", dockerfile, flags=re.MULTILINE) if "AS runtime" in part]
    installed = set(re.findall(r"--no-install-recommends ([^&]+)", runtime)[0].split())
    packages = set((ROOT / "infra" / "debian-packages.txt").read_text(encoding="utf-8").split())
    assert installed == {"bubblewrap", "libseccomp2"} <= packages
    assert len(re.findall(r"^FROM runtime AS (?:cpu|gpu)$", dockerfile, re.MULTILINE)) == 2


def test_ports_are_published_on_loopback_only() -> None:
    services = _services()
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not any("network_mode" in service or service.get("privileged") for service in services.values())


def _rights(services: dict[str, dict[str, Any]]) -> list[str]:
    """What a service may do that it need not, and what it cannot write although it has to."""
    found = []
    for name, service in services.items():
        user = re.fullmatch(r"(\d+):(\d+)", str(service.get("user", "")))
        mounted = [volume.split(":")[1] for volume in service.get("volumes", [])]
        mounted += [place.split(":")[0] for place in service.get("tmpfs", [])]
        needed = {"/tmp"} | ({"/home/vectorclm"} if service["image"].startswith("vectorclm:") else set())
        wrong = {
            "root": user is None or "0" in user.groups(),
            "root file system": service.get("read_only") is not True,
            "mounts": len(mounted) != len(set(mounted)) or not needed <= set(mounted),
            "capabilities": service.get("cap_drop") != ["ALL"] or bool(service.get("cap_add")),
            "privileges": service.get("security_opt") != ["no-new-privileges:true"] or bool(service.get("privileged")),
            "ports": not all(port.startswith("127.0.0.1:") for port in service.get("ports", [])),
        }
        found += [f"{name}: {what}" for what, is_wrong in wrong.items() if is_wrong]
    return found


def test_no_container_has_rights_that_it_need_not_have() -> None:
    assert _rights(_services()) == []


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("user", None, "root"),
        ("user", "0:0", "root"),
        ("read_only", False, "root file system"),
        ("tmpfs", [], "mounts"),
        ("cap_drop", ["NET_RAW"], "capabilities"),
        ("cap_add", ["SYS_ADMIN"], "capabilities"),
        ("security_opt", [], "privileges"),
        ("privileged", True, "privileges"),
        ("ports", ["5432:5432"], "ports"),
    ],
)
def test_each_right_too_many_is_seen(key: str, value: object, what: str) -> None:
    for name in ("postgres", "s3", "prefect-server", "provision"):
        services = _services()
        services[name] = {**services[name], key: value} if value is not None else dict(services[name])
        if value is None:
            del services[name][key]
        assert f"{name}: {what}" in _rights(services)


def test_every_service_has_a_health_check_or_an_end() -> None:
    services = _services()
    ends = {
        name
        for service in services.values()
        for name, rule in service.get("depends_on", {}).items()
        if rule["condition"] == "service_completed_successfully"
    }
    assert ends == {"provision"}
    assert {name for name, service in services.items() if "healthcheck" not in service} == ends
    waits = [rule["condition"] for service in services.values() for rule in service.get("depends_on", {}).values()]
    assert "service_started" not in waits


def test_volumes_are_named_and_workers_beat() -> None:
    compose, services = _compose(), _services()
    mounted = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert mounted == set(compose["volumes"])
    for name in ("worker-cpu", "worker-gpu"):
        assert services[name]["environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_SECONDS)
        assert services[name]["shm_size"]
        assert "database" not in services[name].get("networks", [])
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    for name, service in services.items():
        if service["image"].startswith("vectorclm:"):
            assert service["environment"]["DO_NOT_TRACK"] == "true", name


def test_compose_and_the_example_name_the_same_variables() -> None:
    used = {match["name"] for match in VARIABLE.finditer(COMPOSE.read_text(encoding="utf-8"))}
    offered = set(re.findall(r"^# ([A-Z_]+)=", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE))
    assert offered == {name.upper() for name in PlatformConfig.model_fields if name.upper().startswith(OPTIONAL)}
    assert used == {*example(), *offered}
    assert used <= {name.upper() for name in [*PlatformConfig.model_fields, *RETIRED]}


def test_nothing_starts_without_its_secrets() -> None:
    found = list(VARIABLE.finditer(COMPOSE.read_text(encoding="utf-8")))
    optional = {match["name"] for match in found if match["rule"].startswith(":-")}  # a default, as no line is
    assert optional and all(name.startswith(OPTIONAL) for name in optional)
    assert [match[0] for match in found if not match["rule"].startswith((":?set ", ":-"))] == []
    defaults = {match["rule"].removeprefix(":-") for match in found if match["name"] in optional}
    assert all(not text or text.startswith("http://127.0.0.1:${") for text in defaults)
    assert {name for name, value in example().items() if not value} == SECRETS
    ignored = subprocess.run(["git", "check-ignore", "docker/platform.env"], cwd=ROOT, capture_output=True)
    assert ignored.returncode in (0, 128)  # 128: not a checkout
