"""Settings of sources: what is refused, and what enters a fingerprint."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.corpus.source_files import HUB, source
from vectorclm.corpus.decontamination import read_benchmarks
from vectorclm.corpus.sources import CorpusConfig, TaskSource, benchmark_sources, identity
from vectorclm.evaluation.tasks import read_task


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


def test_a_task_of_ones_own_has_columns_that_are_computed_from_the_others(tmp_path: Path) -> None:
    words = "Which of the animals that live beside the river builds a dam of twigs and mud"
    row = {"question": words, "options": ["beaver", "otter"], "key": "A"}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(row) + "\n")
    task = TaskSource(
        label="quiz",
        path="json",
        data_files=str(tmp_path / "quiz.jsonl"),
        columns={
            "context": "question + '?'",
            "choices": "[' ' + options[0], ' ' + options[1]]",
            "answer": "'AB'.find(key)",
        },
    )
    (found,) = read_task(task, None, None)
    assert (found["context"], found["choices"], found["answer"]) == (f"{words}?", [" beaver", " otter"], 0)
    corpus = CorpusConfig(sources=[source()], bytes=1000)
    for texts, labels in (([], {"quiz"}), (["question"], {"quiz"}), (["options"], set())):
        asked = benchmark_sources(corpus, [task.model_copy(update={"texts": texts})])
        marks = read_benchmarks(asked, None, None)
        assert marks.found([f"Then: {words}".encode()]) == ({0: labels} if labels else {})
    plain = task.model_copy(update={"columns": {}, "texts": ["question"]})
    assert plain.text_columns == ("context", "choices", "answer")
