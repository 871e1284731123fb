"""Two nodes in network namespaces: whatever ends or stops, all ranks end, and the training continues."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import KILLS, one_of, skip_or_fail
from tests.runtime.test_preemption import COUNTED, IN_TIME, STEPS, STUCK, Trained, done, environ, environment, until
from tests.services.nodes import NODES, Nodes, NodesMissingError, two_nodes
from tests.training.test_checkpoint import the_same
from vectorclm.runtime.preemption import ENDED, PREEMPTED, REPEATED

GONE = 60  # seconds after which no process of a training lives that lost a node
SEEDS = range(10 if KILLS >= 10 else 1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    try:
        with two_nodes() as found:
            yield found
    except NodesMissingError as error:
        skip_or_fail(f"{NODES} ({error})")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("nodes"))


class Running:
    """One training on both nodes: a launcher on each, and what the launchers printed."""

    def __init__(self, launchers: Sequence["subprocess.Popen[str]"], steps: Path) -> None:
        self.launchers, self.steps = launchers, steps

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if str(self.steps) in environ(process)]

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        found = {}
        for process in self.processes():
            with suppress(psutil.Error):
                given = process.environ()
                if "--relay" in process.cmdline() and "RANK" in given:
                    found[int(given["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def until(self, steps: int, ranks: int = 2) -> None:
        """Wait until each rank has done so many steps."""
        for launcher in self.launchers:
            until(lambda: len(found := done(self.steps)) == ranks and min(found) >= steps, launcher)

    def end(self, seconds: float) -> list[str]:
        """What each launcher printed, once all processes have ended."""
        began = time.monotonic()
        said = [launcher.communicate(timeout=seconds)[0] for launcher in self.launchers]
        alive = psutil.wait_procs(self.processes(), max(0.0, began + seconds - time.monotonic()))[1]
        assert not alive, alive
        return said


OWN, PLAIN = "flows.execution.ranks", "torch.distributed.run"  # modules that start ranks; the second is torchrun


@contextmanager
def started(
    nodes: Nodes, command: Sequence[str], steps: Path, processes: int = 1, launcher: str = OWN
) -> Iterator[Running]:
    """A training on both nodes; nothing of it survives the block."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment(steps)}
    commands = nodes.torchrun(command, processes, ("-m", launcher))
    launchers = [subprocess.Popen(one, text=True, start_new_session=True, **pipes) for one in commands]  # type: ignore[call-overload]
    running = Running(launchers, steps)
    try:
        yield running
    finally:
        for process in running.processes():
            with suppress(psutil.Error):
                process.kill()
        for launcher in launchers:
            launcher.communicate()


def finish(nodes: Nodes, command: Sequence[str], steps: Path, processes: int = 1) -> None:
    with started(nodes, command, steps, processes) as running:
        said = running.end(180)
        assert [launcher.returncode for launcher in running.launchers] == [0, 0], said


def errors(said: str) -> list[tuple[str, str]]:
    """The errors that a launcher's ranks reported, as type and message."""
    lines = [json.loads(line)["error"] for line in said.splitlines() if line.startswith('{"error"')]
    return [(line["type"], line["message"]) for line in lines]


def reported(said: str, kind: str, *texts: str) -> bool:
    """Whether a launcher's ranks reported an error of this type with these texts."""
    return any(found == kind and all(text in message for text in texts) for found, message in errors(said))


@pytest.mark.parametrize(("launcher", "processes"), one_of([(PLAIN, 1), (OWN, 1), (OWN, 2)]))
def test_all_ranks_end_when_the_cable_between_the_nodes_breaks(
    nodes: Nodes, trained: Trained, tmp_path: Path, launcher: str, processes: int
) -> None:
    """Also a plain torchrun, which would wait for the other node's rendezvous for minutes."""
    store = trained.store(f"cable-{launcher}-{processes}")
    command = trained.command(store, 1, COUNTED, checkpoint_interval=5)
    with started(nodes, command, tmp_path / "cut", processes, launcher) as running:
        running.until(7, 2 * processes)
        try:
            nodes.cable("down")
            said = running.end(GONE)
        finally:
            nodes.cable("up")
    for host, lines in zip(("node-b", "node-a"), said, strict=True):  # each names the other
        assert reported(lines, "RankLostError", f"on {host} cannot be reached", "run the same command again"), lines
    kept = trained.kept(store)
    assert kept >= 5
    finish(nodes, command, tmp_path / "resumed", processes)
    assert (store / "pretrain" / trained.fingerprint / "manifest.json").exists()
    assert done(tmp_path / "resumed") == [STEPS - kept] * 2 * processes


