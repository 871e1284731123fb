"""A store on a real S3 server: a wrong setting is told, what goes wrong is recovered, and nothing is half there."""

import hashlib
import json
import os
import random
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import s3fs
import torch

from tests.conftest import KILLS, PROCESSES, S3, files_below
from tests.services.upload_proxy import Fault, Proxy
from vectorclm.__main__ import main
from vectorclm.errors import CorruptArtifactError, StoreError
from vectorclm.store import gc
from vectorclm.store import s3 as client
from vectorclm.store.artifact import MANIFEST, Artifact, StageSpec, Store, build
from vectorclm.store.gc import find_garbage, remove_garbage
from vectorclm.store.storage import RACERS, sha256_of
from vectorclm.training.checkpoint import Checkpoints, Snapshot

PLAN = StageSpec("sample", 1, {"a": 1}, {})
DAY = timedelta(days=1)
PUBLISHERS = 16


def produce(out: Path) -> dict[str, Any]:
    """Four files of 100 kB, the same each time."""
    noise = random.Random(0)
    for number in range(4):
        (out / f"{number}.bin").write_bytes(noise.randbytes(100_000))
    return {}


@pytest.fixture(autouse=True)
def settings(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's variables, a cache of the test's own, and no patience with a server that is silent."""
    for name, value in {**s3.environment(), "XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(client, "READ_SECONDS", 0.5)


@pytest.fixture
def store(s3: S3, tmp_path: Path) -> Store:
    """A store of the test's own."""
    made = Store(f"s3://{s3.bucket}/{tmp_path.name}")
    made.list("")  # connects now, while the variables name the server itself
    return made


@pytest.fixture(scope="module")
def network(s3: S3) -> Proxy:
    """What lies between the client and the server where `through` is used."""
    where = urlsplit(s3.endpoint)
    return Proxy(str(where.hostname), int(where.port or 0))


@pytest.fixture
def through(network: Proxy, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same store, by way of the network."""
    network.watch()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{network.port}")
    s3fs.S3FileSystem.clear_instance_cache()
    return Store(store.uri)


WRONG = {
    "refused": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "nothing answers there: set AWS_ENDPOINT_URL"),
    "name": ({"AWS_ENDPOINT_URL": "http://no-such-host.invalid"}, "nothing answers there: set AWS_ENDPOINT_URL"),
    "address": ({"AWS_ENDPOINT_URL": "localhost:7480"}, "AWS_ENDPOINT_URL is not an address such as https://"),
    "key": ({"AWS_ACCESS_KEY_ID": "nobody"}, "does not know this access key: set AWS_ACCESS_KEY_ID"),
    "secret": ({"AWS_SECRET_ACCESS_KEY": "a-wrong-secret"}, "set AWS_SECRET_ACCESS_KEY"),
    "half": (
        {"AWS_SECRET_ACCESS_KEY": None},
        "one half of the credentials is missing: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    "profile": ({"AWS_PROFILE": "nobody"}, "AWS_PROFILE names a profile that is not in AWS_CONFIG_FILE"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_named_before_any_work(
    case: str, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, expected = WRONG[case]
    for name, value in changed.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    assert expected in told(store.uri, capsys)


def test_a_store_is_created_only_where_a_server_answers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that closes each connection is asked a few times, not as often as one that fails during the work."""
    asked: list[socket.socket] = []

    def close(server: socket.socket) -> None:
        with suppress(OSError):  # until the test closes the server
            while True:
                asked.append(server.accept()[0])
                asked[-1].close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=close, args=(server,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(StoreError):
            Store(store.uri).create()
        assert 1 <= len(asked) <= 6 * client.QUICK  # three requests, whose attempts may connect twice
        server.shutdown(socket.SHUT_RDWR)


def told(uri: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says of a store; it has no secret in it."""
    with pytest.raises(StoreError) as refused:
        Store(uri).check_writable()
    assert main(["store", "ls", "--store", uri]) == 2
    line = capsys.readouterr().err
    assert line == f"error: {refused.value}\n" and "secret-of-the-tests" not in line and "a-wrong-secret" not in line
    return line


def test_tls_where_there_is_none_a_wrong_bucket_and_a_wrong_clock_are_named(
    s3: S3, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "s3://no-such-bucket/store"
    assert "there is no such bucket: `vectorclm store create` creates it" in told(uri, capsys)
    assert main(["store", "create", "--store", "s3://made-by-hand/store"]) == 0
    Store("s3://made-by-hand/store").check_writable()
    with monkeypatch.context() as late:
        late.setattr("botocore.auth.get_current_datetime", lambda: datetime.now(UTC).replace(tzinfo=None) - DAY)
        assert "clock differs too much from the server's" in told(store.uri, capsys)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint.replace("http:", "https:"))
    s3fs.S3FileSystem.clear_instance_cache()
    assert "AWS_ENDPOINT_URL says https:// where the server speaks http://" in told(store.uri, capsys)


def test_keys_and_the_style_of_addresses_may_come_from_files(
    s3: S3, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(
        f"[lab]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    (tmp_path / "config").write_text(
        f"[profile lab]\nendpoint_url = {s3.endpoint}\nregion = us-east-1\ns3 =\n  addressing_style = path\n"
    )
    for name in s3.environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    s3fs.S3FileSystem.clear_instance_cache()
    Store(store.uri).check_writable()
    style = (tmp_path / "config").read_text().replace("= path", "= virtual").replace("127.0.0.1", "store.invalid")
    (tmp_path / "config").write_text(style)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=rf"http://{s3.bucket}\.store\.invalid"):
        Store(store.uri).check_writable()


FAULTS = {
    "latency": Fault("wait", seconds=0.2),
    "reset": Fault("reset", at=-1),
    "reset in the body": Fault("reset", at=50_000),
    "reset in the upload": Fault("reset", up=True, at=50_000),
    "500": Fault("status", status=500, code="InternalError"),
    "503": Fault("status", status=503, code="SlowDown"),
    "truncation": Fault("end", at=50_000),
    "short, consistently": Fault("short", at=40_000),
    "silence": Fault("stall", at=50_000, seconds=10),
    "silence in the upload": Fault("stall", up=True, at=50_000, seconds=10),
    "flipped bit": Fault("flip", at=50_000),
    "flipped bit in the upload": Fault("flip", up=True, at=50_000),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_a_retry_can_recover_is_recovered(kind: str, through: Store, network: Proxy, tmp_path: Path) -> None:
    network.watch(lambda method, path: FAULTS[kind] if network.requests % 6 == 2 else None)
    artifact, _ = build(through, PLAN, produce, str(tmp_path / "work"))
    folder = artifact.local()
    assert network.faults >= 3
    (tmp_path / "again").mkdir()
    produce(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert (folder / path.name).read_bytes() == artifact.read(path.name) == path.read_bytes()
    network.watch()
    artifact.verify()


def test_of_a_hundred_requests_one_may_fail_in_any_way(through: Store, network: Proxy, tmp_path: Path) -> None:
    chance, kinds, seen = random.Random(1), list(FAULTS.values()), set[Fault]()

    def rule(method: str, path: str) -> Fault | None:
        if chance.random() > 0.05:  # five, so that a short test sees many
            return None
        seen.add(fault := chance.choice(kinds))
        return fault

    def large(out: Path) -> dict[str, Any]:
        for number in range(20):
            (out / f"{number}.bin").write_bytes(random.Random(number).randbytes(100_000))
        (out / "in parts.bin").write_bytes(random.Random(99).randbytes(2 * client.PART_BYTES + 1))
        return {}

    network.watch(rule)
    artifact, _ = build(through, PLAN, large, str(tmp_path / "work"))
    folder = artifact.local()
    assert network.faults >= 4 and len(seen) >= 3
    for name, file in artifact.manifest["files"].items():
        assert sha256_of(folder / name) == file["sha256"] == hashlib.sha256(artifact.read(name)).hexdigest()


def test_what_no_retry_can_recover_is_told_and_leaves_no_manifest(
    through: Store, store: Store, network: Proxy, tmp_path: Path
) -> None:
    def rotten(method: str, path: str) -> Fault | None:
        return Fault("flip", at=50_000) if method == "GET" and path.endswith(".bin") else None

    def expired(method: str, path: str) -> Fault | None:
        return Fault("status", status=400, code="ExpiredToken") if network.requests > 8 else None

    def denied(method: str, path: str) -> Fault | None:
        write = method == "PUT" and path.endswith(".bin")
        return Fault("status", status=403, code="AccessDenied") if write else None

    for rule, message in (
        (rotten, "arrived damaged several times"),
        (expired, "credentials have expired: renew AWS_SESSION_TOKEN"),
        (denied, "allow s3:GetObject, PutObject"),
    ):
        network.watch(rule)
        with pytest.raises(StoreError, match=message):
            build(through, PLAN, produce, str(tmp_path / "work"))
        assert network.faults and store.find(PLAN.stage, PLAN.fingerprint) is None
        store.remove("leases")  # that could not be given back, as the credentials had expired
    network.watch()
    assert not build(through, PLAN, produce, str(tmp_path / "work"))[1]


def test_a_lost_answer_to_a_conditional_write_is_no_defeat(through: Store, network: Proxy) -> None:
    network.watch(lambda method, path: Fault("reset") if network.requests == 1 else None)
    assert through.write("key", b"mine", only_if_absent=True) and network.faults == 1
    network.watch()
    assert not through.write("key", b"theirs", only_if_absent=True)


def test_a_full_disk_is_told(store: Store, tmp_path: Path) -> None:
    artifact, _ = build(store, PLAN, produce, str(tmp_path / "work"))
    with files_below(50_000):
        with pytest.raises(StoreError, match="no space left while writing"):
            build(Store(str(tmp_path / "store")), PLAN, produce)
        with pytest.raises(StoreError, match="no space left while writing"):
            artifact.local()
    assert Store(str(tmp_path / "store")).find(PLAN.stage, PLAN.fingerprint) is None
    assert len(list(artifact.local().iterdir())) == 4


def publish(environment: Mapping[str, str], uri: str, number: int, together: Any, results: Any) -> None:
    """In a process of its own: publish an artifact that says who made it, and tell whose is found."""
    os.environ.update(environment)
    store, folder = Store(uri), Path(environment["XDG_CACHE_HOME"]) / f"publisher-{number}"
    folder.mkdir(parents=True)
    produce(folder)
    together.wait(300)
    found = store.publish(PLAN, folder, {"publisher": number})
    results.put((number, found.summary["publisher"], found.manifest))


def environment_of(s3: S3, tmp_path: Path) -> dict[str, str]:
    return {**s3.environment(), "XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}


def test_of_racing_publishers_one_wins_and_all_find_its_artifact(s3: S3, store: Store, tmp_path: Path) -> None:
    together, results = PROCESSES.Barrier(PUBLISHERS), PROCESSES.Queue()
    arguments = (environment_of(s3, tmp_path), store.uri)
    racers = [
        PROCESSES.Process(target=publish, args=(*arguments, number, together, results)) for number in range(PUBLISHERS)
    ]
    for racer in racers:
        racer.start()
    told = [results.get(timeout=300) for _ in racers]
    for racer in racers:
        racer.join()
    assert {number for number, _, _ in told} == set(range(PUBLISHERS)) and PUBLISHERS >= 2 * RACERS
    assert len({winner for _, winner, _ in told}) == 1
    assert all(manifest == told[0][2] for _, _, manifest in told)
    Artifact(store, PLAN.stage, PLAN.fingerprint, told[0][2]).verify()


def make(environment: Mapping[str, str], uri: str, work: str) -> None:
    """In a process of its own, to be killed: build the artifact."""
    os.environ.update(environment)
    build(Store(uri), PLAN, produce, work)


def test_kills_at_any_request_change_no_byte_and_leave_nothing_that_gc_does_not_find(
    s3: S3, store: Store, network: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "YOUNG_SECONDS", 0)
    environment = {**environment_of(s3, tmp_path), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{network.port}"}
    process = PROCESSES.Process(target=make, args=(environment, f"{store.uri}/whole", str(tmp_path / "work")))
    network.watch()
    process.start()
    process.join()
    assert process.exitcode == 0
    requests, chance = network.requests, random.Random(0)
    whole = Store(f"{store.uri}/whole").find(PLAN.stage, PLAN.fingerprint)
    assert whole is not None and requests > 10

    for number, last in enumerate(chance.choices(range(1, requests + 1), k=KILLS)):
        other = Store(f"{store.uri}/killed-{number}")
        killed = PROCESSES.Process(target=make, args=(environment, other.uri, str(tmp_path / f"work-{number}")))

        def kill(method: str, path: str, last: int = last, victim: Any = killed) -> Fault | None:
            if network.requests == last:
                victim.kill()  # this request may or may not be done
            return None

        network.watch(kill)
        killed.start()
        killed.join()
        assert killed.exitcode == -9
        artifact, _ = build(other, PLAN, produce, str(tmp_path / f"work-{number}"))
        assert artifact.manifest["files"] == whole.manifest["files"]
        artifact.verify()
        assert all(remove_garbage(other, item) for item in find_garbage(other, 0))
        assert {key for key, file in other.files("").items() if file.bytes} == {  # a lease given back is empty
            f"sample/{PLAN.fingerprint}/{name}" for name in (*whole.manifest["files"], MANIFEST)
        }


def test_a_training_resumes_from_the_newest_checkpoint_that_verifies(store: Store, tmp_path: Path) -> None:
    with Checkpoints(store, PLAN, tmp_path / "work", "data") as checkpoints:
        for step in (10, 20, 30):
            weights = {"w": torch.full((1000,), float(step))}
            checkpoints.save(Snapshot(step, weights, {"0.0.m": torch.zeros(3)}, f"{step}\n", "order"))
    root = f"checkpoints/{PLAN.fingerprint}"
    assert [name[:13] for name in store.list(root)] == ["step-00000020", "step-00000030"]
    key = f"{root}/{store.list(root)[-1]}/model.safetensors"
    data = bytearray(store.read(key) or b"")
    data[-5] ^= 1
    store.write(key, bytes(data))
    store.write(f"{root}/step-00000040/model.safetensors", b"half")  # of a process that was killed
    store.write(f"{root}/step-00000050/{MANIFEST}", b"{")
    with Checkpoints(store, PLAN, tmp_path / "work", "data") as checkpoints:
        saved = checkpoints.latest("order")
        assert saved is not None and (saved.step, saved.metrics) == (20, "20\n")
        assert torch.equal(saved.model["w"], torch.full((1000,), 20.0))
        checkpoints.save(Snapshot(30, {"w": torch.full((1000,), 30.0)}, {"0.0.m": torch.zeros(3)}, "30\n", "order"))
    assert [name[:13] for name in store.list(root)] == ["step-00000020", "step-00000030"]
    assert (saved := checkpoints.latest("order")) is not None and saved.model["w"][0] == 30
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # no copies are left on this machine


def test_gc_and_verify_know_what_only_a_remote_store_has(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "YOUNG_SECONDS", 0)
    artifact, _ = build(store, PLAN, produce)
    bucket, _, prefix = store.root.partition("/")
    for place in (f"{prefix}/sample/{PLAN.fingerprint}/0.bin", f"{prefix}-of-others/0.bin"):
        store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=place)
    begun = [upload["Key"] for upload in store.fs.list_multipart_uploads(bucket)]  # several, where a client retried
    found = find_garbage(store, 0)
    assert {upload.why for upload in found} == {"upload never completed"} and find_garbage(store, 3600) == []
    assert len(found) == begun.count(f"{prefix}/sample/{PLAN.fingerprint}/0.bin") > 0
    assert main(["store", "gc", "--older-than", "0s", "--delete", "--store", store.uri]) == 0
    left = [upload["Key"] for upload in store.fs.list_multipart_uploads(bucket) if upload["Key"].startswith(prefix)]
    assert find_garbage(store, 0) == [] and set(left) == {f"{prefix}-of-others/0.bin"}

    assert main(["store", "verify", "--store", store.uri]) == 0
    data = bytearray(store.read(f"sample/{PLAN.fingerprint}/1.bin") or b"")
    data[77] ^= 1
    store.write(f"sample/{PLAN.fingerprint}/1.bin", bytes(data))
    store.write(f"sample/{PLAN.fingerprint}/foreign", b"")
    capsys.readouterr()
    assert main(["store", "verify", "--json", "--store", store.uri]) == 1
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "1.bin: SHA-256 is" in row["differences"][0] and "foreign is not in" in row["differences"][1]
    for read in (artifact.local, lambda: artifact.read("1.bin")):
        with pytest.raises(CorruptArtifactError, match=r"1\.bin: SHA-256"):
            read()


def test_a_manifest_with_a_wrong_bit_is_not_believed(store: Store) -> None:
    build(store, PLAN, produce)
    key = f"sample/{PLAN.fingerprint}/{MANIFEST}"
    data = store.read(key) or b""
    store.write(key, data.replace(b'"a": 1', b'"a": 3'))
    with pytest.raises(CorruptArtifactError, match="its bytes are not those that were written"):
        store.find(PLAN.stage, PLAN.fingerprint)
