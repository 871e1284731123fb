"""An artifact is there whole or not at all; one writer at a time; a wrong byte is named."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_model import CONFIG
from vectorclm.errors import CorruptArtifactError, DataError, InUseError, StoreError
from vectorclm.model import CausalLM
from vectorclm.runtime.processes import process_space
from vectorclm.store.artifact import MANIFEST, StageSpec, Store, build, rebuild
from vectorclm.training.checkpoint import KEEP, Checkpoints, Snapshot, restore, snapshot
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

PLAN = StageSpec("sample", 1, {"a": 1}, {})


def produce(out: Path) -> dict[str, Any]:
    (out / "part").mkdir()
    (out / "part" / "x.txt").write_text("hello")
    return {"files": 1}


def steps(names: Iterable[str]) -> list[str]:
    """The names of checkpoints, without what tells attempts apart."""
    return sorted(name.rpartition("-")[0] for name in names)


def test_built_once_then_reused_with_a_manifest_that_tells_all(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    artifact, reused = build(store, PLAN, produce)
    assert not reused and artifact.summary == {"files": 1}
    manifest = json.loads((Path(artifact.uri) / MANIFEST).read_text())
    assert manifest["files"]["part/x.txt"]["bytes"] == 5 and manifest["environment"]["torch"]
    again, reused = build(store, PLAN, lambda out: pytest.fail("built twice"))
    assert reused and again.fingerprint == artifact.fingerprint


def test_a_producer_that_raises_leaves_nothing_to_find(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def broken(out: Path) -> dict[str, Any]:
        produce(out)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        build(store, PLAN, broken)
    assert store.find(PLAN.stage, PLAN.fingerprint) is None
    assert not build(store, PLAN, produce)[1]


def test_a_directory_without_a_manifest_is_not_found(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    artifact, _ = build(store, PLAN, produce)
    (Path(artifact.uri) / MANIFEST).unlink()
    assert store.find(PLAN.stage, PLAN.fingerprint) is None


def test_a_changed_byte_and_a_lost_file_are_named(tmp_path: Path) -> None:
    artifact, _ = build(Store(str(tmp_path)), PLAN, produce)
    file = Path(artifact.uri) / "part" / "x.txt"
    file.write_text("hullo")
    with pytest.raises(CorruptArtifactError, match=r"x\.txt: SHA-256 is"):
        artifact.local()
    file.unlink()
    with pytest.raises(CorruptArtifactError, match=r"x\.txt is missing"):
        artifact.local()


def test_a_file_that_the_manifest_does_not_list_is_named(tmp_path: Path) -> None:
    artifact, _ = build(Store(str(tmp_path)), PLAN, produce)
    folder = Path(artifact.uri)
    (folder / "part" / ".x.txt.0a1b2c3d").write_text("of a writer at work")
    assert artifact.local() == folder
    (folder / "part" / "y.txt").write_text("foreign")
    with pytest.raises(CorruptArtifactError, match=r"part/y\.txt is not in the artifact's manifest"):
        artifact.local()
    assert artifact.local("part/x*") == folder
    (folder / "part" / "y.txt").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "z.txt").write_text("foreign")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifactError, match=r"link is not in the artifact"):
        artifact.verify()


def test_a_second_writer_is_told_and_a_dead_ones_lease_is_taken_over(tmp_path: Path) -> None:
    store, inside, leave = Store(str(tmp_path)), threading.Event(), threading.Event()

    def slow(out: Path) -> dict[str, Any]:
        inside.set()
        assert leave.wait(30)
        return produce(out)

    first = threading.Thread(target=build, args=(store, PLAN, slow))
    first.start()
    assert inside.wait(30)
    with pytest.raises(InUseError, match=f"process {os.getpid()}"):
        build(store, PLAN, produce)
    leave.set()
    first.join()
    assert build(store, PLAN, produce)[1]

    ended = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
    ended.start()
    ended.join()
    other = StageSpec("sample", 1, {"a": 2}, {})
    lease = {
        "host": os.uname().nodename,
        "pid": ended.pid,
        "pids": process_space(),
        "token": "x",
        "renewed": time.time(),
    }
    store.write(f"leases/sample-{other.fingerprint[:16]}.json", json.dumps(lease).encode())
    assert not build(store, other, produce)[1]


def test_of_many_conditional_writers_one_wins(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    won: list[bool] = []
    writers = [
        threading.Thread(target=lambda i=i: won.append(store.write("key", b"%d" % i, only_if_absent=True)))
        for i in range(16)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sum(won) == 1


def test_a_store_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"is not writable .* name the right store with --store or VECTORCLM_STORE"):
        Store(str(tmp_path / "file" / "store")).check_writable()
    Store(str(tmp_path / "store")).check_writable()


def test_fingerprints_follow_content_not_order() -> None:
    assert StageSpec("s", 1, {"a": 1, "b": 2}, {}).fingerprint == StageSpec("s", 1, {"b": 2, "a": 1}, {}).fingerprint
    others = [StageSpec("t", 1, {"a": 1}, {}), StageSpec("s", 2, {"a": 1}, {}), StageSpec("s", 1, {"a": 1}, {"x": "y"})]
    assert len({plan.fingerprint for plan in [StageSpec("s", 1, {"a": 1}, {}), *others]}) == 4


def test_a_remote_store_works_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store(f"memory://{tmp_path.name}")
    artifact, reused = build(store, PLAN, produce)
    assert not reused and not store.is_local
    assert (artifact.local() / "part" / "x.txt").read_text() == "hello"
    assert build(store, PLAN, produce)[1]


def test_a_checkpoint_restores_model_and_optimizers_and_a_corrupt_one_is_passed_over(tmp_path: Path) -> None:
    def make() -> tuple[CausalLM, Any]:
        torch.manual_seed(0)
        model = CausalLM(CONFIG)
        return model, build_optimizers(model, OptimizerConfig(learning_rate=0.01, adamw_learning_rate=0.01))

    def step(model: CausalLM, optimizers: Any) -> None:
        ids = torch.arange(20)[None]
        (model.loss(ids, ids) / 19).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    store = Store(str(tmp_path))
    model, optimizers = make()
    with Checkpoints(store, PLAN, tmp_path / "work", "data") as checkpoints:
        for done in range(1, 4):
            step(model, optimizers)
            checkpoints.save(snapshot(done, model, optimizers, f"{done}\n", "order"))
    folder = tmp_path / "checkpoints" / PLAN.fingerprint
    assert steps(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"][-KEEP:]
    (weights,) = folder.glob("step-00000003-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    again, fresh = make()
    with Checkpoints(store, PLAN, tmp_path / "work", "data") as checkpoints:
        saved = checkpoints.latest("order")
        assert saved is not None and saved.step == 2 and saved.metrics == "2\n"
        restore(saved, again, fresh)
        step(again, fresh)
        assert checkpoints.latest("order") is not None
        with pytest.raises(DataError, match=r"step-00000002-\w{8} was trained on the training order order…"):
            checkpoints.latest("another")
    with (
        Checkpoints(store, PLAN, tmp_path / "work", "others") as checkpoints,
        pytest.raises(DataError, match=r"data set data…, which is now others…: restore the old data set, or delete"),
    ):
        checkpoints.latest("order")
    assert steps(path.name for path in folder.iterdir()) == ["step-00000002"]  # nothing is lost by the refusal
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_training_that_was_taken_over_ends_at_its_next_checkpoint(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    saved = Snapshot(1, {"w": torch.ones(3)}, {"0.0.m": torch.ones(3)}, "1\n", "order")
    with (
        store.lease(PLAN.lease) as lease,
        pytest.raises(InUseError, match="was taken over by process 7 on elsewhere: this process was suspended"),
        Checkpoints(store, PLAN, tmp_path / "work", "data") as checkpoints,
    ):
        checkpoints.save(saved)
        checkpoints.wait()
        other = {**lease.holder(), "host": "elsewhere", "pid": 7, "token": "theirs"}
        store.write(lease.name, json.dumps(other).encode())
        checkpoints.save(replace(saved, step=2))
    saved_steps = steps(path.name for path in (tmp_path / "checkpoints" / PLAN.fingerprint).iterdir())
    assert saved_steps == ["step-00000001"]
    assert lease.holder() == other  # theirs it stays


def test_readers_of_one_machine_read_a_remote_checkpoint_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, work = Store(f"memory://{tmp_path.name}"), tmp_path / "work"
    get_file, turn = store.fs.get_file, threading.Lock()

    def in_turn(*args: Any, **kwargs: Any) -> None:
        """All readers of a file in fsspec's memory have one place in it."""
        with turn:
            get_file(*args, **kwargs)

    monkeypatch.setattr(store.fs, "get_file", in_turn)
    weights = {"w": torch.arange(50_000.0)}
    with Checkpoints(store, PLAN, work, "data") as checkpoints:
        checkpoints.save(Snapshot(7, weights, {"0.0.m": torch.ones(3)}, "7\n", "order"))
    (name,) = store.list(checkpoints.root)
    found = store.find(checkpoints.root, name)
    assert found is not None
    cached = found.local("model.safetensors") / "model.safetensors"  # as measuring checkpoints keeps it
    with ThreadPoolExecutor(8) as ranks:
        for saved in ranks.map(lambda _: checkpoints.latest("order"), range(24)):
            assert saved is not None and torch.equal(saved.model["w"], weights["w"]) and saved.metrics == "7\n"
    assert cached.is_file() and not list(work.iterdir())


