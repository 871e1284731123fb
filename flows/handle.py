"""The handle of a stage that a flow passes on, and the names of the events about it."""

import time
from typing import TypedDict

from vectorclm.store.artifact import Artifact

RESCUED = "Rescued"  # the state that the automation gives to a crashed run
MAX_RESCUES = 2
FELL = "vectorclm.score.fell"  # the event of an evaluation


class Handle(TypedDict):
    """What a stage leaves in Prefect: where its artifact is, and whether it was made now."""

    stage: str
    fingerprint: str
    uri: str
    state: str  # built, reused
    seconds: float


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def stage_handle(name: str, artifact: Artifact, state: str, began: float) -> Handle:
    seconds = round(time.monotonic() - began, 2)
    return Handle(stage=name, fingerprint=artifact.fingerprint, uri=artifact.uri, state=state, seconds=seconds)