def test_a_stopped_rank_is_named_and_all_ranks_end(nodes: Nodes, trained: Trained, tmp_path: Path) -> None:
    """Also the stopped rank, although no other rank on its node can end it."""
    store = trained.store("stopped")
    with started(nodes, trained.command(store, 1, COUNTED, hang_seconds=3), tmp_path / "steps") as running:
        running.until(3)
        _, rank = running.ranks()
        host = rank.environ()["TEST_NODE"]
        rank.send_signal(signal.SIGSTOP)
        said = running.end(GONE)
        texts = f"rank 1 on {host}", "in 3 s (hang_seconds)"
        assert all(reported(lines, "RankLostError", *texts) for lines in said), said


CELLS = [(("launcher-a", "launcher-b", "rank", "everyone")[seed % 4], 1 + seed % 2, seed) for seed in SEEDS]


@pytest.mark.parametrize(("target", "processes", "seed"), CELLS)
def test_sigterm_on_one_node_ends_both_after_the_same_step(
    nodes: Nodes, trained: Trained, tmp_path: Path, target: str, processes: int, seed: int
) -> None:
    moments = random.Random(f"nodes {target} {seed}")
    store, steps, last = trained.store(f"{target}-{seed}"), tmp_path / "steps", moments.randrange(3, STEPS - 5)
    command = trained.command(store, 1, COUNTED)
    with started(nodes, command, steps, processes) as running:
        running.until(last, 2 * processes)
        ranks = running.ranks()
        launchers = [psutil.Process(launcher.pid) for launcher in running.launchers]
        one = {"launcher-a": launchers[:1], "launcher-b": launchers[1:], "rank": ranks[-1:]}
        time.sleep(moments.random() * 0.02)  # anywhere in the step
        for process in one.get(target, [*launchers, *ranks]):
            process.send_signal(signal.SIGTERM)
        said = running.end(IN_TIME + 2)  # torchrun ends after its ranks
        assert all(launcher.returncode in (PREEMPTED, ENDED) for launcher in running.launchers), said
    counts, kept = done(steps), trained.kept(store)
    assert counts == [counts[0]] * 2 * processes, "all ranks stop after the same step"
    assert counts[0] - 1 <= kept <= counts[0], f"{counts[0] - kept} steps are lost"
    assert all(reported(lines, "PreemptedError", f"checkpoint at step {kept}") for lines in said), said
    assert not list((store / "leases").iterdir())
    if len(SEEDS) == 1:
        return
    finish(nodes, command, tmp_path / "resumed", processes)
    whole = trained.folder / f"whole-nodes-{processes}"
    if not whole.exists():
        finish(nodes, trained.command(trained.store(whole.name), 1), tmp_path / "whole", processes)
    the_same(whole / "pretrain" / trained.fingerprint, store / "pretrain" / trained.fingerprint)


def test_a_second_sigterm_ends_a_node_at_once_and_with_it_the_other(
    nodes: Nodes, trained: Trained, tmp_path: Path
) -> None:
    store = trained.store("stuck")
    with started(nodes, trained.command(store, 1, STUCK), tmp_path / "steps") as running:
        running.until(1)
        began = time.monotonic()
        while running.launchers[1].poll() is None:
            running.launchers[1].send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                running.launchers[1].wait(1.2 * REPEATED)
        assert time.monotonic() - began < IN_TIME
        running.end(2 * IN_TIME)


APART = "import os, sys\nsys.argv = [word.replace('apart', 'apart-' + os.environ['TEST_NODE']) for word in sys.argv]\n"


def test_a_store_that_the_nodes_do_not_share_is_refused_before_work(
    nodes: Nodes, trained: Trained, tmp_path: Path
) -> None:
    for name in ("apart", "apart-node-a", "apart-node-b"):
        trained.store(name)
    store = trained.folder / "apart"
    for name in ("apart-node-a", "apart-node-b"):
        (trained.folder / name / "runtime.json").write_text(json.dumps({"device": "cpu", "threads": 1}))
    command = trained.command(store, 1, APART + COUNTED)
    with started(nodes, command, tmp_path / "steps") as running:
        said = running.end(GONE)
    assert any(launcher.returncode == 2 for launcher in running.launchers)
    text = r"(rank 1 on \S+: )?(\S+) does not see in its store \S+/apart-\2 what (\S+) writes in \S+/apart-\3: give all"
    found = [{message for kind, message in errors(lines) if kind == "ConfigError"} for lines in said]
    assert any(found), said  # a node whose peer has ended already may say that alone
    assert all(len(one) <= 1 and all(re.match(text, message) for message in one) for one in found), said
    assert not done(tmp_path / "steps") and not list(trained.folder.glob("apart*/**/*probe*"))


def test_processes_that_a_cluster_starts_without_torchrun_are_refused(trained: Trained) -> None:
    store = trained.store("without-torchrun")
    alone = {**environment(store / "steps"), "SLURM_STEP_NUM_TASKS": "2"}
    done = subprocess.run(trained.command(store, 1), env=alone, capture_output=True, text=True, check=False)
    ((kind, message),) = errors(done.stdout)
    assert kind == "ConfigError" and done.returncode == 2
    host = os.uname().nodename
    assert message.startswith(f"srun started 2 processes, of which one is on {host}, without torchrun: start one")
