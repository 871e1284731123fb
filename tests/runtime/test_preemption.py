"""SIGTERM ends a training after a checkpoint: at most one step is lost, and the model is that of one never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from flows.execution.launch import Launcher, StageCancelledError, StageInterruptedError, under_torchrun
from tests.conftest import KILLS, one_of
from tests.test_curriculum import mini
from tests.training.test_checkpoint import the_same, write_experiment
from vectorclm.config import load_experiment, override
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.preemption import ENDED, PREEMPTED, REPEATED
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store

INPUTS = ("sample", "tokenizer", "shards")
RUNTIME = Runtime(device="cpu", threads=1, checkpoint_interval=1000)  # no checkpoint but those of a SIGTERM
IN_TIME = 10  # seconds from the signal to the end
STEPS = 40
SEEDS = range(10 if KILLS >= 10 else 1)

# A training that says when a step is done, by a byte in a file of its own process.
COUNTED = """
import os, sys, time
from vectorclm import __main__, train
made, path = train.TrainStep.apply, os.environ["STEPS"] + "-" + str(os.getpid())
def counted(*arguments):
    done = made(*arguments)
    with open(path, "a") as file:
        file.write(".")
    time.sleep(0.2 * os.path.exists(os.environ["STEPS"] + ".slow"))  # where a test needs time before the end
    return done
train.TrainStep.apply = counted
"""
STUCK = (
    COUNTED
    + """
def stuck(batch):
    open(path, "a").write(".")
    time.sleep(600)
train.supervised_tokens = stuck
"""
)
START = "sys.exit(__main__.main(sys.argv[1:]))"


class Trained:
    """A small experiment with its inputs, and stores that have these already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = json.loads(write_experiment(folder).read_text())
        values["pretrain"] |= {"phases": [{"tokens": STEPS * 8 * 64}], "validation_interval": 15}
        self.path = folder / "experiment.json"
        self.path.write_text(json.dumps(values))
        experiment = pin(load_experiment(str(self.path))[0], self.path, None, resolve=False)[0]
        self.path.write_text(experiment.model_dump_json())
        for stage in INPUTS:
            run_stage(stage, experiment, Store(str(folder / "inputs")), RUNTIME, None)
        self.fingerprint = plans(experiment)["pretrain"].fingerprint
        self.never_stopped: dict[int, Path] = {}

    def store(self, name: str) -> Path:
        store = self.folder / name
        store.mkdir()
        for stage in INPUTS:
            (store / stage).symlink_to(self.folder / "inputs" / stage)
        return store

    def command(self, store: Path, processes: int, program: str = COUNTED, **runtime: object) -> list[str]:
        settings = store / "runtime.json"
        settings.write_text(RUNTIME.model_copy(update=runtime).model_dump_json())
        command = [sys.executable, "-c", program + START, "pretrain", str(self.path), "--store", str(store)]
        command += ["--relay", "--runtime", str(settings)]
        return under_torchrun(command, processes, 1) if processes > 1 else command

    def whole(self, processes: int) -> Path:
        """The model of so many processes that were never stopped."""
        if processes not in self.never_stopped:
            store = self.store(f"whole-{processes}")
            finish(self.command(store, processes))
            self.never_stopped[processes] = store / "pretrain" / self.fingerprint
        return self.never_stopped[processes]

    def kept(self, store: Path) -> int:
        """The step of the newest checkpoint; 0 without one."""
        found = (store / "checkpoints" / self.fingerprint).glob("step-*/manifest.json")
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("preemption"))


def environment(steps: Path) -> dict[str, str]:
    return {**os.environ, "STEPS": str(steps), "PYTHONUNBUFFERED": "1"}


def finish(command: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, env=environment(Path(folder) / "steps"), capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:]


def done(steps: Path) -> list[int]:
    """How many steps each process of a training has done."""
    return [path.stat().st_size for path in steps.parent.glob(f"{steps.name}-*")]


def until(ready: Callable[[], object], child: "subprocess.Popen[bytes]") -> None:
    while not ready():
        assert child.poll() is None, "it ended before that"
        time.sleep(0.001)


