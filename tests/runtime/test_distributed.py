"""Two real ranks under torchrun: they train what one process trains, and end together however one of them ends."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.execution.launch import Launcher, StageInterruptedError, under_torchrun
from tests.conftest import in_turn, read_lines
from tests.training.test_checkpoint import CHANGES, write_experiment
from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.errors import InUseError, OutOfMemoryError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store

RUNTIME = Runtime(device="cpu", threads=1, checkpoint_interval=10)
INPUTS = ("sample", "tokenizer", "shards", "chat_shards")
ENDED = 25  # seconds in which all must be gone; torchrun itself would kill after 30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What trainings read, and two experiments for it: `even` without dropout, `odd` with it."""
    folder = tmp_path_factory.mktemp("distributed")
    values = json.loads(write_experiment(folder).read_text())
    even = {"model": {"hidden_dropout": 0.0}, "pretrain": {"phases": [{"tokens": 8_960}], "batch_size": 7}}  # 20 steps
    odd = {"pretrain": {"phases": [{"tokens": 20_480}]}}  # 40 steps
    for name, changes in {"even": even, "odd": odd}.items():
        changed = {section: {**values[section], **changes.get(section, {})} for section in CHANGES}
        changed["finetune"] = {**values["finetune"], "batch_size": 7, "epochs": 1.0}
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**values, **changed}))
        path.write_text(pin(load_experiment(str(path))[0], path, None, resolve=False)[0].model_dump_json())
    (folder / "runtime.json").write_text(RUNTIME.model_dump_json())
    for stage in INPUTS:
        run_stage(stage, experiment(folder, "even"), Store(str(folder / "inputs")), RUNTIME, None)
    return folder


def experiment(folder: Path, name: str) -> ExperimentConfig:
    return load_experiment(str(folder / f"{name}.json"))[0]


def new_store(inputs: Path, name: str) -> Path:
    """A store that has the inputs already."""
    store = inputs / name
    store.mkdir()
    for stage in INPUTS:
        (store / stage).symlink_to(inputs / "inputs" / stage)
    return store


def on_two_ranks(inputs: Path, name: str, store: Path, stage: str = "pretrain", *more: str) -> list[str]:
    command = [
        sys.executable,
        *(more or ("-m", "vectorclm")),
        stage,
        str(inputs / f"{name}.json"),
        "--store",
        str(store),
        "--relay",
    ]
    return under_torchrun([*command, "--runtime", str(inputs / "runtime.json")], 2, RUNTIME.threads)


def run(command: list[str]) -> list[str]:
    """Run it as a flow does; the lines that it logged."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as locks, Launcher(Path(locks)) as launcher:
        launcher.run(command, lines.append)
    return lines


def losses(store: Path, stage: str) -> list[float]:
    (path,) = store.glob(f"{stage}/*/metrics.jsonl")
    return [float(str(line["loss"])) for line in read_lines(path) if "loss" in line]


def test_two_ranks_follow_the_curve_of_one_process(inputs: Path) -> None:
    one, two = new_store(inputs, "one"), new_store(inputs, "two")
    for stage, steps in (("pretrain", 20), ("finetune", None)):
        run_stage(stage, experiment(inputs, "even"), Store(str(one)), RUNTIME, None)
        run(on_two_ranks(inputs, "even", two, stage))
        curves = losses(one, stage), losses(two, stage)
        assert curves[1] == pytest.approx(curves[0], rel=2e-5)
        assert steps is None or len(curves[1]) == steps
        made = [json.loads(next(store.glob(f"{stage}/*/manifest.json")).read_text()) for store in (one, two)]
        assert [manifest["environment"]["world_size"] for manifest in made] == [1, 2]
        assert made[0]["fingerprint"] == made[1]["fingerprint"] and made[0]["files"].keys() == made[1]["files"].keys()
        scores = [manifest["summary"]["validation"] for manifest in made]
        for label, score in scores[0].items():
            assert scores[1][label] == pytest.approx(score, rel=2e-5)


STEP = """
import hashlib
import torch
from tests.test_finetune import CONFIG
from vectorclm.dataset import Batch
from vectorclm.runtime.ranks import joined
from vectorclm.runtime.group import ALONE
from vectorclm.errors import DataError
from vectorclm.nn.loss import IGNORE_INDEX
from vectorclm.model import CausalLM
from vectorclm.training.optimizers import build_optimizers
from vectorclm.training.optimizers import OptimizerConfig
from vectorclm.train_step import TrainStep

