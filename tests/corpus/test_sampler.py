"""The sample: the same bytes for the same content, and every dropped document counted."""

import hashlib
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

from tests.conftest import one_of
from tests.corpus.source_files import documents, source, write_parquet
from vectorclm.corpus import candidates, sample_writer
from vectorclm.corpus.decontamination import Benchmarks
from vectorclm.corpus.sample_reader import read_texts
from vectorclm.corpus.sampler import write_sample
from vectorclm.corpus.source_reader import SourceRoots, open_source
from vectorclm.corpus.sources import CorpusConfig
from vectorclm.corpus.summary import summary_lines
from vectorclm.errors import DataError
from vectorclm.runtime.workers import open_workers


def sample(out: Path, data: Path | None, seed: int = 1, **values: Any) -> dict[str, Any]:
    """The summary of a sample of one source, `books`, written to `out`."""
    settings = {"sources": [source()], "bytes": 10**6, "validation_share": 0.2, **values}
    return write_sample(CorpusConfig.model_validate(settings), seed, out, SourceRoots(data))


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_sample_takes_its_share_and_holds_documents_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", documents(500))
    write_parquet(tmp_path / "papers" / "a.parquet", documents(500, "paper"))
    sources = [source(weight=3.0), source(label="papers", path="owner/papers", weight=1.0)]
    summary = sample(tmp_path / "out", tmp_path, sources=sources, bytes=4000)
    books, papers = summary["sources"]["books"], summary["sources"]["papers"]
    assert 3000 <= books["bytes"] + books["validation_bytes"] < 3020
    assert 1000 <= papers["bytes"] + papers["validation_bytes"] < 1020
    assert not books["exhausted"]
    train = list(read_texts(tmp_path / "out" / "books", "train"))
    held_out = list(read_texts(tmp_path / "out" / "books", "validation"))
    assert (len(train), len(held_out)) == (books["documents"], books["validation_documents"])
    assert sum(len(text.encode()) for text in train) == books["bytes"]
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) < set(documents(500))
    assert 0.1 < len(held_out) / (len(train) + len(held_out)) < 0.3
    assert summary["bytes"] == books["bytes"] + papers["bytes"]