@pytest.mark.parametrize("name", ["../../out.txt", "/tmp/out.txt", "a/../../out.txt", "..\\out.txt"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path))
    manifest = {"files": {name: {"bytes": 1, "sha256": "0"}}, "summary": {}}
    store.write(f"sample/x/{MANIFEST}", json.dumps(manifest).encode())
    with pytest.raises(CorruptArtifactError, match="not below it"):
        store.find("sample", "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": ["x.txt"]}',
        b'{"files": {"x.txt": "0"}}',
        b'{"files": {"x.txt": {"bytes": 1}}}',
        b'{"files": {"x.txt": {"bytes": 1, "sha256": 0}}}',
    ],
)
def test_a_broken_manifest_is_named(tmp_path: Path, data: bytes) -> None:
    store = Store(str(tmp_path))
    store.write(f"sample/x/{MANIFEST}", data)
    with pytest.raises(CorruptArtifactError, match=r"sample/x/manifest\.json is not a valid manifest"):
        store.find("sample", "x")


def test_credentials_and_unknown_protocols_are_refused_in_an_address() -> None:
    with pytest.raises(StoreError, match="credentials into the environment") as refused:
        Store("s3://KEY:SECRET@bucket/x")
    assert "SECRET" not in str(refused.value)
    with pytest.raises(StoreError, match="nothing://x cannot be opened"):
        Store("nothing://x")
    assert Store("file:///tmp/x").is_local and not Store("s3://bucket/x").is_local


