"""The kinds of disturbances: what is done to a stage at a random moment, and what must follow at once."""

import random
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import psutil

from vectorclm.chaos import shifted_clock
from vectorclm.chaos.fault_proxy import Fault
from vectorclm.chaos.place import LIMIT_SECONDS, Place, ended_or_killed
from vectorclm.chaos.stage_process import Ended, StageProcess
from vectorclm.store.artifact import Store

TERM_SECONDS = 10.0  # in which SIGTERM must end a stage
TERM_CODES = (0, 75, 143, -15)
FILE_BYTES = 4096  # of the largest file that can be written where there is no room
DAY = 86_400
OUTAGE_SECONDS = 20.0
ELSEWHERE = "vectorclm-elsewhere"  # the host name of an imitated machine
NAMESPACE = ("unshare", "--user", "--map-root-user")
LONGEST = {"stop": 120.0, "outage": 60.0}  # seconds that a kind takes beside the work


@dataclass
class Strike:
    """One disturbance: the process that meets it, and what was wrong so far."""

    place: Place
    store: Store
    stage: str
    process: StageProcess
    chance: random.Random
    problems: list[str] = field(default_factory=list)
    again: Callable[[], StageProcess] | None = None  # starts the same command once more
    struck: bool = True  # False: the stage had ended before

    def wait(self, seconds: float = LIMIT_SECONDS) -> Ended | None:
        """Wait for the end of the process; a process that hangs is killed, and is a problem."""
        if (ended := ended_or_killed(self.process, seconds)) is None:
            self.problems.append(f"still runs {seconds:.0f} s after that")
        return ended

    def wait_for_a_clear_end(self) -> None:
        """Wait for success, or for an error in one line."""
        ended = self.wait()
        if ended is not None and not ended.is_clear:
            self.problems.append(f"no clear message: {ended.in_words}")


@dataclass(frozen=True)
class Disturbance:
    """A kind of disturbance."""

    name: str
    about: str
    strike: Callable[[Strike], None]
    weight: int = 1
    problem: Callable[[Place], str] = lambda place: ""  # why it cannot be tried in this place
    stages: Sequence[str] = ()  # that it is tried in; empty: all
    runtime: str = "runtime"
    namespaces: tuple[str, ...] = ()  # of the process, beside a user namespace
    enter: Callable[[Store], str] = lambda store: ":"  # what a shell does there before the process
    after_begin: bool = False  # only while the stage reports progress
    by_proxy: bool = False
    by_clock: bool = False

    def prefix(self, store: Store) -> list[str]:
        """What starts the process in its namespaces."""
        if not self.namespaces:
            return []
        return [*NAMESPACE, *self.namespaces, "sh", "-c", f'{self.enter(store)} && exec "$0" "$@"']


def kill(strike: Strike) -> None:
    """SIGKILL to the stage's process alone."""
    strike.process.send(signal.SIGKILL)
    strike.wait(TERM_SECONDS)


def kill_group(strike: Strike) -> None:
    """SIGKILL to every process of the stage's group at once."""
    strike.process.send(signal.SIGKILL, group=True)
    strike.wait(TERM_SECONDS)


def kill_worker(strike: Strike) -> None:
    """SIGKILL to one worker process, as soon as there is one; the stage ends with a clear message, or goes on."""
    while strike.process.is_alive():
        if workers := strike.process.workers():
            strike.chance.choice(workers).kill()
            return strike.wait_for_a_clear_end()
        time.sleep(0.01)
    strike.struck = False
    return None


def term(strike: Strike) -> None:
    """SIGTERM, which must end the stage within 10 s."""
    strike.process.send(signal.SIGTERM)
    ended = strike.wait(TERM_SECONDS)
    if ended is not None and ended.code not in TERM_CODES:
        strike.problems.append(f"SIGTERM ended it with {ended.in_words}")


def stop(strike: Strike) -> None:
    """SIGSTOP until a successor, on another machine by its host name, has waited out the lease; then SIGCONT."""
    strike.process.send(signal.SIGSTOP, group=True)
    assert strike.again is not None
    successor = strike.again()
    ended = ended_or_killed(successor, LIMIT_SECONDS)
    if ended is None or (ended.code != 0 and not ended.is_clear):
        strike.problems.append(f"its successor: {'hangs' if ended is None else ended.in_words}")
    before = strike.place.lost(strike.stage, strike.store)
    strike.process.send(signal.SIGCONT, group=True)
    strike.wait_for_a_clear_end()
    if ended is not None and ended.code == 0 and (after := strike.place.lost(strike.stage, strike.store)) != before:
        strike.problems.append(f"the continued process changed its successor's artifact: {'; '.join(after)}")


def _limit(strike: Strike, kind: int, value: Callable[[psutil.Process], int]) -> None:
    """Lower a limit of the stage's processes."""
    try:
        leader = psutil.Process(strike.process.pid)
        for process in (leader, *leader.children(recursive=True)):
            _, hard = process.rlimit(kind)
            process.rlimit(kind, (value(process), hard))
    except psutil.Error:
        strike.struck = False


