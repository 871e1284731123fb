"""Scores of each item of an evaluation as Parquet files, so that two models compare on the same items."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vectorclm.evaluation.statistics import Scored, ratio
from vectorclm.formats.parquet import read_small_table

ITEMS, TEXTS = "items.parquet", "texts.parquet"
ITEMS_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("part", pa.string()),  # the task of a group
        ("number", pa.int32()),  # place in the task
        ("item", pa.string()),  # id by content, whatever the model
        ("correct", pa.bool_()),
        ("correct_norm", pa.bool_()),  # null where the task has no such score
        (
            "log_likelihoods",
            pa.list_(pa.float64()),
        ),  # nats of each choice; empty where the answer is text, null of an instruction
        ("answer", pa.string()),  # what the model wrote, where the answer is text
        ("contaminated", pa.bool_()),  # whether the training text repeats the item; null where unknown
    ]
)
TEXTS_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("number", pa.int32()),
        ("item", pa.string()),  # a document, or a window of tokens
        ("nats", pa.float64()),
        ("bytes", pa.int64()),
    ]
)


class ItemScore(NamedTuple):
    """What a model scores on one question."""

    content: bytes  # identifies the question, whatever the model
    correct: bool  # by the log-likelihoods of the choices, or by the answer
    correct_norm: bool | None  # by the log-likelihoods per character; None where the task has no such score
    log_likelihoods: Sequence[float] | None  # empty where the model answers in words; None of instructions
    texts: Iterable[str] = ()  # of the question, to look for in the training text
    answer: str | None = None  # what the model wrote


class ItemScores:
    """The scores of an evaluation's items, collected while the evaluation runs."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.contents: list[list[str]] = []  # the texts of each item
        self.texts: list[dict[str, Any]] = []
        self._texts_of: Counter[str] = Counter()

    def add_question(self, task: str, number: int, score: ItemScore, *, part: str | None = "") -> None:
        """Add the score of a question; `number` is the question's place in the task, `part` its task of a group."""
        self.contents.append(list(score.texts))
        row = {"task": task, "part": part, "number": number, "item": item_id(score.content), "answer": score.answer}
        likelihoods = None if score.log_likelihoods is None else list(score.log_likelihoods)
        scored = {"correct": score.correct, "correct_norm": score.correct_norm, "log_likelihoods": likelihoods}
        self.items.append({**row, **scored})

    def add_text(self, source: str, content: bytes, nats: float, size: int) -> None:
        """Add the score of a document or window, which stands for `size` bytes of text."""
        number = self._texts_of[source]
        self._texts_of[source] += 1
        self.texts.append({"source": source, "number": number, "item": item_id(content), "nats": nats, "bytes": size})

    def text_scores(self, source: str, unit: str) -> dict[str, float]:
        """Bits per byte over all texts of a source, the standard error, the count of texts (as `unit`) and bytes."""
        rows = [row for row in self.texts if row["source"] == source]
        sizes = [row["bytes"] for row in rows]
        value, stderr = ratio([row["nats"] / math.log(2) for row in rows], sizes)
        return {"bits_per_byte": value, "stderr": stderr, unit: len(rows), "bytes": sum(sizes)}

    def mark(self, contaminated: Sequence[bool]) -> dict[str, dict[str, Any]]:
        """Record which questions the training text repeats.

        Returns for each task the number of them (`contaminated`), and the accuracy on the others (`acc_clean`), which
        is left out where there are no others.
        """
        clean: dict[str, list[bool]] = {row["task"]: [] for row in self.items}
        counts: Counter[str] = Counter()
        for row, repeated in zip(self.items, contaminated, strict=True):
            row["contaminated"] = bool(repeated)
            if repeated:
                counts[row["task"]] += 1
            else:
                clean[row["task"]].append(row["correct"])
        return {
            task: {"contaminated": counts[task], **({"acc_clean": sum(right) / len(right)} if right else {})}
            for task, right in clean.items()
        }

    def write(self, out: Path) -> None:
        """Write `items.parquet` and `texts.parquet`; a file without rows is written, too."""
        pq.write_table(pa.Table.from_pylist(self.items, ITEMS_SCHEMA), out / ITEMS, compression="zstd")
        pq.write_table(pa.Table.from_pylist(self.texts, TEXTS_SCHEMA), out / TEXTS, compression="zstd")


def item_id(content: bytes) -> str:
    """The id of an item: the first 16 digits of the SHA-256 of its content."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_scored(folder: Path) -> dict[str, Scored]:
    """Read the scores of an evaluation item by item: `acc.<task>`, `acc_norm.<task>`, `bits_per_byte.<source>`.

    Instructions have no log-likelihoods, and one score, under the name of the task.
    """
    found = {}
    for task, rows in _groups(folder / ITEMS, ITEMS_SCHEMA, ("task", "item", "correct")).items():
        ones = np.ones(len(rows["item"]))
        if rows.get("log_likelihoods", [None])[0] is None:
            found[task] = Scored(rows["item"], np.array(rows["correct"], float), ones)
            continue
        for name, column in (("acc", "correct"), ("acc_norm", "correct_norm")):
            if None not in rows.get(column, [None]):
                found[f"{name}.{task}"] = Scored(rows["item"], np.array(rows[column], float), ones)
    for source, rows in _groups(folder / TEXTS, TEXTS_SCHEMA, ("source", "item", "nats", "bytes")).items():
        bits = np.array(rows["nats"]) / math.log(2)
        found[f"bits_per_byte.{source}"] = Scored(rows["item"], bits, np.array(rows["bytes"], float))
    return found


def _groups(path: Path, schema: pa.Schema, filled: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The rows of a file as columns, grouped by the value of the first column, in the order of the file.

    Raises DataError where the file has columns of other types, or an empty place in the columns `filled`.
    """
    table = read_small_table(path, schema, filled, str(path))
    names = table[filled[0]]
    return {name: table.filter(pc.equal(names, name)).to_pydict() for name in names.unique().to_pylist()}


def write_scores(out: Path, scores: Mapping[str, Any], found: ItemScores) -> None:
    """Write `scores.json`, and the scores of each item as Parquet."""
    found.write(out)
    (out / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
