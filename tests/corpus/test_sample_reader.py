"""Reading the documents of a sample."""

from pathlib import Path

import pytest

from vectorclm.corpus.sample_reader import read_texts
from vectorclm.errors import DataError


def test_a_folder_that_is_no_sample_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no train-\*\.parquet"):
        list(read_texts(tmp_path, "train"))
