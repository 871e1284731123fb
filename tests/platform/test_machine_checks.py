"""What the doctor says of this machine: versions of packages, GPUs, room on each disk and what frees some."""

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch

from flows.platform import machine_checks
from flows.platform.config import PlatformConfig
from flows.platform.machine_checks import MACHINE, DeviceError, gpu_finding, gpus
from vectorclm.runtime.processes import machine, process_identity
from vectorclm.runtime.temporary import OWNER


@pytest.fixture
def config(tmp_path: Path) -> PlatformConfig:
    return PlatformConfig(vectorclm_store=str(tmp_path / "store"))


def test_every_disk_of_the_platform_is_looked_at_with_what_frees_it(
    config: PlatformConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = MACHINE[2]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    everything = [f"store {config.home}", f"home {config.home}", f"work {config.home}/work", f"TMPDIR {tmp_path}/tmp"]
    (good,) = disks(config)  # one line, as all are on one disk
    assert all(place in good.what for place in everything)
    monkeypatch.setattr(machine_checks, "FREE_GIGABYTES", 10**9)
    (full,) = disks(config)
    assert not full.good and f"`vectorclm store gc --older-than 1h --delete --store {config.home}`" in full.what
    other = Path("/dev/shm")
    if other.is_dir() and other.stat().st_dev != tmp_path.stat().st_dev:
        monkeypatch.setenv("TMPDIR", str(other))
        store, temporary = disks(config)
        assert "TMPDIR" not in store.what and f"free for TMPDIR {other}" in temporary.what
        assert "set it to a folder elsewhere" in temporary.what and "store gc" not in temporary.what


def test_temporary_folders_of_killed_processes_are_removed(
    config: PlatformConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftovers = MACHINE[1]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = {**process_identity(process), "machine": machine()}
        (folder := tmp_path / "vectorclm-0123abcd").mkdir()
        (folder / OWNER).write_text(json.dumps(owner))
        assert list(leftovers(config)) == [] and folder.is_dir()
        process.kill()
    (found,) = leftovers(config)
    assert found.good and found.what == f"1 temporary folder(s) of killed processes removed from {tmp_path}"
    assert not folder.exists() and list(leftovers(config)) == []


def install(folder: Path, name: str, version: str, *lines: str) -> None:
    """Let a package be found in this version, before one of the same name that is installed elsewhere."""
    (found := folder / f"{name}-{version}.dist-info").mkdir()
    (found / "METADATA").write_text("\n".join([f"Name: {name}", f"Version: {version}", *lines, ""]))


def test_packages_of_a_wrong_version_are_named_with_the_command_that_mends_them(
    config: PlatformConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = MACHINE[0]
    (good,) = versions(config)
    assert (
        good.good and f"prefect {metadata.version('prefect')}, sqlalchemy {metadata.version('sqlalchemy')}" in good.what
    )
    (folder := tmp_path / "packages").mkdir()
    monkeypatch.syspath_prepend(folder)
    needs = (
        "Requires-Dist: sqlalchemy<2.1",
        "Requires-Dist: no-such-package>=1",
        'Requires-Dist: no-test; extra == "dev"',
    )
    install(folder, "vectorclm", "9", *needs)
    install(folder, "sqlalchemy", "2.1.9")
    after = "then `vectorclm down` and `vectorclm up`"
    assert [(found.good, found.what) for found in versions(config)] == [
        (False, f"sqlalchemy 2.1.9 does not work here: pip install 'sqlalchemy<2.1', {after}"),
        (False, f"no-such-package is not installed: pip install 'no-such-package>=1', {after}"),
    ]


def test_the_gpus_of_the_machine_are_named() -> None:
    found = gpu_finding(gpus())
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    assert found.good and (", ".join(names) in found.what if names else found.what.startswith("no GPU"))


def test_a_driver_without_a_working_torch_is_an_error_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with a torch that was built for another driver; the process of its own meets a torch that does not load."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(machine_checks, "has_gpu_driver", lambda: True)
    with pytest.raises(
        DeviceError, match=r"torch cannot list the GPUs \(OSError: libcudart.so: cannot open .*\): check"
    ):
        gpus()


def test_little_room_is_given_in_megabytes(
    config: PlatformConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    few = 120_000_000 // real.f_frsize
    monkeypatch.setattr(machine_checks.os, "statvfs", lambda _: os.statvfs_result((*real[:4], few, *real[5:])))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (full,) = MACHINE[2](config)
    assert not full.good and full.what.startswith("120 MB free for ")