def steps(batch, group):
    torch.manual_seed(0)
    model, figures = CausalLM(CONFIG), []
    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=0.02, adamw_learning_rate=0.006), group)
    rows = Batch(*(tensor[group.rank :: group.world_size] for tensor in batch[:2]))
    step = TrainStep(model, optimizers, 1.0, 2, group)
    for _ in range(3):
        figures += step(rows)
    return torch.stack(figures), torch.cat([p.detach().flatten() for p in model.parameters()])

ids = torch.randint(5, CONFIG.vocab_size, (5, 32), generator=torch.Generator().manual_seed(3))
labels = ids.clone()
labels[1::2] = IGNORE_INDEX  # the second rank's rows
labels[2, :20] = IGNORE_INDEX
with joined() as group:
    group.call("work")
    for batch in (Batch(ids, ids), Batch(ids, labels), Batch(ids[:1], ids[:1])):  # the last: one row for two ranks
        for alone, together in zip(steps(batch, ALONE), steps(batch, group)):
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    _, weights = steps(Batch(ids, labels), group)
    bits = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    assert group.share(bits) == bits  # the same on both
    values = [None, 7, "Wald 🙂", ""]
    assert [group.share(value if group.rank == 0 else 1) for value in values] == values
    try:
        steps(Batch(ids, torch.full_like(ids, IGNORE_INDEX)), group)
    except DataError:
        print("both refused" if group.total(1) == 2 and group.rank == 0 else "")
"""


def test_a_step_is_the_same_however_rows_and_labels_fall_on_ranks() -> None:
    here = f"PYTHONPATH={Path(__file__).parents[2]}"  # the program imports the tests
    assert "both refused" in run(["env", here, *under_torchrun([sys.executable, "-c", STEP], 2, 1)])


@contextmanager
def started(command: list[str]) -> Iterator[tuple["Future[list[str]]", Callable[[], list[psutil.Process]]]]:
    """A command in the background, and how to find its processes: torchrun first, then its ranks. None survives."""
    before = set(psutil.Process().children())
    seen: set[psutil.Process] = set()

    def processes() -> list[psutil.Process]:
        launcher = next(child for child in psutil.Process().children() if child not in before)
        found = [launcher, *sorted(launcher.children(), key=lambda rank: rank.pid)]
        seen.update(found)
        return found

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run, command), processes
    assert not psutil.wait_procs(list(seen), ENDED)[1]


def test_nothing_is_lost_and_nobody_left_after_kill_9(inputs: Path) -> None:
    """A rank is killed in mid-training, then the launcher; the third run makes the model of one never killed."""
    whole, killed = new_store(inputs, "whole"), new_store(inputs, "killed")
    run(on_two_ranks(inputs, "odd", whole))
    fingerprint = plans(experiment(inputs, "odd"))["pretrain"].fingerprint
    checkpoints = killed / "checkpoints" / fingerprint
    for victim, step in (("rank", 10), ("torchrun", 20)):
        with started(on_two_ranks(inputs, "odd", killed)) as (running, processes):
            until(lambda step=step: list(checkpoints.glob(f"step-{step:08d}-*/manifest.json")), running)
            launcher, *ranks = processes()
            assert len(ranks) == 2
            assert listening(launcher) == {"127.0.0.1"}
            os.kill(ranks[1].pid if victim == "rank" else launcher.pid, signal.SIGKILL)
            with pytest.raises(StageInterruptedError, match=r"rank 1 on \S+ ended|SIGTERM"):
                running.result()
        assert not (killed / "pretrain" / fingerprint).exists()
    run(on_two_ranks(inputs, "odd", killed))
    models = [store / "pretrain" / fingerprint / "model.safetensors" for store in (whole, killed)]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert not checkpoints.exists() and not list((killed / "leases").iterdir()) + list((killed / "work").iterdir())


def listening(launcher: psutil.Process) -> set[str]:
    """The addresses on which torchrun, its ranks and their watchdogs wait for connections."""
    found = set[str]()
    for process in (launcher, *launcher.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            found |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    return found


def until(ready: Callable[[], Any], running: "Future[list[str]] | None" = None) -> None:
    while not ready():
        assert running is None or not running.done(), running.result()
        time.sleep(0.02)


STUCK = """
import os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from vectorclm.runtime.ranks import joined

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with joined() as group:
    Path(sys.argv[1], str(os.getpid())).touch()
    dist.recv(torch.zeros(1), src=1 - group.rank)  # each waits for the other, in a library that knows no signals
