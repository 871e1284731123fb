"""One writer at a time, whatever happens to the one before."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from vectorclm.errors import InUseError
from vectorclm.runtime import processes
from vectorclm.runtime.processes import process_space
from vectorclm.store import lease as module
from vectorclm.store.artifact import StageSpec, Store, build
from vectorclm.store.lease import Lease


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
    store, both, got, done = Store(str(tmp_path)), threading.Barrier(2), list[str](), threading.Event()
    dead(store)
    replace = store.replace

    def together(key: str, before: bytes, after: bytes) -> bool:
        if b"old" in before:  # both look before either writes
            both.wait(30)
        return replace(key, before, after)

    monkeypatch.setattr(store, "replace", together)

    def contend() -> None:
        claim = Lease(store, "leases/k.json")
        try:
            claim.acquire()
            got.append("in")
            done.wait(30)
            claim.release()
        except InUseError:
            got.append("out")
            done.set()

    threads = [threading.Thread(target=contend) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["in", "out"]


def test_what_is_given_back_in_between_is_asked_for_again_and_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, former, third = Store(str(tmp_path)), Lease(Store(str(tmp_path)), "leases/k.json"), list[Lease]()
    former.acquire()
    read = store.read

    def late(key: str) -> bytes | None:
        if not third:  # between the refusal and the look, the holder leaves and another comes
            former.release()
            found = read(key)
            third.append(Lease(Store(str(tmp_path)), "leases/k.json"))
            third[0].acquire()
            return found
        return read(key)

    write = store.write

    def refused(key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        done = write(key, data, only_if_absent=only_if_absent)
        monkeypatch.setattr(store, "read", late)
        return done

    monkeypatch.setattr(store, "write", refused)
    with pytest.raises(InUseError, match="wait for it"), store.lease("k"):
        pass
    third[0].check()
    third[0].release()


def test_of_a_claim_only_what_was_read_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, third = Store(str(tmp_path)), list[Lease]()
    dead(store)
    judge = processes.find_process

    def late(holder: Mapping[str, Any]) -> psutil.Process | None:
        alive = judge(holder)
        if not third:
            third.append(Lease(Store(str(tmp_path)), "leases/k.json"))
            third[0].acquire()  # another has judged it, too, and was faster
        return alive

    monkeypatch.setattr(module, "find_process", late)
    with pytest.raises(InUseError, match="wait for it"), store.lease("k"):
        pass
    third[0].check()
    third[0].release()


def test_a_holder_elsewhere_is_judged_by_its_renewals_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.6)
    store = Store(str(tmp_path))
    holder = Lease(store, "leases/k.json")
    own = holder._claim

    def elsewhere(behind: float) -> bytes:
        claim = json.loads(own())
        return json.dumps({**claim, "host": "elsewhere", "renewed": claim["renewed"] - behind}).encode()

    monkeypatch.setattr(holder, "_claim", lambda: elsewhere(3600))
    holder.acquire()
    with pytest.raises(InUseError, match="on elsewhere: wait for it"), store.lease("k"):
        pass
    holder.check()
    holder.release()
    store.write(holder.name, elsewhere(-3600))  # of a dead one whose clock was fast
    with store.lease("k") as taken:
        taken.check()


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
    replace = store.replace

    def flaky(key: str, before: bytes, after: bytes) -> bool:
        if not failed.is_set():
            failed.set()
            raise OSError("away")
        if done := replace(key, before, after):
            renewed.set()
        return done

    monkeypatch.setattr(store, "replace", flaky)
    with store.lease("k") as claim:
        assert failed.wait(30) and renewed.wait(30)
        claim.check()


def test_who_lost_the_claim_publishes_nothing(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), StageSpec("sample", 1, {}, {})

    def robbed(out: Path) -> dict[str, object]:
        (name,) = (tmp_path / "leases").iterdir()
        claim = {"host": "elsewhere", "pid": 7, "token": "thief", "renewed": time.time()}
        name.write_text(json.dumps(claim))
        return {}

    with pytest.raises(InUseError, match="taken over by process 7 on elsewhere"):
        build(store, plan, robbed)
    assert store.find("sample", plan.fingerprint) is None
    assert len(list((tmp_path / "leases").iterdir())) == 1  # the other's claim stays theirs
