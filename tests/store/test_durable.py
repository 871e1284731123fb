"""After a power loss, what a manifest names is whole: a file system that loses its log, and the order of its calls."""

import fcntl
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import KILLS, skip_or_fail
from vectorclm.__main__ import main
from vectorclm.command_line import run
from vectorclm.store.artifact import MANIFEST, StageSpec, Store, build
from vectorclm.store.listing import take_inventory, verify

SHUTDOWN, WITHOUT_LOG = 0x8004587D, 2  # the ioctl of ext4 and XFS, and its flag: what is not on the disk is lost
WRITER = """
import sys
from pathlib import Path
import torch
from vectorclm.store.artifact import StageSpec, Store, build
from vectorclm.training.checkpoint import Checkpoints, Snapshot

store, count = Store(sys.argv[1]), int(sys.argv[2])
plan = StageSpec("pretrain", 1, {}, {})

def produce(out):
    (out / "part").mkdir()
    (out / "a.bin").write_bytes(b"a" * 20_000)
    (out / "part" / "b.bin").write_bytes(b"b" * 5_000)
    return {}

with Checkpoints(store, plan, Path(sys.argv[1]) / "work", "data") as checkpoints:
    for number in range(count):
        build(store, StageSpec("sample", 1, {"number": number}, {}), produce)
        checkpoints.save(Snapshot(number, {"w": torch.ones(2000)}, {"0.0.m": torch.ones(2000)}, "1\\n", "order"))
        checkpoints.wait()
        print(number, flush=True)
"""


def needed(*programs: str) -> None:
    """Skip, or with CI fail, where a program is missing."""
    if missing := [program for program in programs if shutil.which(program) is None]:
        skip_or_fail(f"no {', '.join(missing)} here: apt-get install strace e2fsprogs mount")


