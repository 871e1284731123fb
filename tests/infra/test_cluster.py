"""The recipes of clusters: schemas judge the manifests, and a misspelt key or a wrong type in any of them is found."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from flows.cli import app
from tests.infra.kuberay import RayJob
from tests.test_pages import PAGES, misread

FOLDER = Path(__file__).parents[2] / "infra" / "cluster"
MANIFESTS = ("jobset", "rayjob", "networkpolicy")
CRDS = os.environ.get("VECTORCLM_CRDS")  # a folder with jobset.yaml and rayjob.yaml, as their projects publish them


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def pod_templates(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template inside a manifest."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        else:
            for inner in value.values():
                yield from pod_templates(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_templates(inner)


def problems(manifest: dict[str, Any], folder: Path) -> str:
    """What the schemas say against a manifest; empty where they accept it."""
    native = [{"apiVersion": "v1", "kind": "Pod", **one} for one in pod_templates(manifest)]
    if manifest["kind"] == "JobSet":
        if JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest:  # which leaves out what it does not know
            return "JobSet does not know a key"
        specs = [job["template"]["spec"] for job in manifest["spec"]["replicatedJobs"]]
        native += [{"apiVersion": "batch/v1", "kind": "Job", "spec": spec} for spec in specs]
    elif manifest["kind"] == "RayJob":
        RayJob.model_validate(manifest)
    else:
        native.append(manifest)
    for number, resource in enumerate(native):
        resource.setdefault("metadata", {}).setdefault("name", f"resource-{number}")
    (folder / "native.yaml").write_text(yaml.safe_dump_all(native), encoding="utf-8")
    command = [Path(sys.executable).with_name("kubernetes-validate"), "--strict", str(folder / "native.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_schemas_accept_each_manifest(name: str, tmp_path: Path) -> None:
    assert problems(read(name), tmp_path) == ""


def misspelt(manifest: dict[str, Any], *path: Any) -> None:
    inside = manifest
    for part in path[:-1]:
        inside = inside[part]
    inside[path[-1][:-1] + "Y"] = inside.pop(path[-1])


def mistyped(manifest: dict[str, Any], *path: Any) -> None:
    inside = manifest
    for part in path[:-1]:
        inside = inside[part]
    inside[path[-1]] = {"a": "mapping"} if not isinstance(inside[path[-1]], dict) else "a text"


JOB = ("spec", "replicatedJobs", 1)
POD = (*JOB, "template", "spec", "template", "spec")
HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
PLACES = [
    ("jobset", ("spec", "failurePolicy")),
    ("jobset", (*JOB, "dependsOn")),
    ("jobset", (*JOB, "template", "spec", "completionMode")),
    ("jobset", (*POD, "terminationGracePeriodSeconds")),
    ("jobset", (*POD, "containers", 0, "envFrom")),
    ("rayjob", ("spec", "entrypoint")),
    ("rayjob", ("spec", "rayClusterSpec", "authOptions", "mode")),
    ("rayjob", (*HEAD, "rayStartParams")),
    ("rayjob", (*HEAD, "template", "spec", "containers", 0, "resources")),
    ("networkpolicy", ("spec", "policyTypes")),
    ("networkpolicy", ("spec", "ingress", 0, "from")),
]


@pytest.mark.parametrize("change", [misspelt, mistyped])
@pytest.mark.parametrize(("name", "place"), PLACES)
def test_a_mistake_in_a_manifest_is_found(
    name: str, place: tuple[Any, ...], change: Callable[..., None], tmp_path: Path
) -> None:
    manifest = copy.deepcopy(read(name))  # without the anchors, so that one place changes
    manifest = yaml.safe_load(yaml.dump(manifest, Dumper=Plain))
    change(manifest, *place)
    try:
        found = problems(manifest, tmp_path)
    except (ValidationError, ValueError, AttributeError, TypeError) as error:  # of the models
        found = str(error)
    assert found


class Plain(yaml.SafeDumper):
    """Writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.mark.skipif(CRDS is None, reason="VECTORCLM_CRDS names no folder with the published resources")
@pytest.mark.parametrize(("name", "version"), [("jobset", "v1alpha2"), ("rayjob", "v1")])
def test_the_published_resources_accept_the_manifests(name: str, version: str) -> None:
    published = yaml.safe_load(Path(CRDS or "", f"{name}.yaml").read_text(encoding="utf-8"))
    (found,) = (each["schema"] for each in published["spec"]["versions"] if each["name"] == version)
    schema = _closed(found["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    assert [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(read(name))] == []


def _closed(schema: Any) -> Any:
    """The schema with unknown keys refused, as a cluster reports them."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for value in list(schema.values()):
            _closed(value)
    elif isinstance(schema, list):
        for value in schema:
            _closed(value)
    return schema


def test_every_pod_runs_without_rights_and_without_secrets_in_the_file() -> None:
    for name in ("jobset", "rayjob"):
        templates = list(pod_templates(read(name)))
        assert len(templates) >= 2
        for template in templates:
            spec = template["spec"]
            assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
            assert template["metadata"]["labels"] == {"app": "vectorclm"}  # those of the network policy
            for container in spec["containers"]:
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert {each["name"] for each in container["env"]} & {
                    "AWS_SECRET_ACCESS_KEY",
                    "RAY_AUTH_TOKEN",
                } == set()
                assert {"secretRef": {"name": "vectorclm-s3"}} in container["envFrom"]


def test_every_command_of_the_recipes_is_taken_by_its_program() -> None:
    lines = [read("rayjob")["spec"]["entrypoint"].split()]
    for template in pod_templates(read("jobset")):
        (container,) = template["spec"]["containers"]
        words = " ".join([*container["command"], *container.get("args", [])])
        if stages := re.search(r"for stage in ([\w ]+);", words):
            lines += [["vectorclm", "stage", stage, "base"] for stage in stages[1].split()]
        else:
            lines.append(words.split())
    assert len(lines) == 2 + 6
    assert [misread(app, line[1:]) for line in lines] == [None] * len(lines)


def test_each_recipe_has_a_page_that_says_where_it_never_ran() -> None:
    pages = {name: PAGES[f"infra/cluster/{name}.md"] for name in ("gpu-machine", "slurm", "kubernetes")}
    for name, page in pages.items():
        assert "## What never ran" in page, name
    named = "".join(pages.values())
    assert all(path.name in named for path in FOLDER.iterdir() if path.suffix in (".yaml", ".sbatch"))
