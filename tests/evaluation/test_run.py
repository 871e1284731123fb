"""The scores of a model are the same bytes, whoever computes them."""

from pathlib import Path

import pytest

from tests.conftest import one_of, write_random_model, write_sample_text
from tests.shards.test_writer import contents
from tests.test_curriculum import mini
from tests.test_model import CONFIG
from vectorclm.evaluation.run import SampleDocuments, ScoringData, score_model
from vectorclm.evaluation.tasks import TaskSetup
from vectorclm.inference.load import load_model
from vectorclm.runtime.devices import Runtime


@pytest.mark.parametrize("workers", one_of([2, 4]))
def test_the_number_of_workers_changes_no_byte_of_scores(workers: int, tiny_text: list[str], tmp_path: Path) -> None:
    """Of documents, multiple choice, instructions and answers."""
    folder = write_random_model(tmp_path, tiny_text, CONFIG, 20_000, chat=False)
    write_sample_text(tmp_path / "sample" / "a", tiny_text[:9], "validation")
    questions = mini().evaluate.model_copy(update={"instructions": 6, "max_new_tokens": 8})
    text = SampleDocuments(tmp_path / "sample", ["a"], 7)  # type: ignore[arg-type]
    data, found = ScoringData(TaskSetup(1, world=mini().world), text, None), []
    for count in (1, workers):
        out, runtime = tmp_path / str(count), Runtime(device="cpu", threads=1, data_workers=count)
        out.mkdir()
        loaded = load_model(folder, runtime.configure_torch(), chat=False)
        found.append((score_model(loaded, questions, data, runtime, out, "evaluate"), contents(out)))
    assert found[0] == found[1]
    assert len(found[0][1]) == 4 and found[0][0]["tasks"] and found[0][0]["text"]["a"]["documents"] == 7