@contextmanager
def started(command: Sequence[str], steps: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A training in a session of its own; nothing of it survives the block."""
    child = subprocess.Popen(command, env=environment(steps), stdout=subprocess.PIPE, start_new_session=True)
    everyone: set[psutil.Process] = set()
    try:
        with child:
            yield child
    finally:
        everyone |= {p for p in psutil.process_iter() if p.is_running() and str(steps) in environ(p)}
        assert not psutil.wait_procs(list(everyone), 3 * IN_TIME)[1]


def environ(process: psutil.Process) -> str:
    try:
        return process.environ().get("STEPS", "")
    except psutil.Error:
        return ""


def signalled(child: "subprocess.Popen[bytes]", target: str) -> None:
    """SIGTERM for torchrun or the process alone, for one rank, or for every process at once."""
    everyone = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    ranks = [process for process in everyone[1:] if "--relay" in process.cmdline()]  # not their watchdogs
    victims = {"launcher": everyone[:1], "rank": ranks[-1:], "everyone": everyone}[target]
    for process in victims:
        process.send_signal(signal.SIGTERM)


CELLS = one_of(
    [
        (processes, target, workers, seed)
        for seed in SEEDS
        for processes, target, workers in (
            (1, ("everyone", "launcher")[seed % 2], 1 - seed % 2),
            (2, ("launcher", "rank", "everyone")[seed % 3], 0),
        )
    ]
)


@pytest.mark.parametrize(("processes", "target", "workers", "seed"), CELLS)
def test_a_training_ends_by_sigterm_with_a_checkpoint_and_goes_on_from_it(
    trained: Trained, tmp_path: Path, processes: int, target: str, workers: int, seed: int
) -> None:
    moments = random.Random(f"{processes} {target} {seed}")
    store, before = trained.store(f"{processes}-{target}-{workers}-{seed}"), 0
    for number in range(2):  # the second time in a training that goes on
        steps = tmp_path / f"steps-{number}"
        last = moments.randrange(before + 1, STEPS - 2)
        with started(trained.command(store, processes, loader_workers=workers), steps) as child:
            until(lambda steps=steps, wait=last - before: max(done(steps), default=0) >= wait, child)
            time.sleep(moments.random() * 0.02)  # anywhere in the step
            signalled(child, target)
            said, _ = child.communicate(timeout=IN_TIME)
            code = child.returncode
        if code == 0:  # it came when all was done
            break
        assert code in ((PREEMPTED,) if processes == 1 else (PREEMPTED, ENDED)), said
        counts, kept = [before + count for count in done(steps)], trained.kept(store)
        assert counts == [counts[0]] * processes and last <= counts[0], "all ranks stop after the same step"
        assert counts[0] - 1 <= kept <= counts[0], f"{counts[0] - kept} steps are lost"
        assert f"checkpoint at step {kept}".encode() in said and b"PreemptedError" in said
        assert not list((store / "leases").iterdir())
        before = kept
    finish(trained.command(store, processes))
    the_same(trained.whole(processes), store / "pretrain" / trained.fingerprint)


@pytest.mark.parametrize("processes", one_of([2, 1]))
def test_a_second_sigterm_ends_a_training_at_once_that_does_not_come_to_an_end(
    trained: Trained, tmp_path: Path, processes: int
) -> None:
    store = trained.store(f"stuck-{processes}")
    with started(trained.command(store, processes, STUCK), tmp_path / "steps") as child:
        until(lambda: len(done(tmp_path / "steps")) == processes, child)
        began = time.monotonic()
        while child.poll() is None:
            child.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(1.2 * REPEATED)
        # torchrun's own process may receive the second signal while it ends, without a handler.
        assert child.returncode in ((ENDED,) if processes == 1 else (ENDED, -signal.SIGTERM))
        assert time.monotonic() - began < IN_TIME


def test_plain_torchrun_finds_the_reason_in_the_error_files_of_its_ranks(trained: Trained, tmp_path: Path) -> None:
    store, logs = trained.store("plain"), tmp_path / "logs"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--log-dir",
        str(logs),
    ]
    alone = trained.command(store, 1)
    with started([*command, "--no-python", *alone], tmp_path / "steps") as child:
        until(lambda: max(done(tmp_path / "steps"), default=0) >= 3, child)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=IN_TIME)
        assert child.returncode == 1
    files = list(logs.glob("**/error.json"))
    reasons = {json.loads(file.read_text())["message"]["message"] for file in files}
    assert len(files) == 2 and len(reasons) == 1, reasons
    said = (
        f"interrupted by SIGTERM after step {trained.kept(store)} of {STEPS}, checkpoint at step {trained.kept(store)}"
    )
    assert reasons.pop().startswith(f"PreemptedError: {said}")


@pytest.mark.parametrize("target", one_of(["launcher", "rank"]))
def test_a_launcher_takes_it_for_an_interruption(trained: Trained, tmp_path: Path, target: str) -> None:
    store, steps = trained.store(f"launched-{target}"), tmp_path / "steps"
    command = ["env", f"STEPS={steps}", *trained.command(store, 2)]
    with Launcher(tmp_path / "locks") as launcher, ThreadPoolExecutor(1) as pool:
        running = pool.submit(launcher.run, command, lambda line: None)
        while max(done(steps), default=0) < 5:
            assert not running.done(), running.result()
        (child,) = launcher._children
        everyone = psutil.Process(child.pid).children(recursive=True)
        ranks = [process for process in everyone if "--relay" in process.cmdline()]
        (ranks[-1] if target == "rank" else child).send_signal(signal.SIGTERM)
        with pytest.raises(StageInterruptedError, match=r"interrupted by SIGTERM after step \d+ of 40, checkpoint at"):
            running.result(IN_TIME)
    assert trained.kept(store) >= 5


@pytest.mark.parametrize("processes", one_of([2, 1]))
def test_a_cancel_waits_for_no_step(trained: Trained, tmp_path: Path, processes: int) -> None:
    """A training in a step without end leaves the devices soon all the same."""
    store = trained.store(f"cancelled-{processes}")
    with ThreadPoolExecutor(1) as pool:
        with Launcher(tmp_path / "locks") as launcher:
            command = ["env", f"STEPS={tmp_path / 'steps'}", *trained.command(store, processes, STUCK)]
            running = pool.submit(launcher.run, command, lambda line: None)
            while len(done(tmp_path / "steps")) < processes:
                assert not running.done(), running.result()
            began = time.monotonic()
        assert time.monotonic() - began < 5, "two seconds, and what a busy machine adds"
        with pytest.raises(StageCancelledError):
            running.result(IN_TIME)


def test_a_stage_of_a_flow_goes_on_by_its_retry_and_a_flow_that_is_ended_keeps_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM for the stage's process, then for the flow's own, as a machine that is taken away sends it to all."""
    experiment, store = tmp_path / "experiment.json", tmp_path / "store"
    long = override(mini(), ["pretrain.phases=[{tokens = 20_000_000}]", "pretrain.validation_interval=100_000"])
    experiment.write_text(long.model_dump_json())
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    command = [sys.executable, "-m", "flows.cli", "run", str(experiment), "--store", str(store), "--threads", "1"]
    command += ["--checkpoint-interval", "100000"]

    def stage() -> psutil.Process | None:
        for process in psutil.Process(child.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "--relay" in process.cmdline() and steps() > kept():
                    return process
        return None

    def steps() -> int:
        return max((path.read_text().count('"loss"') for path in store.glob("work/**/metrics.jsonl")), default=0)

    def kept() -> int:
        found = store.glob("checkpoints/*/step-*/manifest.json")
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)

    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, env=clean, stdout=log, stderr=log) as child:
        before = 0
        for victim in ("stage", "flow"):
            until(lambda: stage() is not None, child)
            process = stage()
            assert process is not None
            (process if victim == "stage" else child).send_signal(signal.SIGTERM)
            process.wait(3 * IN_TIME)
            assert kept() > before
            before = kept()
        child.wait(3 * IN_TIME)
    said = (tmp_path / "log").read_text()
    assert "interrupted by SIGTERM after step" in said and "trying again" in said
    assert child.returncode in (ENDED, -signal.SIGTERM)
