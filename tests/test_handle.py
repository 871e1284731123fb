"""What a stage tells its flow: the address of its artifact, and its time in words."""

import time

import pytest

from flows.handle import duration, stage_handle
from vectorclm.store.artifact import Artifact, Store


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (60, "1 min 00 s"),
        (185.4, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (7859, "2 h 10 min"),
    ],
)
def test_a_time_is_told_in_its_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_handle_names_its_artifact_and_the_time_since_the_stage_began() -> None:
    store = Store("memory://handles")
    artifact = Artifact(store, "sample", "a" * 64, {"stage": "sample"})
    handle = stage_handle("sample", artifact, "built", time.monotonic() - 2)
    assert handle["uri"] == store.uri_of(f"sample/{'a' * 64}") == artifact.uri
    assert (handle["stage"], handle["fingerprint"], handle["state"]) == ("sample", "a" * 64, "built")
    assert 2 <= handle["seconds"] < 60 and handle["seconds"] == round(handle["seconds"], 2)
