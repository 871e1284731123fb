"""A manifest leads nowhere but to artifacts of its store."""

import json
from typing import Any

import pytest

from vectorclm.errors import CorruptArtifactError
from vectorclm.store.manifest import read_manifest, sealed

FILE = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "inputs",
    [
        {"../outside": "0" * 64},
        {"shards": "../../outside"},
        {"shards": "0" * 63},
        {"shards": f"{'0' * 64}\n"},
        {"sh/ards": "0" * 64},
        {"": "0" * 64},
        {"shards": None},
        {"shards": {"a": 1}},
        ["shards"],
        "shards",
    ],
)
def test_inputs_that_are_no_artifacts_make_a_manifest_invalid(inputs: Any) -> None:
    for data in (
        json.dumps({"files": {"a": FILE}, "inputs": inputs}).encode(),
        sealed({"files": {}, "inputs": inputs}),
    ):
        with pytest.raises(CorruptArtifactError, match="not a valid manifest"):
            read_manifest(data, "store/pretrain/0")


def test_a_manifest_with_inputs_or_without_is_read() -> None:
    for manifest in ({"files": {"a": FILE}, "inputs": {"chat_shards": "0" * 64}}, {"files": {"a": FILE}}):
        assert read_manifest(sealed(manifest), "store/pretrain/0")["files"] == {"a": FILE}
