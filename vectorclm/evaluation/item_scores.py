"""What each item of an evaluation scored: kept beside its scores, so that two models compare on the same items."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vectorclm.evaluation.statistics import Scored, ratio

ITEMS, TEXTS = "items.parquet", "texts.parquet"
ITEMS_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("part", pa.string()),  # of a task that is several, which
        ("number", pa.int32()),  # its place in the task
        ("item", pa.string()),  # by its content, whatever the model
        ("correct", pa.bool_()),
        ("correct_norm", pa.bool_()),  # null where the task has no such score
        ("log_likelihoods", pa.list_(pa.float64())),  # nats, one for each choice; none of words, null of an instruction
        ("answer", pa.string()),  # what the model wrote, where it was to write
        ("contaminated", pa.bool_()),  # whether training repeats it; null where that was not looked for
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


class ItemScores:
    """The items of one evaluation, gathered while it runs."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.contents: list[list[str]] = []  # of each of these, all its texts
        self.texts: list[dict[str, Any]] = []
        self._texts_of: Counter[str] = Counter()

    def add_question(
        self,
        task: str,
        number: int,
        content: bytes,
        right: tuple[bool, bool | None],
        log_likelihoods: Sequence[float] | None,
        *,
        texts: Iterable[str],
        part: str | None = "",
        answer: str | None = None,
    ) -> None:
        """A question of a task; `right` is by the log-likelihoods or the answer, and by them over choices' lengths.

        `log_likelihoods` is empty of a benchmark that is answered in words, and None of instructions, whose score is no
        accuracy.
        """
        self.contents.append(list(texts))
        row = {"task": task, "part": part, "number": number, "item": item_id(content), "answer": answer}
        likelihoods = None if log_likelihoods is None else list(log_likelihoods)
        scored = {"correct": right[0], "correct_norm": right[1], "log_likelihoods": likelihoods}
        self.items.append({**row, **scored})

    def add_text(self, source: str, content: bytes, nats: float, size: int) -> None:
        """A document or window of a source, and how many bytes of text it stands for."""
        number = self._texts_of[source]
        self._texts_of[source] += 1
        self.texts.append({"source": source, "number": number, "item": item_id(content), "nats": nats, "bytes": size})

    def text_scores(self, source: str, unit: str) -> dict[str, float]:
        """Bits per byte over all texts of a source, its standard error, and how much was scored, in units so called."""
        rows = [row for row in self.texts if row["source"] == source]
        sizes = [row["bytes"] for row in rows]
        value, stderr = ratio([row["nats"] / math.log(2) for row in rows], sizes)
        return {"bits_per_byte": value, "stderr": stderr, unit: len(rows), "bytes": sum(sizes)}

    def mark(self, contaminated: Sequence[bool]) -> dict[str, dict[str, Any]]:
        """Keep which questions training repeats; by task, how many (`contaminated`) and `acc` on the others.

        `acc_clean` is left out where no other is there.
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
        """Write `items.parquet` and `texts.parquet`, each also where it has no rows."""
        pq.write_table(pa.Table.from_pylist(self.items, ITEMS_SCHEMA), out / ITEMS, compression="zstd")
        pq.write_table(pa.Table.from_pylist(self.texts, TEXTS_SCHEMA), out / TEXTS, compression="zstd")


def item_id(content: bytes) -> str:
    """An item by its content: the first 16 digits of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_scored(folder: Path) -> dict[str, Scored]:
    """The scores in an evaluation's files: `acc.<task>`, `acc_norm.<task>`, `bits_per_byte.<source>`.

    Instructions, which have no list of log-likelihoods, have one score, which has its task's name.
    """
    found = {}
    for task, rows in _groups(folder / ITEMS, "task").items():
        ones = np.ones(len(rows["item"]))
        if rows["log_likelihoods"][0] is None:
            found[task] = Scored(rows["item"], np.array(rows["correct"], float), ones)
            continue
        for name, column in (("acc", "correct"), ("acc_norm", "correct_norm")):
            if None not in rows[column]:
                found[f"{name}.{task}"] = Scored(rows["item"], np.array(rows[column], float), ones)
    for source, rows in _groups(folder / TEXTS, "source").items():
        bits = np.array(rows["nats"]) / math.log(2)
        found[f"bits_per_byte.{source}"] = Scored(rows["item"], bits, np.array(rows["bytes"], float))
    return found


def _groups(path: Path, column: str) -> dict[str, dict[str, list[Any]]]:
    """The rows of a file as columns, by the value of one of them, in the file's order."""
    table = pq.read_table(path)
    names = table[column].to_numpy(zero_copy_only=False)
    return {name: table.filter(pa.array(names == name)).to_pydict() for name in dict.fromkeys(names)}


def write_scores(out: Path, scores: Mapping[str, Any], found: ItemScores) -> None:
    """Write `scores.json`, and what each item scored as Parquet."""
    found.write(out)
    (out / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
