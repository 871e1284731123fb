"""The manifest of an artifact or a checkpoint: what is in it, file by file, under a hash over all of it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vectorclm.errors import CorruptArtifactError
from vectorclm.settings import digest
from vectorclm.store.storage import sha256_of

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"  # over all else in it
Describe = Callable[[Path], Mapping[str, Any]]  # what a manifest says of a file beside its size and SHA-256


def file_entry(path: Path, describe: Describe | None) -> dict[str, Any]:
    """What a manifest says of a file."""
    more = {} if describe is None else describe(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path), **more}


def place_of(file: Mapping[str, Any], name: str) -> str:
    """Where a file lies below its artifact: by its name, unless in a remote store that name was taken."""
    return str(file.get("place", name))


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as JSON, with a hash over all of it, so that a wrong bit in it is seen as well."""
    plain = json.loads(json.dumps(manifest))  # as it will be read
    return json.dumps({**plain, SEAL: digest(plain)}, indent=2, ensure_ascii=False).encode()


def read_manifest(data: bytes, uri: str) -> dict[str, Any]:
    """A manifest whose files all lie below its artifact and have size and SHA-256.

    Raises CorruptArtifactError for any other.
    """
    try:
        manifest: dict[str, Any] = json.loads(data)
        if SEAL in manifest and manifest[SEAL] != digest({k: v for k, v in manifest.items() if k != SEAL}):
            raise ValueError("its bytes are not those that were written")
        for name, file in manifest["files"].items():
            if not isinstance(file["sha256"], str) or not isinstance(file["bytes"], int):
                raise ValueError(f"of the file {name!r} it tells no size and SHA-256")
            for place in (name, place_of(file, name)):
                path = PurePosixPath(place)
                if path.is_absolute() or ".." in path.parts or "\\" in place:
                    raise ValueError(f"it names the file {place!r}, which is not below it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(f"{uri}/{MANIFEST} is no manifest ({error!r}): run its stage again") from error
    return manifest
