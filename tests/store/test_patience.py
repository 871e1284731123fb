"""The work of a stage waits for an object store that is away for minutes, and loses nothing."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs

from tests.conftest import S3
from tests.services.upload_proxy import Fault, Proxy
from tests.training.test_checkpoint import write_experiment
from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.errors import StoreError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store import patience
from vectorclm.store.artifact import Store
from vectorclm.store.patience import PatientStore
from vectorclm.training import checkpoint

RUNTIME = Runtime(device="cpu", threads=1, checkpoint_interval=10)
LOST = Fault("reset", at=-1)  # before anything was asked
STEPS = 60
AWAY, BACK = 10, 40  # steps of the checkpoint with which the outage begins, and of the training when it ends


@pytest.fixture
def network(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What lies between the client and the server."""
    where = urlsplit(s3.endpoint)
    proxy = Proxy(str(where.hostname), int(where.port or 0))
    with monkeypatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


REQUESTS: dict[str, tuple[Callable[[Store, Path], object], object]] = {
    "write": (lambda store, file: store.write("new", b"1", only_if_absent=True), True),
    "read": (lambda store, file: store.read("there"), b"there"),
    "replace": (lambda store, file: store.replace("there", b"there", b"2"), True),
    "withdraw": (lambda store, file: store.withdraw("there", b"there"), True),
    "list": (lambda store, file: store.list("folder"), ["b"]),
    "files": (lambda store, file: [*store.files("folder")], ["folder/b"]),
    "sha256": (lambda store, file: store.sha256("there"), hashlib.sha256(b"there").hexdigest()),
    "put": (lambda store, file: store.put(file, "folder", "c", hashlib.sha256(b"file").hexdigest()), "c"),
    "get": (
        lambda store, file: store.get("there", file, hashlib.sha256(b"there").hexdigest()),
        hashlib.sha256(b"there").hexdigest(),
    ),
    "delete": (lambda store, file: store.delete("there"), None),
    "remove": (lambda store, file: store.remove("folder"), None),
}


def test_each_request_is_repeated_until_the_server_answers(
    network: Proxy, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.0)
    file = tmp_path / "file"
    for name, (request, expected) in REQUESTS.items():
        file.write_bytes(b"file")
        store = PatientStore(f"s3://{s3.bucket}/patience/{name}")
        store.write("there", b"there")
        store.write("folder/b", b"")
        noticed = [False]

        def fault(method: str, path: str, store: Store = store, noticed: list[bool] = noticed) -> Fault | None:
            noticed[0] |= store.is_away
            return None if noticed[0] else LOST

        network.watch(fault)
        caplog.clear()
        assert request(store, file) == expected, name
        assert network.faults and not store.is_away, name
        (away, back) = [line.message for line in caplog.records if line.name == patience.__name__]
        assert "tried again for 15 minutes" in away and f"store {store.uri} answers again" in back
        network.watch()


def test_what_no_waiting_mends_fails_at_once(
    network: Proxy, s3: S3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PatientStore(f"s3://{s3.bucket}/patience")
    monkeypatch.setattr(patience, "OUTAGE_SECONDS", 0.0)  # an outage that lasts for longer
    network.watch(lambda *_: LOST)
    with pytest.raises(StoreError, match="cannot read s3:"):
        store.read("there")
    monkeypatch.undo()
    for name, value in {**s3.environment(), "AWS_SECRET_ACCESS_KEY": "wrong"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    caplog.clear()
    with pytest.raises(StoreError, match="set AWS_SECRET_ACCESS_KEY"):
        PatientStore(f"s3://{s3.bucket}/patience").read("there")
    assert not caplog.records


def test_a_training_goes_on_while_the_store_is_away_and_its_checkpoints_catch_up(
    network: Proxy, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = _experiment(tmp_path)
    local, remote = Store(str(tmp_path / "store")), f"s3://{s3.bucket}/patience/training"
    for stage in ("sample", "tokenizer", "shards", "pretrain"):
        run_stage(stage, experiment, local, RUNTIME, None)
    sent = s3fs.S3FileSystem(endpoint_url=s3.endpoint, skip_instance_cache=True)
    for stage in ("sample", "tokenizer", "shards"):
        sent.put(f"{local.uri}/{stage}/", f"{remote}/{stage}/", recursive=True)
    work = tmp_path / "work"
    seen, kept = list[int](), list[int]()  # steps of the training during the outage, and of checkpoints sent

    def fault(method: str, path: str) -> Fault | None:
        if method == "PUT" and (step := re.search(r"step-(\d+)-\w+/manifest.json", path)):
            kept.append(int(step[1]))
        if not seen and f"step-{AWAY:08d}" in path:
            seen.append(AWAY)
        if not seen or seen[-1] >= BACK:
            return None
        lines = [json.loads(line) for file in work.rglob("*/metrics.jsonl") for line in file.read_text().splitlines()]
        seen.append(max((line["step"] for line in lines), default=0))
        return LOST

    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(checkpoint, "LOOK_SECONDS", 0.01)
    network.watch(fault)
    runtime = RUNTIME.model_copy(update={"work_dir": str(work)})
    with caplog.at_level(logging.WARNING):
        found, _ = run_stage("pretrain", experiment, PatientStore(remote), runtime, None)
    assert seen[-1] >= BACK, "the training went on without the store"
    assert kept[0] == AWAY and AWAY + RUNTIME.checkpoint_interval not in kept and kept[-1] > AWAY
    assert sum("tried again" in line.message for line in caplog.records) == 1
    before = local.find("pretrain", found.fingerprint)
    assert before is not None
    hashes = [artifact.manifest["files"]["model.safetensors"]["sha256"] for artifact in (before, found)]
    assert hashes[0] == hashes[1]
    found.verify()
    assert not Store(remote).files("checkpoints")


def _experiment(folder: Path) -> ExperimentConfig:
    path = write_experiment(folder)
    values = json.loads(path.read_text())
    values["pretrain"] |= {"phases": [{"tokens": STEPS * 8 * 64}], "validation_interval": 5}  # also during the outage
    path.write_text(json.dumps(values))
    experiment = pin(load_experiment(str(path))[0], path, None, resolve=False)[0]
    assert plans(experiment)["pretrain"]
    return experiment
