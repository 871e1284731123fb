"""What `vectorclm doctor` checks of this machine: versions of packages, room on its disks, GPUs."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from flows.platform.config import PlatformConfig
from vectorclm.errors import VectorCLMError
from vectorclm.runtime.devices import has_gpu_driver
from vectorclm.runtime.temporary import remove_abandoned
from vectorclm.store.artifact import Store

FREE_GIGABYTES = 5
FREE_FILES = 10_000  # of a file system that counts them
VERSIONS = ("prefect", "sqlalchemy", "mlflow", "torch", "fastapi", "datasets", "pyarrow", "s3fs")
NAMES = (
    "import json, torch; print(json.dumps([torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]))"
)


class DeviceError(VectorCLMError):
    """Torch cannot list the GPUs of this machine."""


@dataclass(frozen=True)
class Finding:
    """The result of one check, as a line of text."""

    good: bool
    what: str


Check = Callable[[PlatformConfig], Iterator[Finding]]


def _versions(config: PlatformConfig) -> Iterator[Finding]:
    wrong = list(_unsuitable())
    for problem in wrong:
        yield Finding(False, problem)
    if not wrong:
        yield Finding(True, "versions: " + ", ".join(f"{name} {version(name)}" for name in VERSIONS))
    if config.database("mlflow", "psycopg2") is not None and find_spec("psycopg2") is None:
        yield Finding(False, "MLflow needs psycopg2 to reach Postgres: pip install 'vectorclm[postgres]'")


def _unsuitable() -> Iterator[str]:
    """Installed packages that do not meet the requirements, each with the command that fixes it."""
    for line in requires("vectorclm") or []:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        fix = f"pip install '{needed.name}{needed.specifier}', then `vectorclm down` and `vectorclm up`"
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            yield f"{needed.name} is not installed: {fix}"
            continue
        if not needed.specifier.contains(found, prereleases=True):
            yield f"{needed.name} {found} does not work here: {fix}"


def _leftovers(config: PlatformConfig) -> Iterator[Finding]:
    """Remove this user's temporary folders whose process was killed."""
    if count := remove_abandoned():
        yield Finding(True, f"{count} temporary folder(s) of killed processes removed from {tempfile.gettempdir()}")


@dataclass(frozen=True)
class Disk:
    """A file system on which the platform writes."""

    path: str  # of the first of the platform's places on it
    places: str  # the names and paths of all of them
    free: int  # bytes
    files: int | None  # that may still be created, where the file system counts them
    remedy: str  # what frees room

    def lacks(self, factor: float) -> bool:
        """Whether there is less room than so many times FREE_GIGABYTES or FREE_FILES."""
        few_files = self.files is not None and self.files < factor * FREE_FILES
        return few_files or self.free < factor * FREE_GIGABYTES * 1e9

    def __str__(self) -> str:
        if self.files is not None and self.files < FREE_FILES:
            return f"room for only {self.files:,} more files for {self.places}"
        room = f"{self.free / 1e9:.0f} GB" if self.free >= 1e9 else f"{self.free / 1e6:.0f} MB"
        return f"{room} free for {self.places}; {FREE_GIGABYTES} GB are recommended"


def disks(store: Store, home: Path) -> Iterator[Disk]:
    """Each file system on which a platform writes, once."""
    places = {"home": home, "work": store.work_root(None), "TMPDIR": _temporary_folder()}
    if store.is_local:
        places = {"store": Path(store.root), **places}
    by_disk: dict[int, list[str]] = {}
    for name, path in places.items():
        by_disk.setdefault(_existing(path).stat().st_dev, []).append(name)
    for names in by_disk.values():
        found = os.statvfs(_existing(places[names[0]]))
        yield Disk(
            path=str(places[names[0]]),
            places=", ".join(f"{name} {places[name]}" for name in names),
            free=found.f_bavail * found.f_frsize,
            files=found.f_favail if found.f_files else None,
            remedy=_remedy(names, places, store),
        )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _disks(config: PlatformConfig) -> Iterator[Finding]:
    """Report the room on each file system on which the platform writes, with what frees some."""
    for disk in disks(Store(config.vectorclm_store), config.home):
        good = not disk.lacks(1.0)
        yield Finding(good, str(disk) if good else f"{disk}: {disk.remedy}")


def _remedy(names: list[str], places: dict[str, Path], store: Store) -> str:
    """What frees room on the file system of these places."""
    steps = []
    if "store" in names or "work" in names:
        steps.append(f"`vectorclm store gc --older-than 1h --delete --store {store.uri}` removes leftovers")
    if "home" in names:
        steps.append(f"logs in {places['home'] / 'platform'} may be emptied (`truncate -s 0 FILE`)")
    if "TMPDIR" in names:
        steps.append(
            "remove old files of yours in TMPDIR, or set it to a folder elsewhere, then `vectorclm down` and "
            "`vectorclm up`"
        )
    return "; ".join(steps)


def _temporary_folder() -> Path:
    """The folder of temporary files; also where it is full, so that `tempfile` would pass it over."""
    named = os.environ.get("TMPDIR")
    return Path(named) if named and Path(named).is_dir() else Path(tempfile.gettempdir())


def gpu_finding(found: list[str]) -> Finding:
    """A line about the GPUs of this machine."""
    return Finding(True, f"GPUs: {', '.join(found)}" if found else "no GPU: this machine's workers run on its CPU")


def gpus() -> list[str]:
    """The names of the GPUs that torch sees on this machine. Raises DeviceError where torch fails to list them.

    A process of its own imports torch and starts CUDA, which takes seconds in which the caller can go on.
    """
    if not has_gpu_driver():
        return []
    done = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DeviceError(f"torch cannot list the GPUs ({lines[-1]}): check the driver with nvidia-smi or rocm-smi")
    return list(json.loads(done.stdout.splitlines()[-1]))


MACHINE = (_versions, _leftovers, _disks)
