"""Ray: two raylets in two network namespaces train as plain torchrun does, also where any part of it is killed."""

import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from flows.execution.engines.choice import on_nodes
from flows.execution.launch import Launcher, StageInterruptedError
from flows.terminal import attached
from tests.conftest import KILLS, SEED, one_of, write_sample_text
from tests.execution.engines.slices_of_stages import BUILDERS, SLICES_OF, prepare
from tests.runtime.test_nodes import finish, nodes
from tests.runtime.test_preemption import COUNTED, RUNTIME, START, STEPS, Trained, done
from tests.services.nodes import Nodes
from tests.services.ray_cluster import RayCluster, ray_cluster
from tests.shards.test_writer import contents
from tests.test_curriculum import mini
from tests.training.test_checkpoint import the_same
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.progress import Tick
from vectorclm.shards.config import ShardsConfig
from vectorclm.shards.writer import write_shards
from vectorclm.tokenizer import TokenizerConfig, load_tokenizer
from vectorclm.train_tokenizer import train_tokenizer

__all__ = ["nodes"]  # a fixture

GONE = 25  # seconds after a kill in which all processes of the training end
HEAD = 30  # seconds in which a dead head is noticed
AGAIN = 120  # seconds in which a training goes on after the loss of a node
PARTS = ("rank", "torchrun", "actor", "raylet", "driver")
WORDS = {"rank": "--relay", "torchrun": "engines.node", "actor": "ray::Node", "raylet": "raylet/raylet"}
CELLS = [(part, seed) for part in PARTS for seed in range(4)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def cluster(nodes: Nodes, trained: Trained) -> Iterator[RayCluster]:
    with ray_cluster(nodes, STEPS=str(trained.folder / "steps")) as found:
        yield found


class Training:
    """One training on the cluster, by the launcher of a stage; its lines and its progress."""

    def __init__(self, cluster: RayCluster, trained: Trained, store: Path, runtime: Runtime) -> None:
        self.cluster, self.steps = cluster, trained.folder / "steps"
        for path in self.steps.parent.glob("steps-*"):
            path.unlink()
        self.lines: list[str] = []
        self.ticks: list[Tick] = []
        stage = ["-c", COUNTED + START, "pretrain", trained.path.name, "--relay", "--store", str(store)]
        command = on_nodes(runtime, [*stage, "--runtime", "runtime.json"], trained.path)
        known = [f"{name}={value}" for name, value in cluster.environment.items() if name.startswith(("RAY_", "HOME"))]
        self.command = cluster.nodes.on(0, ["env", *known, *command])

    def run(self, launcher: Launcher) -> None:
        with attached(_Ticks(self.ticks), {"vectorclm.runtime.progress": logging.INFO}):
            launcher.run(self.command, self.lines.append)

    def ours(self) -> list[psutil.Process]:
        """The processes of the training: torchrun, the ranks and their watchdogs; not those of Ray."""
        return [*self.cluster.processes(None, "engines.node"), *self.cluster.processes(None, "vectorclm")]

    def part(self, name: str, node: int) -> psutil.Process:
        """One process of the training; the driver runs on the first node."""
        if name == "driver":
            return next(one for one in psutil.process_iter() if "engines.ray_cluster" in " ".join(_words(one)))
        return self.cluster.processes(node, WORDS[name])[0]


class _Ticks(logging.Handler):
    def __init__(self, ticks: list[Tick]) -> None:
        super().__init__()
        self.ticks = ticks

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(tick := getattr(record, "tick", None), Tick):
            self.ticks.append(tick)


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def settings(nodes: tuple[int, int] = (2, 2), **changes: object) -> Runtime:
    return RUNTIME.model_copy(update={"engine": "ray", "nodes": nodes, "processes": 1, **changes})


def until(ready: Callable[[], object], running: "Future[None]", seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert not running.done(), running.exception()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def running(training: Training, folder: Path) -> Iterator["Future[None]"]:
    with Launcher(folder) as launcher, ThreadPoolExecutor(1) as threads:
        started = threads.submit(training.run, launcher)
        try:
            yield started
        finally:
            if not started.done():
                launcher.__exit__(None, None, None)


@pytest.fixture(scope="module")
def whole(nodes: Nodes, trained: Trained) -> Path:
    """The model of plain torchrun on the same two nodes."""
    store = trained.store("torchrun")
    finish(nodes, trained.command(store, 1, COUNTED), trained.folder / "plain")
    return store / "pretrain" / trained.fingerprint


def test_the_model_is_that_of_torchrun_and_progress_and_lines_arrive(
    cluster: RayCluster, trained: Trained, whole: Path, tmp_path: Path
) -> None:
    store = trained.store("same")
    training = Training(cluster, trained, store, settings())
    with Launcher(tmp_path) as launcher:
        training.run(launcher)
    the_same(whole, store / "pretrain" / trained.fingerprint)
    assert done(training.steps) == [STEPS, STEPS]
    assert training.ticks[-1].done == training.ticks[-1].total == STEPS * 8 * 64
    assert {tick.stage for tick in training.ticks} == {"pretrain"}
    assert not [process for process in training.ours() if process.is_running()]


def test_an_error_of_a_rank_is_the_same_error_here(cluster: RayCluster, trained: Trained, tmp_path: Path) -> None:
    store = trained.store("typed")
    training = Training(cluster, trained, store, settings())
    for link in store.glob("sh*"):
        link.unlink()
    with Launcher(tmp_path) as launcher, pytest.raises(Exception, match="run shards first") as caught:
        training.run(launcher)
    assert type(caught.value).__name__ == "DataError"


@pytest.mark.parametrize(("part", "seed"), CELLS if KILLS >= 10 else [CELLS[SEED * 7 % len(CELLS)]])
def test_a_killed_part_costs_no_byte_and_leaves_no_process(
    cluster: RayCluster, trained: Trained, whole: Path, tmp_path: Path, part: str, seed: int
) -> None:
    moments = random.Random(f"ray {part} {seed}")
    store, last = trained.store(f"killed-{part}-{seed}"), moments.randrange(3, STEPS - 5)
    runtime = settings(checkpoint_interval=5, keep_checkpoints=True)
    training = Training(cluster, trained, store, runtime)
    node = 1 if part == "raylet" else moments.randrange(2)  # the first node's raylet is the head's
    with running(training, tmp_path) as first:
        until(lambda: len(found := done(training.steps)) == 2 and min(found) >= last, first)
        time.sleep(moments.random() * 0.02)  # anywhere in the step
        training.part(part, node).kill()
        began = time.monotonic()
        assert isinstance(first.exception(timeout=60), StageInterruptedError), training.lines
        while training.ours():
            assert time.monotonic() - began < GONE, training.ours()
            time.sleep(0.1)
    if part == "raylet":
        cluster.kill(1)  # what the raylet started is Ray's own, and may outlive it
        cluster.start(1)
        cluster.wait(2)
    again = Training(cluster, trained, store, runtime)
    with Launcher(tmp_path) as launcher:
        again.run(launcher)
    the_same(whole, store / "pretrain" / trained.fingerprint)
    kept = sorted((store / "checkpoints" / trained.fingerprint).glob("step-*/manifest.json"))
    steps = {int(path.parent.name.split("-")[1]) for path in kept}
    assert steps >= set(range(5, STEPS, 5))  # the last step needs none; the end of the first attempt may add its own
    assert len(steps) == len(kept) <= STEPS // 5


def test_sigterm_ends_all_nodes_after_a_checkpoint(cluster: RayCluster, trained: Trained, tmp_path: Path) -> None:
    store = trained.store("preempted")
    training = Training(cluster, trained, store, settings())
    (slow := training.steps.with_suffix(".slow")).touch()
    with running(training, tmp_path) as first:
        until(lambda: len(found := done(training.steps)) == 2 and min(found) >= 5, first)
        training.part("driver", 0).send_signal(signal.SIGTERM)
        with pytest.raises(StageInterruptedError, match="checkpoint at step"):
            first.result(timeout=60)
    slow.unlink()
    counts = done(training.steps)
    assert counts[0] == counts[1] and counts[0] - 1 <= trained.kept(store) <= counts[0]


@pytest.mark.skipif(KILLS < 10, reason="a minute and a half: VECTORCLM_KILLS=10")
def test_the_loss_of_a_node_leaves_the_others_at_work(
    cluster: RayCluster, trained: Trained, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    store = trained.store("lost")
    runtime = settings((1, 2), checkpoint_interval=5)
    training = Training(cluster, trained, store, runtime)
    try:
        with running(training, tmp_path) as first:
            until(lambda: len(found := done(training.steps)) == 2 and min(found) >= 7, first)
            lost = time.monotonic()
            cluster.kill(1)
            assert isinstance(first.exception(timeout=AGAIN), StageInterruptedError), training.lines
            noticed = time.monotonic()
        again = Training(cluster, trained, store, runtime)
        with running(again, tmp_path) as second:
            until(lambda: cluster.processes(0, "--relay"), second, AGAIN)
            placed = time.monotonic()
            until(lambda: done(again.steps), second, AGAIN)
            began = time.monotonic()
            second.result(timeout=AGAIN)
        assert began - lost < AGAIN
        split = {"detection": noticed - lost, "lease and placement": placed - noticed, "start": began - placed}
        record_property("seconds", split)
        logging.getLogger(__name__).info("%s", split)
    finally:
        cluster.start(1)
        cluster.wait(2)


@pytest.mark.skipif(KILLS < 10, reason="a whole curriculum, minutes: VECTORCLM_KILLS=10")
def test_a_curriculum_runs_on_the_cluster(cluster: RayCluster, tmp_path: Path) -> None:
    """From the command line on the first node; the shards are built by Ray's tasks, the model by both nodes."""
    experiment, store = tmp_path / "mini.json", tmp_path / "store"
    experiment.write_text(mini().model_copy(update={"chat": None, "finetune": None}).model_dump_json())
    options = ["--store", str(store), "--engine", "ray", "--nodes", "2", "2", "--threads", "1", "--verbose"]
    clean = {name: value for name, value in cluster.environment.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    command = cluster.nodes.on(0, [sys.executable, "-m", "flows.cli", "run", str(experiment), *options])
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    (made,) = (store / "pretrain").iterdir()
    assert json.loads((made / "manifest.json").read_text())["environment"]["world_size"] == 2
    assert "pretrain built in" in done.stdout + done.stderr


TOKENS = [{"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_TOKEN": "0" * 64}]


@pytest.mark.parametrize("token", one_of(TOKENS))  # Ray takes 20 seconds to refuse one
def test_a_client_without_the_token_is_refused(cluster: RayCluster, token: dict[str, str]) -> None:
    client = "import ray, os; ray.init(os.environ['RAY_ADDRESS']); print(ray.nodes())"
    refused = cluster.run(client, **token)
    assert refused.returncode != 0 and "uthentic" in refused.stderr, refused


def test_a_head_that_does_not_answer_is_one_line(cluster: RayCluster, trained: Trained, tmp_path: Path) -> None:
    training = Training(cluster, trained, trained.store("no-head"), settings())
    training.command = [word.replace(cluster.address, "10.77.0.1:9") for word in training.command]
    began = time.monotonic()
    with (
        Launcher(tmp_path) as launcher,
        pytest.raises(StageInterruptedError, match="no Ray head answers at"),
    ):
        training.run(launcher)
    assert time.monotonic() - began < HEAD


SLICES = """
import json, os, sys
from pathlib import Path
from flows.execution.engines.ray_cluster import RayWorkers, connect
from vectorclm.shards.config import ShardsConfig
from vectorclm.shards.writer import write_shards
from vectorclm.store.resumable import Slices
from vectorclm.tokenizer import load_tokenizer
folder = Path(os.environ["FOLDER"])
connect()
slices = Slices(folder / "slices", folder / "ray")
slices.workers = RayWorkers()
finish = slices.finish
def counted(*arguments):
    done = finish(*arguments)
    (folder / "steps").open("a").write(".")
    return done
slices.finish = counted
config = ShardsConfig(sequence_length=32)
summary = write_shards(config, folder / "sample", load_tokenizer(folder / "tokenizer"), folder / "ray", slices=slices)
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.mark.parametrize("killed", [False, True] if KILLS >= 10 else [False])
def test_slices_that_ray_builds_are_the_same_bytes(
    cluster: RayCluster, tiny_text: list[str], tmp_path: Path, killed: bool
) -> None:
    """Also where a raylet is killed when half of them are done."""
    folder = tmp_path / "sample" / "a"
    for number in range(11):
        write_sample_text(folder, [f"{number} {text}" for text in tiny_text * (200 if killed else 1)], "train")
        (folder / "train-00000.parquet").rename(folder / f"train-{number + 1:05d}.parquet")
    write_sample_text(folder, tiny_text[:7], "validation")
    (tmp_path / "tokenizer").mkdir()
    train_tokenizer(TokenizerConfig(vocab_size=310, bytes=20_000), tmp_path / "sample", 64, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    expected = write_shards(ShardsConfig(sequence_length=32), tmp_path / "sample", tokenizer, tmp_path / "here")
    built_by_ray(cluster, SLICES, 5 if killed else None, FOLDER=str(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(expected))
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


def built_by_ray(cluster: RayCluster, program: str, killed: int | None, **environment: str) -> None:
    """Run a program that builds slices; with `killed`, a raylet is killed after so many and then replaced."""
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(cluster.run, program, **environment)
        if killed is not None:
            steps = Path(environment["FOLDER"], "steps")
            until(lambda: steps.is_file() and steps.stat().st_size >= killed, running)  # type: ignore[arg-type]
            cluster.kill(1)
        done = running.result()
    if killed is not None:
        cluster.start(1)
        cluster.wait(2)
    assert done.returncode == 0, done.stderr


STAGES = """
import json, os
from pathlib import Path
from flows.execution.engines.ray_cluster import RayWorkers, connect
from tests.execution.engines.slices_of_stages import BUILDERS
from vectorclm.runtime.workers import open_workers, use_workers
folder, stage = Path(os.environ["FOLDER"]), os.environ["STAGE"]
connect()
workers = RayWorkers()
use_workers(workers)
submit = workers.submit
def counted(*arguments):
    wait = submit(*arguments)
    def result():
        found = wait()
        (folder / "steps").open("a").write(".")
        return found
    return result
workers.submit = counted
with open_workers(1):
    summary = BUILDERS[stage](folder, folder / "ray")
(folder / "summary.json").write_text(json.dumps(summary))
"""
BUILT = [(stage, killed) for stage in BUILDERS for killed in (True, False)]


@pytest.mark.parametrize(("stage", "killed"), one_of(BUILT))
def test_each_stage_in_slices_is_the_same_bytes_by_ray(
    cluster: RayCluster, tiny_text: list[str], tmp_path: Path, stage: str, killed: bool
) -> None:
    """Also where a raylet is killed when half of the slices are done."""
    prepare(tmp_path, tiny_text)
    expected = BUILDERS[stage](tmp_path, tmp_path / "here")
    place = {"FOLDER": str(tmp_path), "STAGE": stage, "PYTHONPATH": str(Path(__file__).parents[3])}
    built_by_ray(cluster, STAGES, SLICES_OF[stage] // 2 if killed else None, **place)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(expected))
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    assert (tmp_path / "steps").stat().st_size >= SLICES_OF[stage]


def test_no_dashboard_listens(cluster: RayCluster) -> None:
    ports = {
        connection.laddr.port
        for process in cluster.processes(0, "dashboard.py")
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert 8265 not in ports


@pytest.mark.skipif(KILLS < 10, reason="ends the cluster: VECTORCLM_KILLS=10")
def test_a_head_that_is_lost_ends_the_training(cluster: RayCluster, trained: Trained, tmp_path: Path) -> None:
    """The last test of this file, as it ends the cluster."""
    training = Training(cluster, trained, trained.store("lost-head"), settings())
    with running(training, tmp_path) as first:
        until(lambda: len(found := done(training.steps)) == 2 and min(found) >= 2, first)
        began = time.monotonic()
        cluster.processes(0, "gcs_server")[0].kill()
        with suppress(StageInterruptedError):  # or the training was faster
            first.result(timeout=HEAD + GONE)
        assert time.monotonic() - began < HEAD + GONE
        while training.ours():
            assert time.monotonic() - began < HEAD + GONE, training.ours()
            time.sleep(0.1)
