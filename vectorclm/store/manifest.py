"""The manifest of an artifact or a checkpoint: size and SHA-256 of each file, sealed by a hash over the manifest."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vectorclm.errors import CorruptArtifactError
from vectorclm.formats.files import is_file_name
from vectorclm.formats.json_files import parse_manifest
from vectorclm.settings import digest
from vectorclm.store.storage import sha256_of

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"  # the key of the hash over everything else in the manifest
NAME, FINGERPRINT = re.compile(r"[a-z_]+"), re.compile(r"[0-9a-f]{64}")  # of an input
Describe = Callable[[Path], Mapping[str, Any]]  # adds fields to a file's entry in a manifest


def file_entry(path: Path, describe: Describe | None) -> dict[str, Any]:
    """The entry of a file in a manifest: size, SHA-256, and the fields of `describe`."""
    more = {} if describe is None else describe(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path), **more}


def place_of(file: Mapping[str, Any], name: str) -> str:
    """The place of a file below its artifact: its name, unless that name was taken in a remote store."""
    return str(file.get("place", name))


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as JSON bytes, with a hash over its content, so that a flipped bit is detected."""
    plain = json.loads(json.dumps(manifest))  # as a reader parses it
    return json.dumps({**plain, SEAL: digest(plain)}, indent=2, ensure_ascii=False).encode()


def read_manifest(data: bytes, uri: str) -> dict[str, Any]:
    """Parse a manifest; all its files must lie below its artifact and have a size and a SHA-256.

    Its inputs, by which other artifacts are looked up, must be names and fingerprints.

    Raises CorruptArtifactError for any other content.
    """
    try:
        manifest: dict[str, Any] = parse_manifest(data)
        if SEAL in manifest and manifest[SEAL] != digest({k: v for k, v in manifest.items() if k != SEAL}):
            raise ValueError("its bytes are not those that were written")
        for name, file in manifest["files"].items():
            if not isinstance(file.get("place", name), str):
                raise ValueError(f"the place of {name!r} is no name")
            for place in (name, place_of(file, name)):
                path = PurePosixPath(place)
                if "\0" in place or not is_file_name(place):
                    raise ValueError(f"it names the file {place!r:.100}, which no file can be called")
                if path.is_absolute() or ".." in path.parts or "\\" in place:
                    raise ValueError(f"it names the file {place!r}, which is not below it")
            if not FINGERPRINT.fullmatch(file["sha256"]) or type(file["bytes"]) is not int or file["bytes"] < 0:
                raise ValueError(f"the entry of {name!r} lacks a size or a SHA-256")
        for name, fingerprint in manifest.get("inputs", {}).items():
            if not NAME.fullmatch(name) or not FINGERPRINT.fullmatch(fingerprint):
                raise ValueError(f"its input {name!r} is no artifact of a store")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(
            f"{uri}/{MANIFEST} is not a valid manifest ({error!r}): run its stage again"
        ) from error
    return manifest
