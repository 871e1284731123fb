"""An artifact is there whole or not at all; one writer at a time; a wrong byte is named."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_model import CONFIG
from vectorclm.artifact import MANIFEST, Plan, Store, build
from vectorclm.checkpoint import KEEP, Checkpoints, restore, snapshot
from vectorclm.errors import CorruptArtifactError, InUseError, StoreError
from vectorclm.model import CausalLM
from vectorclm.muon import OptimizerConfig, build_optimizers

PLAN = Plan("sample", 1, {"a": 1}, {})


def produce(out: Path) -> dict[str, Any]:
    (out / "part").mkdir()
    (out / "part" / "x.txt").write_text("hello")
    return {"files": 1}


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
    other = Plan("sample", 1, {"a": 2}, {})
    lease = {"host": os.uname().nodename, "pid": ended.pid, "token": "x", "renewed": time.time()}
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
    with pytest.raises(StoreError, match=r"is not writable .* choose another with --store or VECTORCLM_STORE"):
        Store(str(tmp_path / "file" / "store")).check_writable()
    Store(str(tmp_path / "store")).check_writable()


def test_fingerprints_follow_content_not_order() -> None:
    assert Plan("s", 1, {"a": 1, "b": 2}, {}).fingerprint == Plan("s", 1, {"b": 2, "a": 1}, {}).fingerprint
    others = [Plan("t", 1, {"a": 1}, {}), Plan("s", 2, {"a": 1}, {}), Plan("s", 1, {"a": 1}, {"x": "y"})]
    assert len({plan.fingerprint for plan in [Plan("s", 1, {"a": 1}, {}), *others]}) == 4


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
    with Checkpoints(store, PLAN, tmp_path / "work") as checkpoints:
        for done in range(1, 4):
            step(model, optimizers)
            checkpoints.save(snapshot(done, model, optimizers, f"{done}\n"))
    folder = tmp_path / "checkpoints" / PLAN.fingerprint
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"][-KEEP:]
    weights = folder / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    again, fresh = make()
    with Checkpoints(store, PLAN, tmp_path / "work") as checkpoints:
        saved = checkpoints.latest()
        assert saved is not None and saved.step == 2 and saved.metrics == "2\n"
        restore(saved, again, fresh)
        step(again, fresh)
        assert checkpoints.latest() is not None
        checkpoints.clear()
        assert checkpoints.latest() is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
