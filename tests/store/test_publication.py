"""A writer that stood still at any write and continues touches nothing of its successor's, on a disk and on S3."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import s3fs
import torch

from tests.conftest import KILLS, PROCESSES, S3
from vectorclm.errors import InUseError, StoreError, VectorCLMError
from vectorclm.runtime.processes import find_process, process_identity
from vectorclm.shards.blocks import ShardDescriber
from vectorclm.store import durable, lease
from vectorclm.store.artifact import StageSpec, Store, build
from vectorclm.store.lease import Lease
from vectorclm.store.resumable import ResumableUpload, Slices
from vectorclm.store.uploads import EarlyUpload
from vectorclm.training.checkpoint import Checkpoints, Snapshot

PLAN = StageSpec("shards", 1, {"a": 1}, {})
STEPS = 4
CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")  # of a disk, as Python's audit names them
REQUESTS = ("put_object", "delete_object", "delete_objects")


def make(store: Store, work: Path, name: str, meanwhile: Callable[[Path], None] = lambda out: None) -> tuple[Any, bool]:
    """Build an artifact with slices, checkpoints, metrics, and a file that says who made it."""
    sending = None if store.is_local else EarlyUpload(store, PLAN, ShardDescriber)
    kept: list[Slices | Checkpoints] = []

    def produce(out: Path) -> Mapping[str, Any]:
        local = Slices(store.work_folder(PLAN, str(work)) / "slices", out)
        slices = local if sending is None else ResumableUpload(out.parent, sending)
        for number in range(2):
            slices.finish("a/train", number, lambda part: {"bytes": (part / "shard-00000.txt").write_text(name)})
        metrics = out.parent / "metrics.jsonl"
        with Checkpoints(store, PLAN, out.parent, "data") as checkpoints:
            saved = checkpoints.latest("order")
            metrics.write_text("" if saved is None else saved.metrics)
            for step in range(1 if saved is None else saved.step + 1, STEPS + 1):
                with metrics.open("a") as file:
                    file.write(json.dumps({"step": step, "by": name}) + "\n")
                checkpoints.save(
                    Snapshot(step, {"w": torch.ones(3)}, {"0.0.m": torch.ones(3)}, metrics.read_text(), "order")
                )
        meanwhile(out)
        metrics.rename(out / "metrics.jsonl")
        (out / "model.bin").write_bytes(name.encode() * 1000)
        kept.extend([local, checkpoints])
        return {"by": name}

    made = build(store, PLAN, produce, str(work), None, sending)
    for left in kept:
        left.clear()
    return made


def stop_at(number: int, counted: list[int], *, disk: bool) -> None:
    """Stop this process before its change of that number, of the disk or of S3."""

    def before_change() -> None:
        counted[0] += 1
        if counted[0] == number:
            os.kill(os.getpid(), signal.SIGSTOP)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
            before_change()

    send = s3fs.core._error_wrapper

    async def request(method: Any, **options: Any) -> Any:
        if method.__name__ in REQUESTS:
            before_change()
        return await send(method, **options)

    if disk:
        sys.addaudithook(audit)
    else:
        s3fs.core._error_wrapper = request


def hurry(monkeypatch: Any) -> None:
    """Claims that expire soon, and locks that nobody waits for."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "TAKEOVER_SECONDS", 0.1)
    monkeypatch.setattr(durable, "LOCK_SECONDS", 0.3)


