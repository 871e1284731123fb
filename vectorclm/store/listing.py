"""Inventory and verification of a store: its artifacts, checkpoints and leases, and their bytes."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vectorclm.errors import ConfigError, CorruptArtifactError
from vectorclm.store.artifact import MANIFEST, Artifact, StageSpec, Store
from vectorclm.store.layout import EXPORT, MEASURE, STAGES
from vectorclm.store.lease import is_alive, read_claim, watched
from vectorclm.store.manifest import read_manifest
from vectorclm.store.manifest_memory import ManifestMemory
from vectorclm.store.storage import StoredFile

STAGE_FOLDERS = (*STAGES, MEASURE)  # the folders of a store that contain artifacts
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
STEP = re.compile(r"(?:again/)?step-[0-9]+(?:-[0-9a-f]{8})?")  # of a training, or of a training that is built again
LEASE = re.compile(r"leases/[a-z_]+-[0-9a-f]{16}\.json")
READERS = 8  # manifests that are fetched in parallel


@dataclass(frozen=True)
class Folder:
    """A folder that has or needs a manifest: `{stage}/{fingerprint}` or `checkpoints/{fingerprint}/…/step-…`."""

    key: str
    files: Mapping[str, StoredFile]  # in the folder, by name
    artifact: Artifact | None  # None where the manifest is missing or broken
    problem: str | None  # what is wrong with the manifest, or with the names and sizes of the files

    @property
    def state(self) -> str:
        """`finished` with a manifest, `broken` where it cannot be read or files are damaged, `unfinished` with none."""
        return "broken" if self.problem else "finished" if self.artifact else "unfinished"

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the artifact, or of the artifact that a checkpoint belongs to."""
        return self.key.split("/")[1]

    @property
    def bytes(self) -> int:
        """The size of all files, in bytes."""
        return sum(file.bytes for file in self.files.values())

    @property
    def modified(self) -> float:
        """The time of the last write, in seconds since 1970."""
        return max(file.modified for file in self.files.values())


@dataclass(frozen=True)
class Claim:
    """A lease as its holder wrote it, and whether the holder is alive."""

    key: str
    holder: Mapping[str, Any]
    alive: bool
    bytes: int
    modified: float

    @property
    def name(self) -> str:
        """The name of the lease: the stage, and the first digits of the fingerprint."""
        return self.key.removeprefix("leases/").removesuffix(".json")


@dataclass(frozen=True)
class Inventory:
    """All artifacts and checkpoints of a store, and the leases of processes that build something now."""

    artifacts: Sequence[Folder]
    checkpoints: Sequence[Folder]
    leases: Sequence[Claim]

    @cached_property
    def inputs(self) -> dict[str, set[str]]:
        """The fingerprints of the inputs of each finished artifact, by the artifact's fingerprint."""
        return {
            folder.fingerprint: set(folder.artifact.manifest.get("inputs", {}).values())
            for folder in self.artifacts
            if folder.artifact is not None
        }

    def behind(self, fingerprints: Iterable[str]) -> set[str]:
        """The fingerprints of all that these artifacts were built from, and their own."""
        inputs, found, new = self.inputs, set[str](), set(fingerprints)
        while new:
            found |= new
            new = {each for fingerprint in new for each in inputs.get(fingerprint, ())} - found
        return found

    def used_by(self) -> dict[str, set[str]]:
        """The names of the experiments whose export was built from an artifact, by the artifact's fingerprint."""
        users: dict[str, set[str]] = {}
        for folder in self.artifacts:
            if folder.artifact is not None and folder.artifact.manifest.get("stage") == EXPORT:
                for fingerprint in self.behind([folder.fingerprint]):
                    users.setdefault(fingerprint, set()).add(folder.artifact.manifest["config"]["name"])
        return users

    def as_json(self) -> dict[str, Any]:
        """The inventory as `store ls --json` prints it."""
        users = self.used_by()
        return {
            "artifacts": [
                {**_row(folder), "used_by": sorted(users.get(folder.fingerprint, ()))} for folder in self.artifacts
            ],
            "checkpoints": [_row(folder) for folder in self.checkpoints],
            "leases": [
                {"lease": claim.key, **{key: claim.holder.get(key) for key in ("host", "pid")}, "alive": claim.alive}
                for claim in self.leases
            ],
        }


def _row(folder: Folder) -> dict[str, Any]:
    stage, fingerprint, *step = folder.key.split("/")
    created = folder.artifact.manifest.get("created") if folder.artifact else None
    return {
        "stage": stage,
        "fingerprint": fingerprint,
        **({"step": int(step[-1].split("-")[1])} if step else {}),
        "state": folder.state,
        "files": len(folder.files),
        "bytes": folder.bytes,
        "created": created,
    }


