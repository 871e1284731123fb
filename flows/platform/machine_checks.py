"""What `vectorclm doctor` checks of this machine: versions of packages, room on its disks, GPUs."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from flows.platform.config import PlatformConfig
from vectorclm.runtime.devices import has_gpu_driver
from vectorclm.runtime.temporary import remove_abandoned
from vectorclm.store.artifact import Store

FREE_GIGABYTES = 5
FREE_FILES = 10_000  # of a file system that counts them
VERSIONS = ("prefect", "sqlalchemy", "mlflow", "torch", "fastapi", "datasets", "pyarrow", "s3fs")


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


def _disks(config: PlatformConfig) -> Iterator[Finding]:
    """Report the room on each file system on which the platform writes, with what frees some."""
    store = Store(config.vectorclm_store)
    places = {"home": config.home, "work": store.work_root(None), "TMPDIR": _temporary_folder()}
    if store.is_local:
        places = {"store": Path(store.root), **places}
    by_disk: dict[int, list[str]] = {}
    for name, path in places.items():
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        by_disk.setdefault(there.stat().st_dev, []).append(name)
    for names in by_disk.values():
        what = ", ".join(f"{name} {places[name]}" for name in names)
        path = places[names[0]]
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        found = os.statvfs(there)
        free = found.f_bavail * found.f_frsize / 1e9
        lacks_files = bool(found.f_files) and found.f_favail < FREE_FILES
        room = f"{free:.0f} GB" if free >= 1 else f"{1000 * free:.0f} MB"
        line = f"{room} free for {what}; {FREE_GIGABYTES} GB are recommended"
        if lacks_files:
            line = f"room for only {found.f_favail:,} more files for {what}"
        good = free >= FREE_GIGABYTES and not lacks_files
        yield Finding(good, line if good else f"{line}: {_remedy(names, places, store)}")


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


def _gpu(config: PlatformConfig) -> Iterator[Finding]:
    found = gpus()
    yield Finding(True, f"GPUs: {', '.join(found)}" if found else "no GPU: this machine's workers run on its CPU")


def gpus() -> list[str]:
    """The names of the GPUs that torch sees on this machine."""
    if not has_gpu_driver():
        return []
    import torch  # takes seconds

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


MACHINE = (_versions, _leftovers, _disks, _gpu)
