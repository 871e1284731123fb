"""Work in slices: what one process finished, no later one does again, however the first one ended."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

RECORD = "slice.json"


def finish(folder: Path, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """What `make(out)` returns, its files in `folder`; or both as they were left there, where they are whole.

    A slice is made in a folder of its own and renamed at the end, so that of two processes one after the other or at
    one time, each finds it whole or not at all. A file that is not what its record says is made again.
    """
    found = _read(folder)
    if found is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    part.mkdir(parents=True)
    try:
        result = make(part)
        files = {path.name: _hash(path) for path in sorted(part.iterdir())}
        (part / RECORD).write_text(json.dumps({"files": files, "result": result}))
        with suppress(OSError):  # another process was first, with the same bytes
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    found = _read(folder)
    if found is None:
        raise OSError(f"{folder} was written, but cannot be read back: check this machine's memory and disk")
    return found


def place(source: Path, target: Path) -> None:
    """Let `target` be the file `source`, which stays: a second name where the file system can, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text())
        whole = all(_hash(folder / name) == found for name, found in record["files"].items())
        return dict(record["result"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            found.update(data)
    return found.hexdigest()
