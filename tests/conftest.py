"""Shared by all tests: one thread each, so that tests beside each other do not fight for cores."""

import json
import os
from pathlib import Path

import pytest
import torch

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_text() -> list[str]:
    """A few hundred short documents of real words with digits, punctuation and other scripts."""
    base = "The otter swims by the lake at night, and makes 12 boats. Wer singt im Wald? Ça va, 你好 🙂!\n"
    return [base.replace("otter", name) * 3 for name in ("fox", "bear", "mouse", "owl", "hare") for _ in range(40)]


def write_sample_text(folder: Path, texts: list[str], split: str) -> None:
    """A sample artifact's Parquet file, as the sample stage writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": texts, "id": [str(i) for i in range(len(texts))]})
    pq.write_table(table, folder / f"{split}-00000.parquet")


def read_lines(path: Path) -> list[dict[str, object]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
