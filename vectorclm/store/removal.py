"""Remove a model or an experiment from a store, with what was built from it, and without what others need."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from vectorclm.errors import ConfigError, InUseError
from vectorclm.store.artifact import Store
from vectorclm.store.gc import is_linked, owners
from vectorclm.store.layout import EXPORT
from vectorclm.store.listing import Folder, Inventory, take_inventory
from vectorclm.store.model_names import resolve_model
from vectorclm.store.model_ref import ADDRESS


@dataclass(frozen=True)
class Removal:
    """What goes with a model or an experiment."""

    what: str
    experiment: str | None  # the name of an experiment that goes as a whole
    folders: Sequence[Folder]  # artifacts and checkpoints; what was built from others comes first
    kept: Sequence[Folder]  # artifacts of the experiment that other experiments use
    users: Mapping[str, set[str]]  # the experiments that use an artifact, by its fingerprint

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprints of the artifacts."""
        return list(dict.fromkeys(folder.fingerprint for folder in self.folders))

    def as_json(self) -> dict[str, Any]:
        """The removal as `store rm --json` prints it."""
        return {
            "what": self.what,
            "removes": [self._row(folder) for folder in self.folders],
            "keeps": [self._row(folder) for folder in self.kept],
            "bytes": sum(folder.bytes for folder in self.folders),
        }

    def _row(self, folder: Folder) -> dict[str, Any]:
        used_by = sorted(self.users.get(folder.fingerprint, ()))
        return {"key": folder.key, "bytes": folder.bytes, "used_by": used_by}


def plan_removal(name: str, store: Store) -> Removal:
    """What goes with an experiment, or with the model that a name means (see `resolve_model`); removes nothing.

    With an experiment go the artifacts that no other experiment uses; with each artifact goes what was built from it.
    Raises ConfigError where the store has no such model, or more than one.
    """
    inventory = take_inventory(store)
    users = inventory.used_by()
    if any(name in names for names in users.values()):
        chosen = {fingerprint for fingerprint, names in users.items() if names == {name}}
        what, experiment = f"the experiment {name}", name
    else:
        match = ADDRESS.fullmatch(resolve_model(name, store.uri).rstrip("/"))
        if match is None or match["root"] != store.uri:
            raise ConfigError(f"{name} is not in {store.uri}: only an artifact of a store can be removed from it")
        chosen, what, experiment = {match["fingerprint"]}, f"{match['stage']}/{match['fingerprint'][:12]}", None
    order = _with_dependents(chosen, inventory)
    folders = [folder for folder in (*inventory.checkpoints, *inventory.artifacts) if folder.fingerprint in order]
    folders.sort(key=lambda folder: -order[folder.fingerprint])
    kept = [
        folder
        for folder in inventory.artifacts
        if experiment in users.get(folder.fingerprint, ()) and folder.fingerprint not in order
    ]
    return Removal(what, experiment, folders, kept, users)


def _with_dependents(chosen: set[str], inventory: Inventory) -> dict[str, int]:
    """The chosen artifacts and all that were built from them, each with the number of steps from the first inputs."""
    inputs = {
        folder.fingerprint: set(folder.artifact.manifest.get("inputs", {}).values())
        for folder in inventory.artifacts
        if folder.artifact is not None
    }
    order = dict.fromkeys(chosen, 0)
    changed = True
    while changed:
        changed = False
        for fingerprint, behind in inputs.items():
            steps = max((order[each] + 1 for each in behind if each in order), default=0)
            if steps > order.get(fingerprint, 0):
                order[fingerprint], changed = steps, True
    return order


def remove(store: Store, removal: Removal) -> Iterator[tuple[Folder, str]]:
    """Remove the folders one by one; yields each with the reason for which it stays, which is empty where it is gone.

    What a folder that stays was built from stays, too.
    """
    needed: set[str] = set()
    for folder in removal.folders:
        why = "what was built from it stays" if folder.fingerprint in needed else _remove(store, folder)
        if why and folder.artifact is not None:
            needed |= set(folder.artifact.manifest.get("inputs", {}).values())
        if not why and folder.key.startswith(f"{EXPORT}/"):
            store.delete(f"reports/{folder.fingerprint}.html")
        yield folder, why


def _remove(store: Store, folder: Folder) -> str:
    """Remove a folder under its leases; returns the reason for which it stays, if it does."""
    if is_linked(store, folder.key):
        return "is a link: remove it by hand"
    with ExitStack() as stack:
        try:
            for lease in owners(folder.key):
                stack.enter_context(store.lease(lease))
        except InUseError:
            return "is in use"
        store.remove(folder.key)
    return ""