def test_a_document_is_on_the_same_side_in_every_sample(tmp_path: Path) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", documents(300))
    sample(tmp_path / "small", tmp_path, bytes=1500)
    sample(tmp_path / "large", tmp_path)
    held_out = set(read_texts(tmp_path / "large" / "books", "validation"))
    assert set(read_texts(tmp_path / "small" / "books", "validation")) <= held_out


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    texts = [*documents(50), *documents(20), "", " \n\t", None]
    write_parquet(tmp_path / "books" / "a.parquet", texts)
    (tmp_path / "papers").mkdir()
    rows = [{"text": text} for text in [*documents(30), *documents(40, "paper"), 7, "\ud800 half a pair"]]
    (tmp_path / "papers" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = sample(tmp_path / "out", tmp_path, sources=[source(), source(label="papers", path="owner/papers")])
    books, papers = summary["sources"]["books"], summary["sources"]["papers"]
    assert books["dropped"] == {"duplicate": 20, "empty": 2, "not_text": 1}
    assert papers["dropped"] == {"duplicate": 30, "invalid_utf8": 1, "not_text": 1}
    assert books["documents"] + books["validation_documents"] == 50
    assert papers["documents"] + papers["validation_documents"] == 40
    assert books["exhausted"] and papers["exhausted"]


def test_a_source_must_give_both_sides(tmp_path: Path) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", [*documents(5), None])
    with pytest.raises(DataError, match=r"yields 5 documents for training and 0 .*1 not text.*validation_share"):
        sample(tmp_path / "out", tmp_path, validation_share=1e-9)
    write_parquet(tmp_path / "books" / "a.parquet", ["", None])
    with pytest.raises(DataError, match=r"yields 0 documents .*1 empty, 1 not text.*training needs"):
        sample(tmp_path / "empty", tmp_path)


def test_a_file_that_breaks_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    lines = "".join(json.dumps({"text": hashlib.sha256(bytes([n % 256])).hexdigest() * n}) + "\n" for n in range(400))
    packed = zstandard.compress(lines.encode())
    (folder / "a.jsonl.zst").write_bytes(packed[: len(packed) - 50])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.zst.*download it again"):
        sample(tmp_path / "out", tmp_path)


def test_the_same_content_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    for part in range(3):
        write_parquet(tmp_path / "a" / "books" / f"train-{part}.parquet", documents(100, f"part {part}"))
    names = ["zeta-train.parquet", "train-1-of-7.parquet", "alpha_train.parquet"]
    for part, name in enumerate(names):
        write_parquet(tmp_path / "b" / "moved" / name, documents(100, f"part {part}"))
    settings = {"bytes": 2000}
    first = sample(tmp_path / "first", tmp_path / "a", **settings)
    again = sample(tmp_path / "again", tmp_path / "a", **settings)
    moved = sample(tmp_path / "moved", tmp_path / "b", sources=[source(mirror="moved")], **settings)
    assert first == again == moved
    assert tree(tmp_path / "first") == tree(tmp_path / "again") == tree(tmp_path / "moved")
    sample(tmp_path / "seed", tmp_path / "a", seed=2, **settings)
    assert tree(tmp_path / "seed") != tree(tmp_path / "first")


def test_files_rotate_and_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", documents(400))
    sample(tmp_path / "one", tmp_path)
    monkeypatch.setattr(sample_writer, "FILE_BYTES", 1500)
    monkeypatch.setattr(sample_writer, "GROUP_DOCUMENTS", 20)
    sample(tmp_path / "many", tmp_path)
    files = sorted(path.name for path in (tmp_path / "many" / "books").glob("train-*"))
    assert files == [f"train-{number:05d}.parquet" for number in range(len(files))] and len(files) > 2
    many, one = (list(read_texts(tmp_path / name / "books", "train")) for name in ("many", "one"))
    assert many == one
    file = pq.ParquetFile(tmp_path / "many" / "books" / files[0])
    assert file.schema_arrow.names == ["text", "id"]
    assert file.metadata.row_group(0).num_rows == 20
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_ids_are_hashes_of_the_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", documents(50))
    sample(tmp_path / "out", tmp_path)
    rows = pq.read_table(tmp_path / "out" / "books" / "train-00000.parquet").to_pylist()
    assert all(row["id"] == xxhash.xxh3_128_hexdigest(row["text"].encode()) for row in rows)


def test_bad_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    bad = [b"caf\xe9", b"a\0b", "\u00a0 \u2003\n".encode(), b"x" * 50_000_000]
    texts = [text.encode() for text in documents(40)] + bad
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(texts))]
    column = pa.Array.from_buffers(pa.string(), len(texts), buffers)  # bytes that call themselves a string
    (tmp_path / "books").mkdir()
    pq.write_table(pa.table({"text": column}), tmp_path / "books" / "a.parquet")
    kept = sample(tmp_path / "out", tmp_path)["sources"]["books"]
    assert kept["dropped"] == {"empty": 1, "invalid_utf8": 1, "nul": 1, "too_long": 1}
    assert kept["read"] == 44 and kept["documents"] + kept["validation_documents"] == 40
    long = sample(tmp_path / "long", tmp_path, sources=[source(max_bytes=10**8, min_bytes=11)], bytes=10**8)
    assert long["sources"]["books"]["dropped"] == {"empty": 1, "invalid_utf8": 1, "nul": 1, "too_short": 6}
    split = "train" if long["bytes"] > 50_000_000 else "validation"
    assert max(map(len, read_texts(tmp_path / "long" / "books", split))) == 50_000_000


