"""Trial after trial until the time is over: round after round through all stages, each disturbed once."""

import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
from filelock import FileLock, Timeout

from vectorclm.chaos import shifted_clock
from vectorclm.chaos.disturbances import BY_NAME, KINDS, LONGEST, Disturbance
from vectorclm.chaos.fault_proxy import FaultProxy, fault_proxy
from vectorclm.chaos.place import Place
from vectorclm.chaos.results import add_outcome, read_outcomes
from vectorclm.chaos.shifted_clock import ShiftedClock
from vectorclm.chaos.stage_process import orphans
from vectorclm.chaos.trial import Outcome, run_trial
from vectorclm.errors import ConfigError, InUseError
from vectorclm.settings import digest
from vectorclm.store.artifact import Store
from vectorclm.store.hash_memory import cache_folder

RESULTS = "results.jsonl"
MARGIN = 4.0  # times the undisturbed time of a stage: what a trial of it takes at most, as a rule
START_SECONDS = 10.0


@dataclass(frozen=True)
class Campaign:
    """What is tried where, and for how long."""

    store: Store
    seed: int
    minutes: float
    only: Sequence[str] = ()
    most: int | None = None  # trials of this call
    results: Path | None = None  # kept and added to; None: a file in the work folder, removed at the end
    say: Callable[[str], None] = lambda line: None
    untried: dict[str, str] = field(default_factory=dict)  # kind -> why it cannot be tried here

    @property
    def own(self) -> Store:
        """The folder in the store in which everything happens."""
        return Store(f"{self.store.uri}/vectorclm-chaos-{self.seed}")

    @property
    def folder(self) -> Path:
        """The work folder on this machine."""
        return cache_folder() / "chaos" / f"{digest(self.store.uri)[:12]}-{self.seed}"

    @property
    def store_kind(self) -> str:
        """The kind of the store, in the results."""
        return "local" if self.store.is_local else self.store.uri.partition("://")[0]

    def run(self) -> list[Outcome]:
        """Try until the time is over; return all outcomes of the results file. Leaves nothing in the store.

        Raises ConfigError for an unknown kind, or where none of those wanted can be tried here; StoreError where a
        stage fails undisturbed; InUseError while another process runs the same. After an interruption, the same call
        goes on.
        """
        if unknown := sorted(set(self.only) - set(BY_NAME)):
            raise ConfigError(f"no disturbance {unknown[0]!r}: there are {', '.join(BY_NAME)}")
        deadline = time.monotonic() + 60 * self.minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            orphans(str(self.folder), 0)  # of a call that was killed
            self.store.check_writable()
            file = self.results or self.folder / RESULTS
            outcomes = read_outcomes(file)
            with self._proxied() as proxy:
                clock = None if shifted_clock.problem() else ShiftedClock(self.folder)
                self._go_on(Place(self.own, self.folder, proxy, clock), file, outcomes, deadline)
            self.store.remove(f"vectorclm-chaos-{self.seed}")
            shutil.rmtree(self.folder, ignore_errors=True)
        return outcomes

    def _go_on(self, place: Place, file: Path, outcomes: list[Outcome], deadline: float) -> None:
        kinds = self._kinds(place)
        mine = [each.trial for each in outcomes if (each.store, each.seed) == (self.store_kind, self.seed)]
        number = max(mine, default=-1) + 1
        tried = 0
        while self.most is None or tried < self.most:
            turn, stage = number // len(place.stages), place.stages[number % len(place.stages)]
            if (kind := self._chosen(kinds, stage, number)) is None:
                number += 1
                continue
            needed = MARGIN * place.know(stage).seconds + START_SECONDS + LONGEST.get(kind.name, 0)
            if time.monotonic() + needed > deadline:
                return
            store = Store(f"{self.own.uri}/round-{turn}")
            self._prepare(place, store, stage)
            outcome = run_trial(place, store, stage, kind, (number, self.store_kind, self.seed))
            add_outcome(file, outcome)
            outcomes.append(outcome)
            self.say(in_words(outcome))
            number, tried = number + 1, tried + 1
            if stage == place.stages[-1]:
                self.own.remove(f"round-{turn}")

    def _prepare(self, place: Place, store: Store, stage: str) -> None:
        """Build what the stages before lack, as where an earlier call has removed this round."""
        for before in place.stages[: place.stages.index(stage)]:
            if place.find(before, store) is None:
                place.build(before, store)

    def _kinds(self, place: Place) -> list[Disturbance]:
        wanted = [kind for kind in KINDS if kind.name in self.only or not self.only]
        self.untried.update({kind.name: why for kind in wanted if (why := kind.problem(place))})
        found = [kind for kind in wanted if kind.name not in self.untried]
        if not found:
            raise ConfigError(f"none of these can be tried here: {'; '.join(self.untried.values())}")
        return found

    def _chosen(self, kinds: Sequence[Disturbance], stage: str, number: int) -> Disturbance | None:
        """The kind of a trial, by the seed and the number of the trial; None where none of them suits the stage."""
        fitting = [kind for kind in kinds if not kind.stages or stage in kind.stages]
        if not fitting:
            return None
        chance = random.Random(f"{self.seed}/{number}")
        return chance.choices(fitting, [kind.weight for kind in fitting])[0]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(f"{self.folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InUseError(
                f"another process tries {self.store.uri} with seed {self.seed}: wait for it, or take another --seed"
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _proxied(self) -> Iterator[FaultProxy | None]:
        """A proxy before the endpoint of an S3 store that takes requests through it; else None."""
        if not self.store.is_s3:
            yield None
            return
        with fault_proxy(str(self.store.fs.s3.meta.endpoint_url)) as proxy:
            yield proxy if _answers(self.store, proxy) else None


def _answers(store: Store, proxy: FaultProxy) -> bool:
    """Whether an S3 store can be listed through the proxy: some endpoints know themselves by their host's name only."""
    try:
        through = fsspec.filesystem("s3", endpoint_url=proxy.url, skip_instance_cache=True, use_listings_cache=False)
        through.ls(store.root.partition("/")[0])
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return True


def in_words(outcome: Outcome) -> str:
    """A trial in one line."""
    met = "" if outcome.struck else ", which had ended before"
    end = f"survived, {outcome.seconds:.1f} s" if outcome.survived else f"LOST: {'; '.join(outcome.problems)}"
    return f"{outcome.trial}: {outcome.kind} in {outcome.stage} at {outcome.moment:.1f} s{met}: {end}"


def untried_lines(untried: Mapping[str, str]) -> list[str]:
    """A line for each reason why kinds cannot be tried here."""
    return [
        f"not tried: {', '.join(name for name, why in untried.items() if why == reason)}: {reason}"
        for reason in dict.fromkeys(untried.values())
    ]
