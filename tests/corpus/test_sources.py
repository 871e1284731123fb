"""Settings of sources: what is refused, and what enters a fingerprint."""

import pytest
from pydantic import ValidationError

from tests.corpus.source_files import HUB, source
from vectorclm.corpus.sources import identity


def test_other_builders_of_datasets_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"csv files are not supported: .* parquet or json or text"):
        source(path="csv", data_files="a.csv")
    for path, meant in {"jsonl": "json", ".JSONL": "json", "txt": "text", "Text": "text", "pq": "parquet"}.items():
        with pytest.raises(ValidationError, match=f"did you mean '{meant}'"):
            source(path=path, data_files="a")
    assert source(path="squad").path == "squad"


def test_identity_is_content_for_files_and_the_commit_for_the_hub() -> None:
    there = {"name": "a", "mirror": "m", "data_dir": "d", "data_files": "f", "split": "test"}
    local = source(revision="sha256:1", **there)
    own = {"label": "books", "revision": "sha256:1", "text_column": "text", "weight": 1.0}
    assert identity(local) == {**own, "filter": None, "min_bytes": 1, "max_bytes": 10_000_000}
    hub = identity(source(revision="c" * 40, **there))
    assert "mirror" not in hub
    assert (hub["path"], hub["name"], hub["split"], hub["data_dir"]) == (HUB, "a", "test", "d")
