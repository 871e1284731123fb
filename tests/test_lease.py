"""One writer at a time, whatever happens to the one before."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from vectorclm import lease as module
from vectorclm.artifact import Plan, Store, build
from vectorclm.errors import InUseError
from vectorclm.lease import Lease, process_space


def dead(store: Store, name: str = "leases/k.json") -> None:
    """Leave a claim of a process that has ended."""
    ended = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
    ended.start()
    pid = ended.pid
    ended.join()
    claim = {
        "host": os.uname().nodename,
        "pid": pid,
        "started": 1.0,
        "pids": process_space(),
        "token": "old",
        "renewed": time.time(),
    }
    store.write(name, json.dumps(claim).encode())


def test_of_two_that_find_a_dead_claim_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, both, got = Store(str(tmp_path)), threading.Barrier(2), list[str]()
    dead(store)
    asked = Lease.holder
    seen = threading.local()

    def together(self: Lease) -> dict[str, object]:
        found = asked(self)
        if not getattr(seen, "once", False):  # both look before either writes
            seen.once = True
            both.wait(30)
        return found

    monkeypatch.setattr(Lease, "holder", together)

    def contend() -> None:
        claim = Lease(store, "leases/k.json")
        try:
            claim.take()
            got.append("in")
            claim.give_back()
        except InUseError:
            got.append("out")

    threads = [threading.Thread(target=contend) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["in", "out"]


def test_a_live_process_keeps_its_claim_however_long_it_stood_still(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.lease("k"):
        claim = json.loads((tmp_path / "leases/k.json").read_text())
        store.write("leases/k.json", json.dumps({**claim, "renewed": 0}).encode())
        with pytest.raises(InUseError, match=f"process {os.getpid()}"), store.lease("k"):
            pass
    assert not (tmp_path / "leases/k.json").exists()


def test_a_store_that_is_away_for_a_moment_does_not_end_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.15)
    store, failed, renewed = Store(str(tmp_path)), threading.Event(), threading.Event()
    write = store.write

    def flaky(key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        if not only_if_absent and not failed.is_set():
            failed.set()
            raise OSError("away")
        if not only_if_absent:
            renewed.set()
        return write(key, data, only_if_absent=only_if_absent)

    monkeypatch.setattr(store, "write", flaky)
    with store.lease("k") as claim:
        assert failed.wait(30) and renewed.wait(30)
        claim.check()


def test_who_lost_the_claim_publishes_nothing(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), Plan("sample", 1, {}, {})

    def robbed(out: Path) -> dict[str, object]:
        (name,) = (tmp_path / "leases").iterdir()
        claim = {"host": "elsewhere", "pid": 7, "token": "thief", "renewed": time.time()}
        name.write_text(json.dumps(claim))
        return {}

    with pytest.raises(InUseError, match="taken over by process 7 on elsewhere"):
        build(store, plan, robbed)
    assert store.find("sample", plan.fingerprint) is None
    assert len(list((tmp_path / "leases").iterdir())) == 1  # the other's claim stays theirs
