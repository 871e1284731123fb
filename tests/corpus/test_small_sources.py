"""Sources with too few documents: the message names the setting and the value that work, and these do work."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vectorclm.corpus.sampler import write_sample
from vectorclm.corpus.source_reader import SourceRoots
from vectorclm.corpus.sources import CorpusConfig, TextSource
from vectorclm.errors import DataError


def drawn(folder: Path, texts: list[str | None], **changes: Any) -> dict[str, Any]:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = TextSource(label="own", path="json", data_files=str(path), weight=1.0)
    config = CorpusConfig(sources=[source], **{"bytes": 1_000_000, "validation_share": 0.001, **changes})
    (out := folder / f"out{len(list(folder.iterdir()))}").mkdir()
    return write_sample(config, 1, out / "sample", SourceRoots())


def refused(folder: Path, texts: list[str | None], **changes: Any) -> str:
    with pytest.raises(DataError) as error:
        drawn(folder, texts, **changes)
    return str(error.value)


@pytest.mark.parametrize("count", [3, 10, 60])
def test_the_share_that_is_named_holds_out_a_document(count: int, tmp_path: Path) -> None:
    texts: list[str | None] = [f"The otter number {number} swims." for number in range(count)]
    said = refused(tmp_path, texts)
    (share,) = re.findall(r"the source has no more, so set sample\.validation_share \(0\.001\) to (\S+) at least", said)
    assert drawn(tmp_path, texts, validation_share=float(share))["sources"]["own"]["validation_documents"] == 1
    below = float(share) - 2e-6
    assert "validation needs at least one" in refused(tmp_path, texts, validation_share=below)


def test_the_bytes_that_are_named_suffice(tmp_path: Path) -> None:
    texts: list[str | None] = [f"The otter number {number} swims in the lake." for number in range(5000)]
    said = refused(tmp_path, texts, bytes=300, validation_share=0.02)
    (size,) = re.findall(r"raise sample\.bytes \(300\) to ([\d,]+)", said)
    found = drawn(tmp_path, texts, bytes=int(size.replace(",", "")), validation_share=0.02)
    assert found["sources"]["own"]["validation_documents"] >= 1


def test_other_causes_are_named_instead_of_a_budget(tmp_path: Path) -> None:
    for texts, cause in (
        ([None] * 20, "dropped: 20 not text); training needs at least one: no row of column 'text' is a document"),
        (["A story."], "training and validation need different documents: split it into more files, rows or parts"),
    ):
        said = refused(tmp_path, list(texts))
        assert cause in said and "sample.bytes" not in said


def test_a_filter_that_no_row_passes_reads_parquet_to_its_end(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"The otter number {number} swims.", "score": number} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet", row_group_size=500)
    source = TextSource(label="own", path=str(tmp_path / "own.parquet"), weight=1.0, filter="score >= 2900")
    config = CorpusConfig(sources=[source], bytes=1_000_000, validation_share=0.1)
    found = write_sample(config, 1, tmp_path / "sample", SourceRoots())["sources"]["own"]
    assert found["documents"] + found["validation_documents"] == 100 and found["dropped"] == {"filter": 2900}
