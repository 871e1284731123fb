"""One trial: a stage is started, disturbed, started again by the same command, and compared."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from vectorclm.chaos.disturbances import Disturbance, Strike
from vectorclm.chaos.place import LIMIT_SECONDS, Place, ended_or_killed
from vectorclm.chaos.small_experiment import CHECKPOINT_STEPS
from vectorclm.chaos.stage_process import StageProcess, orphans
from vectorclm.store.artifact import Store

TRIES = 3  # of the same command after a disturbance
LATE_SHARE = 0.75  # of the moments that are chosen from the time in which the stage works, and not from all its time
MOST_STEPS = 2 * CHECKPOINT_STEPS  # recomputed: those since the checkpoint before one that is just being written


@dataclass(frozen=True)
class Outcome:
    """What came of one trial."""

    trial: int
    store: str  # local or s3
    seed: int
    kind: str
    stage: str
    moment: float  # seconds after the start of the stage
    struck: bool  # False: the stage had ended before the disturbance met it
    problems: tuple[str, ...]
    recomputed: int | None  # steps of a training that were done twice
    seconds: float  # from the disturbance, or the end that it caused, until the work was again where it had been

    @property
    def survived(self) -> bool:
        """Whether nothing was lost."""
        return not self.problems


def moment_of(place: Place, stage: str, kind: Disturbance, chance: random.Random) -> float:
    """A random moment of a stage, in seconds from the start of its process."""
    known = place.know(stage)
    late = chance.random() < LATE_SHARE or kind.after_begin
    return chance.uniform(known.begins if late else 0.0, known.seconds)


def run_trial(place: Place, store: Store, stage: str, kind: Disturbance, identity: tuple[int, str, int]) -> Outcome:
    """Disturb one stage of a store whose inputs are there; `identity` is number, kind of store and seed."""
    number, _, seed = identity
    chance = random.Random(f"{seed}/{number}/{stage}/{kind.name}")
    moment = moment_of(place, stage, kind, chance)
    environment = _environment(place, kind)
    first = place.start(stage, store, environment, kind.prefix(store), kind.runtime)
    processes = [first]

    def again() -> StageProcess:
        processes.append(place.start(stage, store, environment, runtime=kind.runtime))
        return processes[-1]

    try:
        _sleep_until(first, moment, after_begin=kind.after_begin)
        struck_at, before = time.monotonic(), first.done
        strike = Strike(place, store, stage, first, chance, again=again, struck=first.is_alive())
        if strike.struck:
            kind.strike(strike)
        else:
            place.know_faster(stage, first)
        problems = [*strike.problems, *_finish(processes, again)]
        problems += place.lost(stage, store)
    finally:
        for process in processes:
            process.end()
    problems += [f"left an orphan: {line}" for line in orphans(place.mark)]
    if len(processes) > 1 and processes[1].began > first.ended:  # it ended by the disturbance, perhaps later
        struck_at, before = first.ended, first.done
    recomputed = _recomputed(place, stage, processes, before)
    if recomputed is not None and recomputed > MOST_STEPS:
        problems.append(f"{recomputed} steps were done twice, with a checkpoint every {CHECKPOINT_STEPS}")
    seconds = max(0.0, _regained(stage, processes, before, struck_at) - struck_at)
    return Outcome(
        *identity, kind.name, stage, round(moment, 2), strike.struck, tuple(problems), recomputed, round(seconds, 2)
    )


def _environment(place: Place, kind: Disturbance) -> dict[str, str]:
    if kind.by_proxy and place.proxy is not None:
        return {"AWS_ENDPOINT_URL": place.proxy.url, "AWS_ENDPOINT_URL_S3": place.proxy.url}
    return place.clock.environment if kind.by_clock and place.clock is not None else {}


def _sleep_until(process: StageProcess, moment: float, *, after_begin: bool) -> None:
    while process.is_alive():
        if time.monotonic() - process.began >= moment and (process.ticks or not after_begin):
            return
        time.sleep(0.002)


def _finish(processes: list[StageProcess], again: Callable[[], StageProcess]) -> list[str]:
    """Repeat the same command until it succeeds; returns what was wrong."""
    ended = ended_or_killed(processes[-1], LIMIT_SECONDS)
    for _ in range(TRIES):
        if ended is not None and ended.code == 0:
            return []
        ended = ended_or_killed(again(), LIMIT_SECONDS)
    if ended is not None and ended.code == 0:
        return []
    return [f"the same command fails {TRIES} times: {'it hangs' if ended is None else ended.in_words}"]


def _recomputed(place: Place, stage: str, processes: list[StageProcess], before: int) -> int | None:
    """Steps of a training that its next process repeated; None for another stage, or where no process followed."""
    units = place.know(stage).units_per_step
    if not units or len(processes) == 1:
        return None
    ticks = [tick for _, tick in processes[1].ticks]
    if not ticks:  # the artifact was there already
        return 0
    resumed = next((tick.done for tick in ticks if tick.resumed), 0)
    return max(0, round((before - resumed) / units))


def _regained(stage: str, processes: list[StageProcess], before: int, struck_at: float) -> float:
    """When the work was again where it had been at the disturbance."""
    first, *later = processes
    found = [when for when, tick in first.ticks if when > struck_at and tick.done > before and tick.stage == stage]
    for process in later:
        found += [when for when, tick in process.ticks if tick.stage == stage and tick.done >= before][:1]
    return min(found) if found else processes[-1].ended