def first_writer(environment: Mapping[str, str], uri: str, work: Path, number: int, results: Any) -> None:
    """In a process of its own, as on another machine: build, and stop before a change."""
    os.environ.update(environment)
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        monkeypatch.setattr(lease.socket, "gethostname", lambda: "elsewhere")
        store = Store(uri)
        store.list("")
        counted = [0]
        stop_at(number, counted, disk=store.is_local)
        try:
            _, reused = make(store, work, "first")
            told = "reused" if reused else "built"
        except VectorCLMError as error:
            told = f"{type(error).__name__}: {error}"
        results.put((told, counted[0]))


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The beginning of the addresses of stores."""
    hurry(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "disk":
        yield str(tmp_path / "stores")
        return
    server: S3 = request.getfixturevalue("s3")
    for name, value in {**server.environment(), "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield f"s3://{server.bucket}/{tmp_path.name}"


def environment() -> dict[str, str]:
    names = ("XDG_CACHE_HOME", "NO_PROXY")
    return {key: value for key, value in os.environ.items() if key in names or key.startswith("AWS_")}


def contents(store: Store, key: str) -> dict[str, bytes | None]:
    return {name: store.read(name) for name in store.files(key)}


def until_stopped(process: Any) -> bool:
    """Wait until a process stands still; False where it has ended."""
    while process.is_alive():
        with suppress(psutil.Error):
            if psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
                return True
        time.sleep(0.005)
    return False


def test_a_writer_that_stood_still_at_any_write_touches_nothing_of_its_successor(place: str, tmp_path: Path) -> None:
    results, chance = PROCESSES.Queue(), random.Random(0)

    def start(uri: str, number: int) -> Any:
        arguments = (environment(), uri, tmp_path / "work" / str(number), number, results)
        process = PROCESSES.Process(target=first_writer, args=arguments)
        process.start()
        return process

    start(f"{place}/whole", 0).join()
    told, changes = results.get(timeout=60)
    assert told == "built" and changes > 20
    ends = []
    for number in range(1, changes + 1) if KILLS > 20 else sorted(chance.sample(range(1, changes + 1), KILLS)):
        uri, work = f"{place}/{number}", tmp_path / "work" / str(number)
        process, store = start(uri, number), Store(uri)
        if until_stopped(process):
            ends.append(succeed(store, work, process, results, midway=chance.random() < 0.5))
    assert any("taken over by" in end for end in ends)


def succeed(store: Store, work: Path, process: Any, results: Any, *, midway: bool) -> str:
    """Take over from a process that stands still; what that process says in the end, once it continues."""
    kept = f"checkpoints/{PLAN.fingerprint}"
    earlier = set(store.files(kept))
    said: list[str] = []

    def go_on(*folders: Path) -> None:
        keys = (f"{PLAN.stage}/{PLAN.fingerprint}/{name}" for name in ("manifest.json", "model.bin"))
        theirs = {key: store.read(key) for key in keys if store.read(key) is not None}
        saved = {key: data for key, data in contents(store, kept).items() if key not in earlier}
        before = saved, {path: path.read_bytes() for folder in folders for path in folder.glob("*.*")}
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        said.append(results.get(timeout=60)[0])
        after = contents(store, kept)
        assert before[0].items() <= after.items()  # of the first there may be one checkpoint more
        assert before[1] == {path: path.read_bytes() for path in before[1]}
        assert theirs.items() <= {key: store.read(key) for key in theirs}.items()

    def meanwhile(out: Path) -> None:
        if midway:
            claim = store.read(f"leases/{PLAN.lease}.json")
            go_on(out.parent)
            now = store.read(f"leases/{PLAN.lease}.json")
            assert json.loads(claim or b"")["token"] == json.loads(now or b"")["token"]

    try:
        artifact, reused = make(store, work, "second", meanwhile)
    except StoreError as error:  # it stands still within a comparison: nobody else can write, and nothing is lost
        assert "a suspended process holds the lock" in str(error)
        go_on()
        assert said == ["built"]
        artifact, reused = make(store, work, "second")
        assert reused
    if not said:
        go_on()
    artifact.verify()
    by = artifact.summary["by"]
    assert artifact.read("model.bin") == by.encode() * 1000 and by == ("first" if reused else "second")
    assert artifact.read("a/train-00000.txt") in (b"first", b"second")
    lines = [json.loads(line)["step"] for line in artifact.read("metrics.jsonl").splitlines()]
    assert lines == list(range(1, STEPS + 1))
    if by == "second":
        # Where it had not begun its work, it finds its successor's.
        assert said == ["reused"] or ("\n" not in said[0] and said[0].startswith("InUseError: leases/")), said
    return said[0]


def test_a_take_over_is_conditional_on_what_was_read(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, name = Store(place), "leases/k.json"
    store.write(name, json.dumps({"host": "elsewhere", "pid": 1, "token": "dead", "renewed": 0}).encode())
    other, replace, late = Lease(Store(place), name), store.replace, list[bytes]()

    def stood_still(key: str, before: bytes, after: bytes) -> bool:
        if not late:
            other.acquire()  # between the look and the write
            late.append(before)
        return replace(key, before, after)

    monkeypatch.setattr(store, "replace", stood_still)
    monkeypatch.setattr(store, "withdraw", lambda key, before: pytest.fail("what was not taken is not given back"))
    with pytest.raises(InUseError, match=rf"held by process {os.getpid()}"), store.lease("k"):
        pass
    other.check()
    assert not store.replace(name, late[0], b"theirs") and not Store(place).withdraw(name, late[0])
    other.check()
    other.release()
    assert not store.read(name)
    with Store(place).lease("k") as taken:  # at once
        taken.check()


def test_a_store_that_ignores_conditions_on_replacing_is_told(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(place)
    store.check_writable()
    assert not caplog.records
    if store.is_s3:
        call = store.fs.call_s3

        def careless(method: str, **options: Any) -> Any:
            options.pop("IfMatch", None)
            return call(method, **options)

        monkeypatch.setattr(store.fs, "call_s3", careless)
        store.check_writable()
        assert "does not honour If-Match: finished artifacts are safe" in caplog.text


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    store, ready = Store(str(tmp_path)), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ready[0], 1)
        os._exit(0)
    known = process_identity(psutil.Process(child))
    claim = {"host": os.uname().nodename, **known, "token": "zombie", "renewed": time.time()}
    store.write("leases/k.json", json.dumps(claim).encode())
    assert find_process(known) is not None
    with pytest.raises(InUseError, match=f"held by process {child}"), store.lease("k"):
        pass
    os.write(ready[1], b"x")
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    try:
        with store.lease("k") as taken:
            taken.check()
    finally:
        os.waitpid(child, 0)
