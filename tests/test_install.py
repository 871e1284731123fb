"""Installation: the wheel has all that its commands need, every version is locked, CUDA comes only where asked for."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from prefect.states import AwaitingRetry

from tests.conftest import KILLS, skip_or_fail
from tests.kill_matrix import CHANGES, RUNTIME, SETTINGS
from tests.services.platform import platform_at, until
from vectorclm.store.artifact import Store

ROOT = Path(__file__).parents[1]
SHORT = {key: value for key, value in SETTINGS.items() if key not in ("pretrain.phases", "finetune.epochs")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel of this clone, without the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder)], capture_output=True, text=True, check=False, timeout=200)
    if "No module named" in done.stderr or "setuptools" in done.stderr:
        skip_or_fail("no setuptools here: pip install 'setuptools>=77'")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "content")
    return folder / "content"


def test_the_wheel_has_every_file_that_is_no_page(installed: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "vectorclm", "flows"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no clone")
    wanted = {name for name in listed.stdout.split() if not name.endswith("README.md") and (ROOT / name).is_file()}
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert wanted <= found, wanted - found
    (licences,) = {path.parent for path in installed.rglob("LICENSE")}
    assert {path.name for path in licences.iterdir()} == {"LICENSE", "NOTICE"}


def test_the_wheel_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    (here := tmp_path / "here").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(tmp_path / "home"), "COLUMNS": "100"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, timeout=250, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = "import flows, vectorclm; print(flows.__file__, vectorclm.__file__)"
    found = subprocess.run([sys.executable, "-c", place], cwd=here, env=environment, capture_output=True, text=True)
    assert found.stdout.count(str(installed)) == 2
    said = run("run", "tiny", "--dry-run")
    assert "in all" in said and "evaluate_base" in said
    assert list(here.iterdir()) == []
    said = run("stage", "sample", "tiny", "--set", "world.documents=200", "--set", "sample.validation_share=0.2")
    assert "sample built" in said and {path.name for path in here.iterdir()} == {"store"}


@pytest.mark.skipif(KILLS < 10, reason="a platform and a curriculum, minutes: VECTORCLM_KILLS=10")
def test_the_form_and_retry_of_a_wheel(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpacked `tiny` samples in other steps, which no field of the form sets, so its run is not the clone's."""
    content = shutil.copytree(installed, tmp_path / "content")
    file = content / "vectorclm" / "experiments" / "tiny.toml"
    file.write_text(file.read_text().replace("[pretrain.samples]\ninterval = 60", "[pretrain.samples]\ninterval = 61"))
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(content))
    with platform_at(here / "store") as platform:
        (in_the_way := here / "store" / "shards").write_text("a file where a folder must be")
        changes = {**CHANGES, "pretrain": {"tokens": 16_384}, "finetune": {"epochs": 0.1}, "settings": SHORT}
        run_id = platform.start(changes=changes, runtime=RUNTIME)
        assert platform.ended(run_id) == "Failed"
        state = platform.run(run_id).state
        assert "stage shards failed" in str(state and state.message)
        in_the_way.unlink()
        platform.client.set_flow_run_state(run_id, AwaitingRetry())  # as the button Retry does
        until(lambda: platform.run(run_id).run_count == 2, "the run starts again")
        assert platform.ended(run_id) == "Completed"
        ends = {name: states[-1] for name, states in platform.tasks(run_id).items()}
        assert (ends["sample"], ends["tokenizer"]) == ("Reused", "Reused")
        assert (ends["shards"], ends["pretrain"], ends["export"]) == ("Completed",) * 3
        assert "pretrain.tokens=16384" in platform.run(run_id).name
        (training,) = Store(str(here / "store")).finished("pretrain")
        assert training.manifest["config"]["samples"]["interval"] == 61
        done = platform.command("doctor")
        assert done.returncode == 0, done.stdout


def test_every_dependency_is_locked_to_a_version_that_fits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[A-Za-z]", line)]
    locked = {_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != "vectorclm" and (requirement.marker is None or requirement.marker.evaluate()):
            assert requirement.specifier.contains(locked[_name(requirement.name)], prereleases=True), requirement


# The first versions without an advisory that was known when they were written here.
FLOORS = {"starlette": "1.3.1", "jinja2": "3.1.6", "filelock": "3.20.3", "h11": "0.16.0", "mlflow": "3.16.0"}


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_advisory_is_installed(name: str) -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = (one for one in map(Requirement, lines) if _name(one.name) == name)
    (lowest,) = (Version(one.version) for one in wanted.specifier if one.operator == ">=")
    assert lowest >= Version(FLOORS[name])


def test_the_workflow_audits_with_few_rights_and_actions_that_nobody_can_change() -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
    text = "".join(file.read_text() for file in files)
    for file in files:
        workflow = yaml.safe_load(file.read_text())
        jobs = workflow["jobs"].values()
        assert workflow["permissions"] == {"contents": "read"} and not any("permissions" in job for job in jobs)
    actions = re.findall(r"uses: *(\S+)", text)
    assert actions and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in actions)
    assert "run: make audit" in text
    (audit,) = re.findall(r"\S*pip-audit --.*", _dry("audit"))
    assert "--strict" in audit and "constraints.txt" in audit  # without --strict, what is not known passes


def test_the_workflow_lists_the_installed_packages_as_a_file_that_is_not_committed() -> None:
    assert "&& make sbom" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (command,) = re.findall(r"\S*cyclonedx-py .*", _dry("sbom"))
    assert "--of JSON -o sbom.json" in command and command.endswith(".venv/bin/python")  # what is installed, not asked
    assert "/sbom.json" in (ROOT / ".gitignore").read_text().splitlines()


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text.partition("[")[0].strip().lower())


def test_the_line_without_cuda_takes_torch_alone_from_its_index() -> None:
    """The locked version without a local part fits `2.13.0+cpu` too, and then nothing asks for NVIDIA's packages."""
    lines = {line: _dry(f"TORCH={line}") for line in ("", "cpu")}
    assert "download.pytorch.org" not in lines[""]
    first, second = (line for line in lines["cpu"].splitlines() if "pip install" in line)
    assert "--index-url https://download.pytorch.org/whl/cpu" in first
    assert "--no-deps" in first and first.endswith(" torch")
    assert "-e '.[dev]'" in second and "--index-url" not in second
    assert all("-c constraints.txt" in line for line in (first, second))
    (locked,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert Requirement(f"torch=={locked}").specifier.contains(f"{locked}+cpu")


def _dry(*variables: str) -> str:
    command = ["make", "--dry-run", "--always-make", "install", *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