"""


@in_turn(0, 3)
def test_ranks_that_hang_in_a_collective_end_when_the_flow_is_killed(tmp_path: Path) -> None:
    ranks, locks = tmp_path / "ranks", tmp_path / "locks"
    ranks.mkdir()
    command = under_torchrun([sys.executable, "-c", STUCK, str(ranks)], 2, 1)
    flow = "from flows.execution.launch import Launcher; from pathlib import Path"
    flow += f"; Launcher(Path({str(locks)!r})).run({command!r}, print)"
    child = subprocess.Popen([sys.executable, "-c", flow], stdout=subprocess.DEVNULL)
    until(lambda: len(list(ranks.iterdir())) == 2 or child.poll() is not None)
    everyone = psutil.Process(child.pid).children(recursive=True)
    assert len(everyone) == 5  # torchrun, two ranks and their watchdogs
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not psutil.wait_procs(everyone, ENDED)[1]


LITTLE_MEMORY = """
import os, resource, sys
import vectorclm.pretrain, vectorclm.runtime.distributed  # with torch, before the limit
from vectorclm.__main__ import main

if os.environ["RANK"] == "1":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


@in_turn(1, 3)
def test_a_rank_out_of_memory_says_so_and_ends_all(inputs: Path) -> None:
    values = json.loads((inputs / "even.json").read_text())
    values["pretrain"] |= {"batch_size": 4096, "phases": [{"tokens": 4096 * 64}]}
    (inputs / "large.json").write_text(json.dumps(values))
    (inputs / "runtime.json").write_text(RUNTIME.model_copy(update={"micro_batch_size": 4096}).model_dump_json())
    try:
        with pytest.raises(OutOfMemoryError, match="lower micro_batch_size \\(it is 4096\\)"):
            run(on_two_ranks(inputs, "large", new_store(inputs, "large"), "pretrain", "-c", LITTLE_MEMORY))
    finally:
        (inputs / "runtime.json").write_text(RUNTIME.model_dump_json())


@in_turn(2, 3)
def test_an_error_of_the_first_rank_is_told_once(inputs: Path) -> None:
    store = Store(str(new_store(inputs, "held")))
    plan = plans(experiment(inputs, "even"))["pretrain"]
    with store.lease(f"{plan.stage}-{plan.fingerprint[:16]}"), pytest.raises(InUseError, match="wait for it"):
        run(on_two_ranks(inputs, "even", Path(store.uri)))


SLOW_TO_TELL = """
import sys, time
from vectorclm import command_line
from vectorclm.__main__ import main

told = command_line.explain
command_line.explain = lambda *values, **names: (time.sleep(3), told(*values, **names))
sys.exit(main(sys.argv[1:]))
"""


def test_other_stages_refuse_several_ranks(inputs: Path) -> None:
    command = on_two_ranks(inputs, "even", inputs / "inputs", "shards", "-c", SLOW_TO_TELL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = done.stdout.splitlines()  # of two ranks that refuse, one tells it, which the other's end does not prevent
    assert json.loads(line)["error"] == {
        "type": "ConfigError",
        "message": "shards runs in one process: start it without torchrun",
    }
