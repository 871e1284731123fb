"""The experiments that a platform offers: those of the package, and the files of a folder that the user names."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vectorclm.config import EXPERIMENTS, ExperimentConfig, load_experiment
from vectorclm.errors import ConfigError

FOLDER = "VECTORCLM_EXPERIMENTS"
OWN = ("tiny", "small", "base")  # of the package, in the order of their size


def known_files() -> dict[str, Path]:
    """The files of all experiments, by name: those of the package, then those of the folder VECTORCLM_EXPERIMENTS."""
    found = {name: EXPERIMENTS / f"{name}.toml" for name in OWN}
    return found | {path.stem: path for path in _of_the_folder() if path.stem not in found}


def load_known(name: str) -> tuple[ExperimentConfig, Path]:
    """Load an experiment of the platform by its name; return it and its file. Raises ConfigError."""
    files = known_files()
    if name not in files:
        where = os.environ.get(FOLDER)
        more = f", or put {name}.toml into {where}" if where else f"; {FOLDER} names a folder for files of your own"
        raise ConfigError(f"no experiment {name!r}: use {', '.join(files)}{more}")
    experiment, path = load_experiment(str(files[name]))
    if experiment.name != name:
        raise ConfigError(f"{path}: name is {experiment.name!r}: it must be {name!r}, as the file")
    return experiment, path


def clashes() -> Iterator[str]:
    """Files of the folder that bear the name of an experiment of the package, a line each."""
    for path in _of_the_folder():
        if path.stem in OWN:
            yield f"{path} is not offered: the package has an experiment {path.stem}; give the file another name"


def unreadable_folder() -> str | None:
    """A line where the folder VECTORCLM_EXPERIMENTS cannot be read, as while its disk is not mounted; else None."""
    folder = os.environ.get(FOLDER)
    try:
        if folder:
            next(Path(folder).iterdir(), None)
    except OSError as error:
        return f"the folder {folder}, which {FOLDER} names, cannot be read ({error.strerror}): mount or create it"
    return None


def _of_the_folder() -> list[Path]:
    """The files of the folder; none while it cannot be read."""
    if not (folder := os.environ.get(FOLDER)):
        return []
    with suppress(OSError):
        return sorted(path for path in Path(folder).iterdir() if path.suffix in (".toml", ".json") and path.is_file())
    return []
