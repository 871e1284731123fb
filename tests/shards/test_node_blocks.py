"""The processes of a node fetch a block once, and a checkpoint is fetched once, counted at a proxy before the store."""

import json
import multiprocessing
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import S3, in_turn
from tests.services.upload_proxy import Fault, Proxy
from tests.training.test_checkpoint import write_experiment
from vectorclm.config import load_experiment
from vectorclm.errors import CorruptBlockError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.processes import dying_with_parent
from vectorclm.shards.node_blocks import NodeBlocks
from vectorclm.stages import run_stage
from vectorclm.store.artifact import Store

DATA = b"block" * 1000


def accept(data: bytes) -> None:
    if data != DATA:
        raise CorruptBlockError("other bytes")


def read(folder: Path, readers: int, fetched: Path, number: int) -> None:
    """Read fifty blocks, and leave a file for each that this process fetched."""
    blocks = NodeBlocks(folder, readers)

    def fetch() -> bytes:
        (fetched / f"{block}-{number}").touch()
        return DATA

    for block in range(50):
        assert blocks.read(str(block), fetch, accept) == DATA


def test_one_process_fetches_a_block_and_the_last_removes_it(tmp_path: Path) -> None:
    folder, fetched = tmp_path / "folder", tmp_path / "fetched"
    folder.mkdir()
    fetched.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=read, args=(folder, 3, fetched, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(fetched.iterdir())) == 50
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {"lock"}


def test_a_copy_that_is_damaged_or_cannot_be_kept_is_fetched_again(tmp_path: Path) -> None:
    blocks, calls = NodeBlocks(tmp_path / "folder", 2), []

    def fetch() -> bytes:
        calls.append(1)
        return DATA

    assert blocks.read("0", fetch, accept) == blocks.read("0", fetch, accept) == DATA  # there is no folder
    assert len(calls) == 2
    blocks.folder.mkdir()
    blocks.read("0", fetch, accept)
    (blocks.folder / "0").write_bytes(b"half")
    assert blocks.read("0", fetch, accept) == DATA and len(calls) == 4


class Counted:
    """A proxy before the store that counts what is read: blocks of windows by their split, and files of checkpoints."""

    def __init__(self, s3: S3) -> None:
        place = urlsplit(s3.endpoint)
        assert place.hostname is not None and place.port is not None
        self.proxy = Proxy(place.hostname, place.port)
        self.lock, self.reads = threading.Lock(), Counter[str]()

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """The reads while the block runs."""
        self.reads.clear()

        def count(method: str, path: str) -> Fault | None:
            with self.lock:
                if method == "GET" and "/train-" in path:
                    self.reads["blocks"] += 1
                elif method == "GET" and "/validation-" in path:
                    self.reads["held out"] += 1
                elif method == "GET" and "/step-" in path and ".safetensors" in path:
                    self.reads["checkpoints"] += 1
            return None

        self.proxy.watch(count)
        yield self.reads


def on_two_nodes(command: list[str]) -> list[list[str]]:
    """The same torchrun twice, as on two nodes of two ranks each; both are this machine."""
    torchrun = [sys.executable, "-m", "flows.execution.ranks", "--nnodes=2", "--nproc-per-node=2", "--no-python"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29377", "--local-addr=127.0.0.1"]
    settings = ["env", "OMP_NUM_THREADS=1", "GLOO_SOCKET_IFNAME=lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    hosts = [f"--rdzv-conf=is_host={node == 0}" for node in range(2)]
    return [[*settings, *torchrun[:-1], host, torchrun[-1], *dying_with_parent(command)] for host in hosts]


@in_turn(2, 3)  # tests/runtime/test_nodes.py has the first
def test_two_nodes_of_two_ranks_fetch_what_two_readers_fetch(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(s3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{counted.proxy.port}")
    values = json.loads(write_experiment(tmp_path).read_text())
    values["pretrain"] |= {"phases": [{"tokens": 20 * 8 * 64}], "validation_interval": 20}  # 20 steps
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(values))
    experiment = pin(load_experiment(str(path))[0], path, None, resolve=False)[0]
    path.write_text(experiment.model_dump_json())
    runtime = Runtime(device="cpu", threads=1, checkpoint_interval=10, keep_checkpoints=True)
    (tmp_path / "runtime.json").write_text(runtime.model_dump_json())
    store = Store(f"s3://{s3.bucket}/node-blocks")
    for stage in ("sample", "tokenizer", "shards"):
        run_stage(stage, experiment, store, runtime, None)
    with counted.counting() as alone:
        made, _ = run_stage("pretrain", experiment, store, runtime, None)
        blocks, held_out = alone["blocks"], alone["held out"]
    assert blocks and held_out
    store.remove(f"pretrain/{made.fingerprint}")  # so that it is trained again, from the checkpoint of step 10
    command = [sys.executable, "-m", "vectorclm", "pretrain", str(path), "--store", store.uri, "--relay"]
    command += ["--runtime", str(tmp_path / "runtime.json")]
    with counted.counting() as reads:
        children = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True) for one in on_two_nodes(command)]
        said = [child.communicate(timeout=200)[0] for child in children]
        assert [child.returncode for child in children] == [0, 0], said
    assert "step 10 of 20" in "".join(said)
    assert blocks <= reads["blocks"] <= 1.05 * 2 * blocks
    assert held_out <= reads["held out"] <= 2 * held_out, "a node's ranks share what they validate on"
    assert 0 < reads["checkpoints"] <= 2, "one reader fetches weights and optimizer state, and sends them to all"
    found = store.find("pretrain", made.fingerprint)
    assert found is not None and found.manifest["environment"]["world_size"] == 4
