"""The handle that a stage returns to its flow, the errors of a stage, and the names of Prefect's states and events."""

import time
from typing import TypedDict

from vectorclm.errors import VectorCLMError
from vectorclm.store.artifact import Artifact

RESCUED = "Rescued"  # the state that an automation sets on a crashed run
QUEUED = "Queued"  # the state of a run that waits for another
SKIPPED = "Skipped"  # the state of a run whose place a newer run of its schedule takes
DRY_RUN = "DryRun"  # the state in which a dry run ends
MAX_RESCUES = 2
CURRICULA = "curricula"  # the work queue of the pool cpu in which curricula wait for each other
# Events of which the operator is notified; the payload of each has a `title`, a `text` and `links`.
FELL = "vectorclm.score.fell"
RUN_FAILED = "vectorclm.run.failed"
RUN_RECOVERED = "vectorclm.run.recovered"
MISSED = "vectorclm.run.missed"  # a scheduled run that no worker took
DISK_FULL = "vectorclm.disk.full"
DISK_RECOVERED = "vectorclm.disk.recovered"
SENT_AGAIN = "vectorclm.message.sent-again"  # a copy of an event below whose message was not delivered
NOTIFIED = (FELL, RUN_FAILED, RUN_RECOVERED, MISSED, DISK_FULL, DISK_RECOVERED)


class Handle(TypedDict):
    """The result of a stage in Prefect: the address of its artifact, and whether it was built or reused."""

    stage: str
    fingerprint: str
    uri: str
    state: str  # built, reused
    seconds: float


class StageFailedError(VectorCLMError):
    """A stage failed; the message says why and what to do."""


class StageInterruptedError(StageFailedError):
    """A stage was ended from outside, killed or after a checkpoint: another attempt continues where it stopped."""


class StageCancelledError(StageFailedError):
    """A stage was ended because its curriculum ends."""


def duration(seconds: float) -> str:
    """A duration in seconds as text: `4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def stage_handle(name: str, artifact: Artifact, state: str, began: float) -> Handle:
    """The handle of an artifact; `began` is the monotonic time at which its stage started."""
    seconds = round(time.monotonic() - began, 2)
    return Handle(stage=name, fingerprint=artifact.fingerprint, uri=artifact.uri, state=state, seconds=seconds)