def test_bytes_that_are_not_utf8_cost_their_line_of_json_alone(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    lines = [json.dumps({"text": text}).encode() for text in documents(30)]
    (tmp_path / "books" / "a.jsonl").write_bytes(b"\n".join([*lines[:9], b'{"text": "caf\xe9"}', *lines[9:]]))
    kept = sample(tmp_path / "out", tmp_path)["sources"]["books"]
    assert kept["dropped"] == {"invalid_utf8": 1} and kept["documents"] + kept["validation_documents"] == 30
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl"):
        list(open_source(source(), tmp_path, None, ["text"]))


def test_equal_ids_of_a_source_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    pq.write_table(pa.table({"id": ["same"] * 30, "text": documents(30)}), tmp_path / "books" / "a.parquet")
    kept = sample(tmp_path / "out", tmp_path)["sources"]["books"]
    assert kept["dropped"] == {} and kept["documents"] + kept["validation_documents"] == 30


def test_the_sample_depends_on_the_texts_alone_not_on_their_files(tmp_path: Path) -> None:
    texts = documents(600)
    for part in range(3):
        write_parquet(tmp_path / "a" / "books" / f"train-{part}.parquet", texts[part::3])
    write_parquet(tmp_path / "b" / "books" / "one.parquet", texts[::-1])
    first = sample(tmp_path / "first", tmp_path / "a", bytes=2000)
    assert first == sample(tmp_path / "again", tmp_path / "b", bytes=2000)
    assert tree(tmp_path / "first") == tree(tmp_path / "again")
    assert list(read_texts(tmp_path / "first" / "books", "train")) != sorted(
        read_texts(tmp_path / "first" / "books", "train")
    )


def test_what_is_forgotten_on_the_way_would_not_have_been_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source forty times its share, with duplicates, and with those of a source before it."""
    texts = documents(3000)
    write_parquet(tmp_path / "books" / "a.parquet", texts[:500])
    write_parquet(tmp_path / "papers" / "a.parquet", [*texts, *texts[::2], *texts[::3]])
    both = {"sources": [source(), source(label="papers", path="owner/papers")], "bytes": 2000}
    first = sample(tmp_path / "first", tmp_path, **both)
    monkeypatch.setattr(candidates.Reserve, "_forget", lambda self: None)
    assert first == sample(tmp_path / "second", tmp_path, **both)
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    assert first["sources"]["papers"]["dropped"]["duplicate"] > 0
    found = Counter(
        text
        for label in ("books", "papers")
        for split in ("train", "validation")
        for text in read_texts(tmp_path / "first" / label, split)
    )
    assert max(found.values()) == 1


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    text = "The otter swims by the lake at night. " * 130
    write_parquet(tmp_path / "a" / "books" / "a.parquet", [f"{n} {text}" for n in range(500)])
    write_parquet(tmp_path / "b" / "books" / "a.parquet", [f"{n} {text}" for n in range(5000)])
    peaks = []
    for name in ("a", "b"):
        tracemalloc.start()
        sample(tmp_path / f"out {name}", tmp_path / name, bytes=200_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 12_000_000  # 25 MB of text, a batch of 1,000 documents at a time


def test_rows_are_filtered_by_their_columns(tmp_path: Path) -> None:
    rows = [{"text": f"page {n}", "score": n % 5, "language": "en" if n % 2 else "de"} for n in range(100)]
    rows += [{"text": "unscored", "score": None, "language": "en"}]
    (tmp_path / "books").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "books" / "a.parquet")
    (tmp_path / "lines" / "books").mkdir(parents=True)
    (tmp_path / "lines" / "books" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [source(filter="score >= 3 and language == 'en'")]
    kept = sample(tmp_path / "out", tmp_path, sources=asked)
    assert kept["sources"]["books"]["dropped"] == {"filter": 81}
    assert kept == sample(tmp_path / "again", tmp_path / "lines", sources=asked)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    texts = {text for split in ("train", "validation") for text in read_texts(tmp_path / "out" / "books", split)}
    assert texts == {row["text"] for row in rows[:100] if row["score"] >= 3 and row["language"] == "en"}
    with pytest.raises(DataError, match=r"no column 'quality'; it has text, score, language"):
        sample(tmp_path / "none", tmp_path, sources=[source(filter="quality > 1")])
    with pytest.raises(DataError, match=r"a\.parquet: the filter .* does not fit the columns' types"):
        sample(tmp_path / "types", tmp_path, sources=[source(filter="score > 'high'")])


def test_the_sample_reads_as_one_data_set(tmp_path: Path) -> None:
    write_parquet(tmp_path / "books" / "a.parquet", documents(200))
    write_parquet(tmp_path / "papers" / "a.parquet", documents(200, "paper"))
    both = [source(), source(label="papers", path="owner/papers")]
    made = sample(tmp_path / "out", tmp_path, sources=both)
    table = pyarrow.dataset.dataset(
        sorted(map(str, (tmp_path / "out").glob("*/train-*.parquet"))),
        partitioning=["source"],
        partition_base_dir=str(tmp_path / "out"),
    ).to_table()
    counts = Counter(table["source"].to_pylist())
    assert counts == {label: drawn["documents"] for label, drawn in made["sources"].items()}
    assert len(set(table["id"].to_pylist())) == made["documents"]


def test_documents_of_a_benchmark_are_dropped_and_others_take_their_place(tmp_path: Path) -> None:
    question = "In which year did the otters of the long river move to the quiet lake behind the old mill?"
    texts = documents(300)
    spoilt = [f"{text}. {question.upper()} Nobody knows." if n % 10 == 0 else text for n, text in enumerate(texts)]
    write_parquet(tmp_path / "books" / "a.parquet", spoilt)
    config = CorpusConfig.model_validate({"sources": [source()], "bytes": 10**6, "validation_share": 0.2})
    marks = Benchmarks({"quiz": [question], "other": ["something of eight words or more stands in here"]})
    made = write_sample(config, 1, tmp_path / "out", SourceRoots(tmp_path), benchmarks=marks)["sources"]["books"]
    assert made["dropped"] == {"contaminated": 30} and made["contaminated"] == {"quiz": 30}
    assert made["documents"] + made["validation_documents"] == 270
    assert summary_lines({"sources": {"books": made}}) == [
        "sample books: 270 of 300 documents drawn; dropped: 30 contaminated (quiz 30)"
    ]
    less = config.model_copy(update={"bytes": 2000})
    made = write_sample(less, 1, tmp_path / "less", SourceRoots(tmp_path), benchmarks=marks)["sources"]["books"]
    assert 2000 <= made["bytes"] + made["validation_bytes"] < 2020 and not made["exhausted"]
    write_parquet(tmp_path / "books" / "a.parquet", [f"{text}. {question}" for text in texts])
    with pytest.raises(DataError, match=r"most of it is in the benchmarks .*quiz"):
        write_sample(less, 1, tmp_path / "all", SourceRoots(tmp_path), benchmarks=marks)


def test_real_text_is_sampled_from_a_mirror(tmp_path: Path) -> None:
    """On the mirror that VECTORCLM_DATA names, else on generated text laid out the same way."""
    if "VECTORCLM_DATA" in os.environ:
        data = Path(os.environ["VECTORCLM_DATA"])
    else:
        data = tmp_path / "mirror"
        for part in range(2):
            texts = [text * 200 for text in documents(150, f"tale {part}")]
            name = f"train-0000{part}-of-00002.parquet"
            write_parquet(data / "pretrain" / "cosmopedia-like" / "stories" / name, texts)
    asked = source(name="stories", mirror="pretrain/cosmopedia-like/stories")
    summary = sample(tmp_path / "out", data, sources=[asked], bytes=500_000)["sources"]["books"]
    assert summary["bytes"] + summary["validation_bytes"] >= 500_000
    found = Counter(read_texts(tmp_path / "out" / "books", "train"))
    assert len(found) == summary["documents"] and max(found.values()) == 1


@pytest.mark.parametrize("workers", one_of([2, 4]))
def test_the_number_of_workers_changes_no_byte_of_a_sample(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several files with repetitions in and across sources, of which the budget takes a part, without benchmarks."""
    monkeypatch.setattr(sample_writer, "FILE_BYTES", 4000)
    monkeypatch.setattr(sample_writer, "GROUP_DOCUMENTS", 20)
    question = "In which year did the otters of the long river move to the quiet lake behind the old mill?"
    for number in range(5):
        texts = [*documents(300, f"book {number % 4}"), f"{number}. {question}", "\0"]
        write_parquet(tmp_path / "books" / f"{number}.parquet", texts)
        write_parquet(tmp_path / "papers" / f"{number}.parquet", [*documents(80, f"book {number}"), *documents(9, "x")])
    asked = {"sources": [source(weight=3.0), source(label="papers", path="owner/papers")], "bytes": 24_000}
    config = CorpusConfig.model_validate({**asked, "validation_share": 0.2})
    marks, found = Benchmarks({"quiz": [question]}), []
    for count in (1, workers):
        out, finished = tmp_path / str(count), list[Path]()
        with open_workers(count):
            made = write_sample(config, 1, out, SourceRoots(tmp_path), benchmarks=marks, finished=finished.append)
        assert sorted(finished) == sorted(path for path in out.rglob("*") if path.is_file())
        found.append((made, tree(out)))
    assert found[0] == found[1]
    books, papers = (found[0][0]["sources"][label] for label in ("books", "papers"))
    assert books["dropped"]["nul"] == 5 and papers["dropped"]["duplicate"] > 8 and len(found[0][1]) > 6
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
