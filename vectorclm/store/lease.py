"""Leases: one writer at a time. A claim on a key of the store renews itself, and expires when its holder dies.

Each write after the first replaces only what was read (`Storage.replace`, compare-and-swap): a renewal replaces the
holder's own last claim, a takeover the dead holder's claim. Of several processes that find a dead claim, one gets the
lease, and a holder that was suspended neither renews nor releases a lease that another process has taken over. A claim
alone does not protect published files, see `publication`.
"""

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import psutil

from vectorclm.errors import InUseError, StoreError
from vectorclm.formats.json_files import parse_json
from vectorclm.runtime.processes import find_process, process_identity, process_space
from vectorclm.store.storage import Storage

logger = logging.getLogger(__name__)
LEASE_SECONDS = 30  # a lease not renewed for this long belongs to a dead process
PATIENCE = 4 / 3  # times LEASE_SECONDS: another machine's claim that stays unchanged for this long is dead
TAKEOVER_SECONDS = 1.0  # more than a store needs to show a write
_held: dict[tuple[str, str], "Lease"] = {}  # leases of this process, by store and name


class Lease:
    """A claim on a key, renewed by a thread; a random token identifies the holder.

    `inputs` are the fingerprints of the artifacts that the holder reads, which no other process removes meanwhile.
    """

    def __init__(self, store: Storage, name: str, inputs: Sequence[str] | None = None) -> None:
        self.store, self.name, self.inputs = store, name, inputs
        self._token = secrets.token_hex(8)
        self._last = b""  # the claim as written last
        self._ended = threading.Event()
        # In the context of its maker, so that warnings reach the log of the maker's run.
        self._keeper = threading.Thread(target=copy_context().run, args=(self._keep,), daemon=True, name=name)

    def acquire(self) -> None:
        """Claim the key. Raises InUseError while another live process holds it.

        For a holder on another machine, waits at most PATIENCE times LEASE_SECONDS for a renewal.
        """
        while not self.store.write(self.name, self._next(), only_if_absent=True):
            if (claim := self.store.read(self.name)) is None:
                continue  # released since then: other processes may want the lease, too
            holder = read_claim(claim)
            if claim and self._lives(claim, holder):
                raise InUseError(
                    f"{self.name} is held by process {holder.get('pid')} on {holder.get('host')}: "
                    "wait for it, or stop it"
                )
            if self.store.replace(self.name, claim, self._next()):  # otherwise another process was faster
                if not self.store.is_local:  # some stores compare and write in two steps: the last writer wins
                    time.sleep(TAKEOVER_SECONDS)
                    self.check()
                break
        _held[self.store.uri, self.name] = self
        self._keeper.start()

    def _lives(self, claim: bytes, holder: Mapping[str, Any]) -> bool:
        """Whether the holder lives: by its process on this machine, else by a renewal. No clocks are compared."""
        if is_here(holder):
            return find_process(holder) is not None
        logger.info(
            "%s is held by %s: waiting to see whether it is renewed", self.name, holder.get("host", "an unknown host")
        )
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE * LEASE_SECONDS:
            time.sleep(LEASE_SECONDS / 60)
            if (now := self.store.read(self.name)) != claim:
                return now is not None  # None: the lease was released
        return False

    def check(self) -> None:
        """Raise InUseError where another process took the lease over, because this one was suspended for too long."""
        holder = self.holder()
        if holder.get("token") != self._token:
            by = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "a process that has ended since"
            raise InUseError(f"{self.name} was taken over by {by}: this process was suspended for too long")

    def release(self) -> None:
        """Release the lease; a lease that another process has taken over stays."""
        _held.pop((self.store.uri, self.name), None)
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join()
        with suppress(Exception):  # in an unreachable store, the lease expires
            claim = self.store.read(self.name) or b""
            if read_claim(claim).get("token") == self._token:
                self.store.withdraw(self.name, claim)

    def _keep(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / 3):
            with suppress(OSError, StoreError):  # a store that is unreachable for a moment is asked again
                claim = self._last
                if not self.store.replace(self.name, claim, self._next()):
                    self._last = self.store.read(self.name) or b""
                    if read_claim(self._last).get("token") != self._token:
                        return

    def holder(self) -> dict[str, Any]:
        """The holder's claim; empty where there is none."""
        return read_claim(self.store.read(self.name) or b"")

    def _next(self) -> bytes:
        """The claim to write now, kept as `_last` for the next compare-and-swap."""
        self._last = self._claim()
        return self._last

    def _claim(self) -> bytes:
        claim = {
            "host": socket.gethostname(),
            **process_identity(psutil.Process()),
            "token": self._token,
            "renewed": time.time(),
            **({"inputs": list(self.inputs)} if self.inputs is not None else {}),
        }
        return json.dumps(claim).encode()


def read_claim(claim: bytes) -> dict[str, Any]:
    """Parse a holder's claim; empty where it cannot be parsed."""
    with suppress(ValueError, TypeError):
        return dict(parse_json(claim))
    return {}


def is_alive(holder: Mapping[str, Any]) -> bool:
    """Whether a lease's holder seems alive; on another machine by its last renewal, if the clocks agree.

    This quick check is enough for display; `watched` and `Lease.acquire` wait for a renewal before they decide.
    """
    if is_here(holder):
        return find_process(holder) is not None
    return bool(time.time() - holder.get("renewed", 0) < LEASE_SECONDS)


def watched(store: Storage, keys: Collection[str]) -> set[str]:
    """Those of the leases with these keys whose holders live, whatever the clocks of their machines say.

    A holder on this machine is judged by its process. All others are watched together, until each has changed its
    claim, or for PATIENCE times LEASE_SECONDS. A claim that is gone by then was released.
    """
    claims = {key: store.read(key) or b"" for key in keys}
    holders = {key: read_claim(claim) for key, claim in claims.items()}
    alive = {key for key, holder in holders.items() if is_here(holder) and find_process(holder) is not None}
    waiting = {key for key, holder in holders.items() if holder and not is_here(holder)}
    began = time.monotonic()
    while waiting and time.monotonic() - began < PATIENCE * LEASE_SECONDS:
        time.sleep(LEASE_SECONDS / 60)
        for key in sorted(waiting):
            if (now := store.read(key) or b"") != claims[key]:
                waiting.discard(key)
                alive |= {key} if read_claim(now) else set()
    return alive


def check_held(store: Storage, name: str) -> None:
    """Raise InUseError where this process acquired this lease and has lost it since."""
    if (lease := _held.get((store.uri, name))) is not None:
        lease.check()


def is_here(holder: Mapping[str, Any]) -> bool:
    """Whether a holder runs on this machine and in this container, so that its pid is valid here."""
    return (holder.get("host"), holder.get("pids")) == (socket.gethostname(), process_space())
