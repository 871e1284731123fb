"""One writer at a time: a claim on a key of the store that renews itself, and expires when its holder dies.

Each write after the first replaces only what was read (`Storage.replace`): a renewal the holder's own last claim, a
take-over the dead one's. So of several that find a dead claim one gets it, and a holder that stood still neither renews
nor gives back what another has taken over. The claim alone protects nothing that is published, see `publication`.
"""

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from vectorclm.errors import InUseError, StoreError
from vectorclm.runtime.processes import find_process, process_identity, process_space
from vectorclm.store.storage import Storage

logger = logging.getLogger(__name__)
LEASE_SECONDS = 30  # a lease not renewed for this long belongs to a dead process
PATIENCE = 4 / 3  # so many times as long the claim of another machine must stay as it is, to be a dead one's
TAKEOVER_SECONDS = 1.0  # longer than a store takes to show what was written
_held: dict[tuple[str, str], "Lease"] = {}  # by this process, by store and name


class Lease:
    """A claim on a key, kept alive by a thread; the token tells whose it is."""

    def __init__(self, store: Storage, name: str) -> None:
        self.store, self.name = store, name
        self._token = secrets.token_hex(8)
        self._last = b""  # as it was written last
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name=name)

    def acquire(self) -> None:
        """Claim the key. Raises InUseError while another live process holds it.

        Of a holder on another machine it is waited for a renewal, PATIENCE times LEASE_SECONDS at most.
        """
        while not self.store.write(self.name, self._next(), only_if_absent=True):
            if (claim := self.store.read(self.name)) is None:
                continue  # given back since then: others may want it, too
            holder = read_claim(claim)
            if claim and self._lives(claim, holder):
                raise InUseError(
                    f"{self.name} is held by process {holder.get('pid')} on {holder.get('host')}: "
                    "wait for it, or stop it"
                )
            if self.store.replace(self.name, claim, self._next()):  # else another was faster, and may be alive
                if not self.store.is_local:  # some stores compare and write in two steps: the last to write has it
                    time.sleep(TAKEOVER_SECONDS)
                    self.check()
                break
        _held[self.store.uri, self.name] = self
        self._keeper.start()

    def _lives(self, claim: bytes, holder: Mapping[str, Any]) -> bool:
        """Whether the holder lives: here its process says so, elsewhere its claim changes. No clocks are compared."""
        if is_here(holder):
            return find_process(holder) is not None
        logger.info("%s is of %s: waiting to see whether it is renewed", self.name, holder.get("host", "nobody known"))
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE * LEASE_SECONDS:
            time.sleep(LEASE_SECONDS / 60)
            if (now := self.store.read(self.name)) != claim:
                return now is not None  # else it was given back
        return False

    def check(self) -> None:
        """Raise InUseError where the claim was lost, because this process stood still for too long."""
        holder = self.holder()
        if holder.get("token") != self._token:
            by = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "one that has ended since"
            raise InUseError(f"{self.name} was taken over by {by}: this process stood still for too long")

    def release(self) -> None:
        """End the claim; what another has taken over stays theirs."""
        _held.pop((self.store.uri, self.name), None)
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join()
        with suppress(Exception):  # an unreachable store lets it expire
            claim = self.store.read(self.name) or b""
            if read_claim(claim).get("token") == self._token:
                self.store.withdraw(self.name, claim)

    def _keep(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / 3):
            with suppress(OSError, StoreError):  # a store that is away for a moment is asked again
                claim = self._last
                if not self.store.replace(self.name, claim, self._next()):
                    self._last = self.store.read(self.name) or b""
                    if read_claim(self._last).get("token") != self._token:
                        return

    def holder(self) -> dict[str, Any]:
        """Who has the key; empty where nobody has."""
        return read_claim(self.store.read(self.name) or b"")

    def _next(self) -> bytes:
        """The claim as it is to be written now; what was written last is compared with what is there."""
        self._last = self._claim()
        return self._last

    def _claim(self) -> bytes:
        claim = {
            "host": socket.gethostname(),
            **process_identity(psutil.Process()),
            "token": self._token,
            "renewed": time.time(),
        }
        return json.dumps(claim).encode()


def read_claim(claim: bytes) -> dict[str, Any]:
    """What a holder wrote; empty where it cannot be read."""
    with suppress(ValueError, TypeError):
        return dict(json.loads(claim))
    return {}


def is_alive(holder: Mapping[str, Any]) -> bool:
    """Whether a lease's holder seems to live, at a glance: elsewhere by its last renewal, if the clocks agree.

    It is enough to tell a person; before anything is taken from a holder, `Lease.acquire` looks longer.
    """
    if is_here(holder):
        return find_process(holder) is not None
    return bool(time.time() - holder.get("renewed", 0) < LEASE_SECONDS)


def check_held(store: Storage, name: str) -> None:
    """Raise InUseError where this process took that claim and has lost it since."""
    if (lease := _held.get((store.uri, name))) is not None:
        lease.check()


def is_here(holder: Mapping[str, Any]) -> bool:
    """Whether a holder's process numbers are those of this machine, and of this container."""
    return (holder.get("host"), holder.get("pids")) == (socket.gethostname(), process_space())