@contextmanager
def mounted(image: Path, folder: Path, options: str = "loop") -> Iterator[None]:
    """The file system of an image, while the block runs; skips where this machine lets nobody mount one."""
    done = subprocess.run(["mount", "-o", options, image, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here, which takes root and loop devices: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def lose_power(folder: Path) -> None:
    """End a file system as a power loss does."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(opened, SHUTDOWN, struct.pack("I", WITHOUT_LOG))
    finally:
        os.close(opened)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty file system."""
    needed("mkfs.ext4", "mount", "umount")
    made = tmp_path / "image"
    with made.open("wb") as file:
        file.truncate(32 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", made], check=True)
    return made


@pytest.mark.parametrize("seed", range(max(1, KILLS // 5)))
def test_a_power_loss_leaves_no_manifest_without_its_files(tmp_path: Path, image: Path, seed: int) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    store = Store(str(folder / "store"))
    with mounted(image, folder):
        command = [sys.executable, "-c", WRITER, store.uri, "1000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
            assert writer.stdout is not None
            done = [int(writer.stdout.readline()) for _ in range(random.Random(seed).randrange(2, 6))]
            lose_power(folder)
            done += map(int, writer.stdout.read().split())  # those that were told before the disk was gone
            assert writer.wait(60) != 0
        left = shutil.copyfile(image, tmp_path / "left")  # as another container may hold the lost one
    with mounted(left, folder):
        folders = take_inventory(store).artifacts
        assert {row.key for row in folders if row.state == "finished"} >= {
            f"sample/{StageSpec('sample', 1, {'number': number}, {}).fingerprint}" for number in done
        }
        assert not [difference for _, differences in verify(store, []) for difference in differences]
        steps = [row.artifact.manifest["step"] for row in take_inventory(store).checkpoints if row.artifact]
        assert steps and max(steps) >= done[-1]
        command[-1] = str(len(done) + 1)  # one that was cut off is made now
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def turn_read_only(folder: Path) -> None:
    """Remount a file system as the kernel does after an error."""
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


@pytest.mark.parametrize(
    ("fail", "reason"), [(turn_read_only, "Read-only file system"), (lose_power, "Input/output error")]
)
def test_a_disk_that_fails_during_the_work_is_one_error_with_its_place(
    fail: Callable[[Path], None], reason: str, tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the parent process of a stage receives it as an error of the store, which a retry may end."""
    (folder := tmp_path / "disk").mkdir()
    store = Store(str(folder / "store"))

    def produce(out: Path) -> dict[str, int]:
        fail(folder)
        (out / "a.bin").write_bytes(b"a" * 20_000)
        return {}

    with mounted(image, folder):
        assert run(lambda: build(store, StageSpec("sample", 1, {}, {}), produce, str(folder)), relay=True) == 2
        error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "StoreError" and str(folder) in error["message"]
    assert f"cannot be read or written ({reason}): check the disk" in error["message"]


def test_a_read_only_store_is_read_and_verified(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, plan = tmp_path / "disk", StageSpec("sample", 1, {}, {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder.mkdir()

    def produce(out: Path) -> dict[str, int]:
        (out / "a.bin").write_bytes(b"a" * 20_000)
        return {}

    store = Store(str(folder / "store"))
    with mounted(image, folder):
        build(store, plan, produce)
    with mounted(image, folder, "loop,ro"):
        found, reused = build(store, plan, produce)
        assert reused and found.local(remembered=True) == found.local() == Path(found.uri)
        assert main(["store", "verify", "--store", store.uri]) == main(["store", "ls", "--store", store.uri]) == 0
        assert "1 verified, 0 differ" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (tmp_path / "cache").write_text("not a folder: nothing can be remembered")
        assert found.local(remembered=True) == Path(found.uri)


def traced(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The calls of the writer that matter for a power loss, in their order: each with its paths."""
    log = folder / "calls"
    calls = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,mkdir,mkdirat"
    command = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", f"trace={calls}", "-o", str(log)]
    subprocess.run(
        [*command, sys.executable, "-c", WRITER, str(folder / "store"), "1"], stdout=subprocess.DEVNULL, check=True
    )
    begun: dict[str, str] = {}  # by process, as a call of one may be interrupted by that of another
    for line in log.read_text().splitlines():
        process, _, call = line.partition(" ")
        if call.endswith("<unfinished ...>"):
            begun[process] = call.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"\s*<\.\.\. \w+ resumed>(.*)", call):
            call = begun.pop(process) + resumed[1]
        if call.rstrip().endswith("= 0"):
            yield call.strip().partition("(")[0].rstrip("2at"), re.findall(r'(?:"|\d<)(/[^">]*)', call)


def test_every_file_and_folder_is_synced_before_the_manifest_that_names_it(tmp_path: Path) -> None:
    needed("strace")
    unsynced: set[str] = set()  # folders in which a name is new
    synced: set[str] = set()
    published: dict[str, bool] = {}  # whether the name is on the disk
    for call, paths in traced(tmp_path):
        if call in ("fsync", "fdatasync"):
            synced.add(paths[0])
            unsynced.discard(paths[0])
            published |= {key: True for key in published if str(Path(key).parent) == paths[0]}
            continue
        name = paths[-1]
        if call in ("rename", "link"):
            before = paths[0]
            synced |= {name + path.removeprefix(before) for path in synced if f"{path}/".startswith(f"{before}/")}
            unsynced |= {name + path.removeprefix(before) for path in unsynced if f"{path}/".startswith(f"{before}/")}
            folder = Path(name).parent if Path(name).name == MANIFEST else Path(name)
            if (folder / MANIFEST).is_file():  # the call that makes an artifact visible, or its manifest
                files = [folder / file for file in json.loads((folder / MANIFEST).read_text())["files"]]
                for path in files:
                    assert str(path) in synced, f"{path} is not on the disk"
                    assert str(path.parent) not in unsynced, f"the names in {path.parent} are not on the disk"
                assert str(folder / MANIFEST) in synced
                published[str(folder)] = False
        unsynced.add(str(Path(name).parent))
    kinds = sorted(Path(name).relative_to(tmp_path / "store").parts[0] for name in published)
    assert kinds == ["checkpoints", "sample"] and all(published.values()), published
    made = {str(path) for path in (tmp_path / "store").rglob("*") if path.is_dir()} | {str(tmp_path / "store")}
    stages = {path for path in unsynced & made if Path(path).name in ("store", "sample", "checkpoints")}
    assert not stages, f"new folders are not on the disk: {stages}"