def take_inventory(store: Store, *, sure: bool = False) -> Inventory:
    """List the store's own folders and read all manifests; see `read_leases` for `sure`.

    Raises StoreError where the store cannot be read.
    """
    there = set(store.list(""))
    stages = [stage for stage in STAGE_FOLDERS if stage in there]
    memory = None if store.is_local else ManifestMemory(store.uri)
    patterns = {stage: rf"{stage}/{FINGERPRINT.pattern}" for stage in stages}
    artifacts = [folder for stage in stages for folder in _folders(store, stage, patterns[stage], memory)]
    checkpoints = _folders(store, "checkpoints", rf"checkpoints/{FINGERPRINT.pattern}/{STEP.pattern}", memory)
    if memory is not None:
        memory.save([folder.key for folder in (*artifacts, *checkpoints)])
    return Inventory(artifacts, checkpoints, read_leases(store, sure=sure))


def _folders(store: Store, below: str, pattern: str, memory: ManifestMemory | None) -> list[Folder]:
    """The folders below a key that match this pattern, ordered by key."""
    found: dict[str, dict[str, StoredFile]] = {}
    for key, file in store.files(below).items():
        if matched := re.match(f"({pattern})/(.+)", key):
            found.setdefault(matched[1], {})[matched[2]] = file
        elif re.fullmatch(pattern, key) and store.read(f"{key}/{MANIFEST}") is not None:  # a link to a folder elsewhere
            found[key] = {name.removeprefix(f"{key}/"): file for name, file in store.files(key).items()}
    if store.is_local:  # faster than threads
        return [read_folder(store, key, files) for key, files in sorted(found.items())]
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda item: read_folder(store, item[0], item[1], memory), sorted(found.items())))


def read_folder(
    store: Store, key: str, files: Mapping[str, StoredFile], memory: ManifestMemory | None = None
) -> Folder:
    """Read the manifest of a folder with these files, if there is one; `memory` may know it."""
    if MANIFEST not in files:
        return Folder(key, files, None, None)
    try:
        if (found := _known(store, key, files[MANIFEST], memory)) is None:
            found = store.look_up(*key.rsplit("/", 1))
            if found is not None and memory is not None:
                memory.remember(key, files[MANIFEST].state, found.manifest)
        return Folder(key, files, found, None if found is None else found.damage(files))
    except CorruptArtifactError as error:
        return Folder(key, files, None, str(error))


def _known(store: Store, key: str, file: StoredFile, memory: ManifestMemory | None) -> Artifact | None:
    """The artifact as the memory knows its manifest, in this state of its file."""
    if memory is None or (data := memory.known(key, file.state)) is None:
        return None
    with suppress(CorruptArtifactError):  # a damaged cache
        stage, fingerprint = key.rsplit("/", 1)
        return Artifact(store, stage, fingerprint, read_manifest(data, store.uri_of(key)))
    return None


def read_leases(store: Store, *, sure: bool = False) -> list[Claim]:
    """Read all leases. A lease that cannot be parsed has no holder; other files in the folder are ignored.

    A holder on another machine counts as alive by its clock; with `sure`, by a renewal, for which this waits.
    """
    claims = []
    for key, file in store.files("leases").items():
        if LEASE.fullmatch(key) is None or not file.bytes:  # an empty lease is released, see `Storage.withdraw`
            continue
        holder = read_claim(store.read(key) or b"")
        claims.append(Claim(key, holder, bool(holder) and is_alive(holder), file.bytes, file.modified))
    if sure:
        alive = watched(store, [claim.key for claim in claims if claim.holder])
        claims = [replace(claim, alive=claim.key in alive) for claim in claims]
    return claims


def verify(store: Store, addresses: Sequence[str]) -> Iterator[tuple[Folder, list[str]]]:
    """Read every byte of the artifacts and checkpoints at these addresses, or of all, and yield the differences.

    An address is `STAGE`, `STAGE/FINGERPRINT` or the beginning of either, with or without the store's address before.
    Unfinished folders are skipped. Raises ConfigError for an address that matches nothing.
    """
    inventory = take_inventory(store)
    folders = [folder for folder in (*inventory.artifacts, *inventory.checkpoints) if folder.state != "unfinished"]
    wanted = [address.removeprefix(f"{store.uri}/").strip("/") for address in addresses]
    for address in wanted:
        if not any(folder.key.startswith(address) for folder in folders):
            raise ConfigError(f"{store.uri} has no finished {address}: `vectorclm store ls` shows what it has")
    for folder in folders:
        if not wanted or any(folder.key.startswith(address) for address in wanted):
            yield folder, list(_differences(folder)) or ([folder.problem] if folder.problem else [])


def _differences(folder: Folder) -> Iterator[str]:
    artifact = folder.artifact
    if artifact is None:
        return
    yield from artifact.differences()
    manifest = artifact.manifest
    if "format_version" not in manifest:  # a checkpoint, whose name is its step
        return
    computed = StageSpec(
        manifest["stage"], manifest["format_version"], manifest["config"], manifest["inputs"]
    ).fingerprint
    if computed != artifact.fingerprint:
        yield f"{artifact.uri}: its manifest's settings and inputs have the fingerprint {computed[:12]}…"
