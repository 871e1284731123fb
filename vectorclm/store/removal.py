"""Remove a model or an experiment from a store, with what was built from it, and without what others need."""

import logging
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from vectorclm.errors import ConfigError, InUseError, StoreError
from vectorclm.store.artifact import StageSpec, Store
from vectorclm.store.gc import is_linked, owners
from vectorclm.store.layout import EXPORT, MEASURE
from vectorclm.store.lease import Lease, is_here, watched
from vectorclm.store.listing import Claim, Folder, Inventory, read_leases, take_inventory
from vectorclm.store.model_names import resolve_model
from vectorclm.store.model_ref import ADDRESS

READS = "reads"  # begins the leases of runs that will read artifacts
REMOVAL_SECONDS = 0.5  # between two checks of a removal in progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removal:
    """What goes with a model or an experiment."""

    what: str
    experiment: str | None  # the name of an experiment that goes as a whole
    folders: Sequence[Folder]  # artifacts and checkpoints; what was built from others comes first
    kept: Sequence[Folder]  # artifacts that others use, or that no export uses
    users: Mapping[str, set[str]]  # the experiments that use an artifact, by its fingerprint
    reasons: Mapping[str, str]  # for which an artifact is kept, by its key

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprints of the artifacts."""
        return list(dict.fromkeys(folder.fingerprint for folder in self.folders))

    def as_json(self) -> dict[str, Any]:
        """The removal as `store rm --json` prints it."""
        return {
            "what": self.what,
            "removes": [self._row(folder) for folder in self.folders],
            "keeps": [{**self._row(folder), "why": self.reasons[folder.key]} for folder in self.kept],
            "bytes": sum(folder.bytes for folder in self.folders),
        }

    def _row(self, folder: Folder) -> dict[str, Any]:
        used_by = sorted(self.users.get(folder.fingerprint, ()))
        return {"key": folder.key, "bytes": folder.bytes, "used_by": used_by}


def plan_removal(name: str, store: Store) -> Removal:
    """What goes with an experiment, or with the model that a name means (see `resolve_model`); removes nothing.

    With an experiment go the artifacts that only its exports were built from. What another artifact was built from
    stays, also where no export uses that one yet. With a model goes what was built from it. Raises ConfigError where
    the store has no such model, or more than one.
    """
    inventory = take_inventory(store)
    users = inventory.used_by()
    if any(name in names for names in users.values()):
        own = {fingerprint for fingerprint, names in users.items() if names == {name}}
        others = [fingerprint for fingerprint in inventory.inputs if fingerprint not in users]
        chosen = own - inventory.behind(others)
        what, experiment = f"the experiment {name}", name
    else:
        match = ADDRESS.fullmatch(resolve_model(name, store.uri).rstrip("/"))
        if match is None or match["root"] != store.uri:
            raise ConfigError(f"{name} is not in {store.uri}: only an artifact of a store can be removed from it")
        chosen, what, experiment = {match["fingerprint"]}, f"{match['stage']}/{match['fingerprint'][:12]}", None
    order = _with_dependents(chosen, inventory)
    folders = [folder for folder in (*inventory.checkpoints, *inventory.artifacts) if folder.fingerprint in order]
    # What the name finds is removed last, so that a second call goes on where a first one ended.
    folders.sort(key=lambda folder: order[folder.fingerprint] * (1 if experiment else -1))
    kept = _kept(experiment, chosen, inventory, users) if experiment else {}
    return Removal(
        what, experiment, folders, [folder for folder in inventory.artifacts if folder.key in kept], users, kept
    )


def _kept(
    experiment: str, chosen: Collection[str], inventory: Inventory, users: Mapping[str, set[str]]
) -> dict[str, str]:
    """The artifacts of an experiment that stay, and what was built from it without an export; each with the reason."""
    inputs, kept = inventory.inputs, dict[str, str]()
    behind = {folder.key: inventory.behind([folder.fingerprint]) for folder in inventory.artifacts}
    unused = [folder for folder in inventory.artifacts if folder.fingerprint in inputs.keys() - users.keys()]
    for folder in inventory.artifacts:
        names = users.get(folder.fingerprint, set())
        if experiment in names and folder.fingerprint not in chosen:
            built = [other.key for other in unused if folder.fingerprint in behind[other.key]]
            others = sorted(names - {experiment})
            kept[folder.key] = f"{', '.join(others)} uses it" if others else f"{', '.join(built)} was built from it"
    own = {fingerprint for fingerprint, names in users.items() if experiment in names}
    for folder in unused:
        if behind[folder.key] & own:
            kept[folder.key] = "no export uses it"
    return kept


def _with_dependents(chosen: set[str], inventory: Inventory) -> dict[str, int]:
    """The chosen artifacts and all that were built from them, each with the number of steps from the first inputs."""
    order = dict.fromkeys(chosen, 0)
    changed = True
    while changed:
        changed = False
        for fingerprint, behind in inventory.inputs.items():
            steps = max((order[each] + 1 for each in behind if each in order), default=0)
            if steps > order.get(fingerprint, 0):
                order[fingerprint], changed = steps, True
    return order


@contextmanager
def claimed(store: Store, removal: Removal) -> Iterator[dict[str, str]]:
    """Hold the leases of all that goes while the block runs; yields what stays, by key, with the reason.

    What a process builds stays with all that it is built from. While a part of an experiment stays, so do its exports,
    by which a later removal finds it. Raises InUseError while a process builds something whose inputs are not known.
    """
    stays, taken = dict[str, str](), dict[str, bool]()
    with ExitStack() as stack:
        for folder in removal.folders:
            leases = owners(folder.key)
            for lease in leases:
                if lease not in taken:
                    taken[lease] = _acquired(stack, store, lease)
            if is_linked(store, folder.key):
                stays[folder.key] = "is a link: remove it by hand"
            elif not all(taken[lease] for lease in leases):
                stays[folder.key] = "is in use"
        inventory = take_inventory(store, sure=True)  # from here on, no other process begins to build what goes
        read = inventory.behind(_read_now(inventory, [lease for lease, own in taken.items() if own]))
        going = {folder.fingerprint for folder in removal.folders if folder.key not in stays}
        staying = inventory.behind(inventory.inputs.keys() - going)
        for folder in removal.folders:
            if folder.fingerprint in staying:
                stays.setdefault(folder.key, "what was built from it stays")
            elif folder.fingerprint in read:
                stays.setdefault(folder.key, "a running process builds from it")
        if stays and removal.experiment is not None:
            for folder in removal.folders:
                if folder.key.startswith(f"{EXPORT}/"):
                    stays.setdefault(folder.key, "the rest of the experiment stays")
        yield stays


@contextmanager
def protected(store: Store, specs: Collection[StageSpec]) -> Iterator[None]:
    """Keep these artifacts, and what they were built from, from `store rm` while the block runs.

    For a run of several stages, which holds no other lease between two of them. A removal that has begun ends first, so
    that the run finds either the whole artifact or none.
    """
    lease = Lease(store, f"leases/{READS}-{secrets.token_hex(8)}.json", [spec.fingerprint for spec in specs])
    lease.acquire()
    try:
        for claim in read_leases(store):  # of a run that was killed on this machine
            if claim.name.startswith(f"{READS}-") and is_here(claim.holder) and not claim.alive:
                store.delete(claim.key)
        _wait_for_removals(store, {spec.lease for spec in specs})
        yield
    finally:
        lease.release()
        with suppress(StoreError):  # no other process uses this name, so that S3 need not keep an empty object
            store.delete(lease.name)


def _wait_for_removals(store: Store, leases: Collection[str]) -> None:
    """Wait while another process holds one of these leases without inputs: it removes, and builds nothing."""
    warned = False
    while found := _removals(store, leases):
        if not warned:
            logger.warning("%s is being removed or repaired: waiting for that to end", found[0].name)
        warned = True
        time.sleep(REMOVAL_SECONDS)


def _removals(store: Store, leases: Collection[str]) -> list[Claim]:
    """The leases among these that a live process holds without inputs."""
    claims = [claim for claim in read_leases(store) if claim.name in leases and "inputs" not in claim.holder]
    alive = watched(store, [claim.key for claim in claims if claim.holder])
    return [claim for claim in claims if claim.key in alive]


def _acquired(stack: ExitStack, store: Store, lease: str) -> bool:
    try:
        stack.enter_context(store.lease(lease))
    except InUseError:
        return False
    return True


def _read_now(inventory: Inventory, own: Collection[str]) -> set[str]:
    """The inputs of all that other processes build now. Raises InUseError where a lease does not state them."""
    inputs = inventory.inputs
    finished = {
        f"{folder.key.split('/')[0]}-{folder.fingerprint[:16]}": folder.fingerprint for folder in inventory.artifacts
    }
    found = set[str]()
    for claim in inventory.leases:
        if not claim.alive or claim.name in own:
            continue
        known = claim.holder.get("inputs", inputs.get(finished.get(claim.name, "")))
        if known is None or claim.name.startswith(f"{MEASURE}-"):  # a measurement reads a model by its content
            by = f"process {claim.holder.get('pid')} on {claim.holder.get('host')}"
            raise InUseError(f"{by} builds {claim.name}, perhaps from what would go: wait for it, or stop it")
        found |= set(known)
    return found


def remove(store: Store, removal: Removal, stays: Collection[str]) -> Iterator[Folder]:
    """Remove the folders but for those that stay, while `claimed` holds their leases; yields each once it is gone."""
    for folder in removal.folders:
        if folder.key not in stays:
            if folder.key.startswith(f"{EXPORT}/"):
                store.delete(f"reports/{folder.fingerprint}.html")
            store.remove(folder.key)
            yield folder
