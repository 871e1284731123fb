"""Sources of the corpus tests: a Parquet file, its documents, and the settings that name it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vectorclm.corpus.sources import TextSource

HUB = "owner/books"


def write_parquet(path: Path, texts: list[Any], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": list(range(len(texts))), column: texts}), path)
    return path


def source(**values: Any) -> TextSource:
    return TextSource.model_validate({"label": "books", "path": HUB, "weight": 1.0, **values})


def documents(count: int, word: str = "page") -> list[str]:
    return [f"{word} {number:04d} " + "x" * (number % 7) for number in range(count)]
