"""What the doctor says of this machine: the room on each of its disks, and what frees some."""

from pathlib import Path

import pytest

from flows.platform import machine_checks
from flows.platform.config import PlatformConfig
from flows.platform.machine_checks import MACHINE


@pytest.fixture
def config(tmp_path: Path) -> PlatformConfig:
    return PlatformConfig(vectorclm_store=str(tmp_path / "store"))


def test_every_disk_of_the_platform_is_looked_at_with_what_frees_it(
    config: PlatformConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = MACHINE[1]
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
