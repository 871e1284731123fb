"""Other programs that use a model, each in an environment of its own that pip or npm builds once and keeps."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vectorclm-clients"


def python_with(requirements: Sequence[str]) -> Path:
    """The Python of an environment with these packages; skips where pip cannot install them."""
    folder = _folder("python", requirements)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            # What is installed beside these tests counts, too, so that pip downloads torch for none of them.
            (packages,) = folder.glob("lib/python*/site-packages")
            (packages / "beside.pth").write_text(sysconfig.get_path("purelib"))
            install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements]
            _install(install, folder)
            (folder / "complete").touch()
    return folder / "bin" / "python"


def node_with(packages: Sequence[str]) -> Path:
    """A folder whose scripts find these packages of npm."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("no npm here: apt-get install nodejs npm")
    folder = _folder("node", packages)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "package.json").write_text("{}")
            _install(["npm", "install", "--silent", *packages], folder)
            (folder / "complete").touch()
    return folder


def _folder(kind: str, names: Sequence[str]) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE / f"{kind}-{hashlib.sha256(repr((sys.version, *names)).encode()).hexdigest()[:12]}"


def _install(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command)} failed: {done.stderr[-500:]}")


def run_client(command: Sequence[str | Path], environment: Mapping[str, str], folder: Path) -> list[str]:
    """The lines that a client prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI"))}
    done = subprocess.run(
        [str(word) for word in command],
        env={**clean, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip().splitlines()