def no_room(strike: Strike) -> None:
    """No file may grow beyond 4 kB, as on a full disk."""
    _limit(strike, resource.RLIMIT_FSIZE, lambda process: FILE_BYTES)
    strike.wait_for_a_clear_end()


def no_descriptors(strike: Strike) -> None:
    """No further file can be opened."""
    _limit(strike, resource.RLIMIT_NOFILE, lambda process: process.num_fds())
    strike.wait_for_a_clear_end()


def read_only(strike: Strike) -> None:
    """The store's folder is remounted read-only under the stage; it has a mount of its own for that."""
    inside = ["nsenter", "--target", str(strike.process.pid), "--user", "--preserve-credentials", "--mount"]
    command = [*inside, "mount", "-o", "remount,ro,bind", strike.store.root]
    strike.struck = False
    while strike.process.is_alive() and not strike.struck:  # refused while a file is open for writing
        strike.struck = subprocess.run(command, capture_output=True, check=False).returncode == 0
    strike.wait_for_a_clear_end()


def _storage_fault(fault: Fault, least: float, most: float) -> Callable[[Strike], None]:
    def strike_store(strike: Strike) -> None:
        proxy = strike.place.proxy
        assert proxy is not None
        proxy.inject(fault, strike.chance.randrange(2**32))
        until = time.monotonic() + strike.chance.uniform(least, most)
        while strike.process.is_alive() and time.monotonic() < until:
            time.sleep(0.05)
        proxy.mend()
        strike.struck = proxy.spoiled > 0
        strike.wait_for_a_clear_end()

    return strike_store


def shift_clock(strike: Strike) -> None:
    """The clock of the stage's processes is set a day ahead or back, and set right when the stage has ended."""
    clock = strike.place.clock
    assert clock is not None
    clock.set(strike.chance.choice((-DAY, DAY)))
    try:
        strike.wait_for_a_clear_end()
    finally:
        clock.set(0)


@cache
def _namespaces_problem(*kinds: str) -> str:
    try:
        done = subprocess.run([*NAMESPACE, *kinds, "true"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "no namespaces here: install util-linux"
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


def _read_only_problem(place: Place) -> str:
    return _namespaces_problem("--mount") if place.store.is_local else "needs a local store"


def _clock_problem(place: Place) -> str:
    return "" if place.clock is not None else shifted_clock.problem()


def _proxy_problem(place: Place) -> str:
    return "" if place.proxy is not None else "needs an S3 store whose endpoint takes requests through a proxy"


def _linux(place: Place) -> str:
    return "" if hasattr(psutil.Process, "rlimit") else "limits of another process are set on Linux only"


def _bound(store: Store) -> str:
    root = shlex.quote(store.root)
    return f"mkdir -p {root} && mount --bind {root} {root}"


KINDS = (
    Disturbance("kill", "SIGKILL of the process", kill, 6),
    Disturbance("kill group", "SIGKILL of all its processes", kill_group, 3),
    Disturbance(
        "kill worker",
        "SIGKILL of a worker process",
        kill_worker,
        3,
        stages=("shards", "pretrain", "finetune"),
        runtime="workers",
    ),
    Disturbance("term", "SIGTERM", term, 3),
    Disturbance(
        "stop",
        "SIGSTOP beyond the lease, SIGCONT",
        stop,
        1,
        problem=lambda place: _namespaces_problem("--uts"),
        namespaces=("--uts",),
        enter=lambda store: f"hostname {ELSEWHERE}",
    ),
    Disturbance("no room", "no room for files", no_room, 2, problem=_linux),
    Disturbance("no descriptors", "no file descriptors", no_descriptors, 1, problem=_linux, after_begin=True),
    Disturbance(
        "read-only",
        "store remounted read-only",
        read_only,
        2,
        problem=_read_only_problem,
        namespaces=("--mount",),
        enter=_bound,
    ),
    Disturbance("clock", "clock set by a day", shift_clock, 2, problem=_clock_problem, by_clock=True),
    Disturbance(
        "errors", "store answers 500 and 503", _storage_fault("errors", 3, 8), 2, _proxy_problem, by_proxy=True
    ),
    Disturbance("cuts", "store cuts connections", _storage_fault("cuts", 3, 8), 2, _proxy_problem, by_proxy=True),
    Disturbance("slow", "store answers late", _storage_fault("slow", 3, 8), 1, _proxy_problem, by_proxy=True),
    Disturbance(
        "outage",
        "store away for 20 s",
        _storage_fault("outage", OUTAGE_SECONDS, OUTAGE_SECONDS),
        1,
        _proxy_problem,
        by_proxy=True,
    ),
)
BY_NAME = {kind.name: kind for kind in KINDS}