@pytest.mark.parametrize(
    "address",
    [
        "http://10.0.0.1/store",
        "data:,x",
        "ftp://host/store",
        "github://owner:repo@/",
        "simplecache::s3://bucket/x",
        "reference://::file:///tmp/references.json",
        "zip://::file:///tmp/a.zip",
        "zip://::s3://KEY:SECRET@bucket/a.zip",
    ],
)
def test_only_what_keeps_a_store_is_opened(address: str) -> None:
    with pytest.raises(StoreError, match=r"one of file://, .*s3://|credentials") as refused:
        Store(address)
    assert "SECRET" not in str(refused.value)


def test_a_remote_artifact_is_copied_whole_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    artifact, _ = build(Store(f"memory://{tmp_path.name}"), PLAN, produce, str(tmp_path / "work"))
    folder = artifact.local()
    (folder / "left-by-another.arrow").write_text("x")
    (folder / "part" / "x.txt").write_text("changed")
    assert sorted(path.name for path in artifact.local().rglob("*") if path.is_file()) == sorted(
        Path(name).name for name in artifact.manifest["files"]
    )
    assert (folder / "part" / "x.txt").read_text() != "changed"
    artifact.store.fs.rm(artifact.store.path(f"{artifact.stage}/{artifact.fingerprint}/part/x.txt"))
    (folder / "part" / "x.txt").unlink()
    for read in (artifact.local, lambda: artifact.read("part/x.txt")):
        with pytest.raises(CorruptArtifactError, match=r"x\.txt is missing"):
            read()


def test_what_is_made_again_is_compared_and_the_artifact_stays(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    artifact, _ = build(store, PLAN, produce)
    assert rebuild(store, artifact, PLAN, produce, None) == []

    def other(out: Path) -> dict[str, Any]:
        summary = produce(out)
        (out / "part" / "x.txt").write_text("otherwise")
        (out / "new.txt").write_text("new")
        return dict(summary)

    assert rebuild(store, artifact, PLAN, other, None) == ["new.txt", "part/x.txt"]
    artifact.verify()
    assert not list((tmp_path / "work").iterdir()) and not list((tmp_path / "leases").iterdir())


class Careless(BaseHTTPRequestHandler):
    """An S3 store that says yes to every write, `If-None-Match` or not."""

    protocol_version = "HTTP/1.1"

    def _answer(self, body: bytes = b"") -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/xml")
        self.send_header("ETag", '"0"')
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        item = b"<Contents><Key>store/x</Key><Size>5</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        self._answer(b"<ListBucketResult><KeyCount>1</KeyCount>" + item + b"</ListBucketResult>")

    def do_POST(self) -> None:
        self._answer(b"<DeleteResult></DeleteResult>")

    def log_message(self, *_: object) -> None:
        pass


def test_a_store_that_lets_every_writer_win_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        with pytest.raises(StoreError, match="overwrites an object despite If-None-Match"):
            Store("s3://careless/store").check_writable()
    finally:
        server.shutdown()
        server.server_close()
