"""`vectorclm bench workers`: each stage that is built in slices, by two processes against one, in turns.

Wall-clock seconds of a whole stage count, with the start of the processes. The texts of a mirror are repeated, each
copy with a number of its own, so that no copy is a duplicate.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vectorclm.bench.table import Row, compared
from vectorclm.config import ExperimentConfig, changed, load_experiment
from vectorclm.errors import ConfigError
from vectorclm.evaluation.run import SampleDocuments, ScoringData, score_model
from vectorclm.evaluation.tasks import TaskSetup
from vectorclm.export.hugging_face import write_model_files
from vectorclm.inference.load import load_model
from vectorclm.lineage.pinning import pin
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store

PROCESSES = 2
COPIES = 8  # of the mirror's texts
SCORED = 300  # held-out documents of each source
SLICED = ("sample", "shards", "chat_shards")


def stages_over_workers(rounds: int, data: Path | None, copies: int = COPIES, scored: int = SCORED) -> Iterator[Row]:
    """A row for each stage: megabytes of input, or of scored text, a second. Raises ConfigError without a mirror."""
    if data is None:
        raise ConfigError("bench workers repeats the texts of a mirror: name it by --data")
    with temporary_folder("bench-") as folder:
        experiment = _repeated(data, folder, copies)
        store = Store(str(folder / "store"))
        for stage in ("sample", "tokenizer", *SLICED[1:]):
            run_stage(stage, experiment, store, Runtime(data_workers=PROCESSES), folder)
        sizes = {stage: _size(experiment, store, stage, folder) for stage in SLICED}
        for stage in SLICED:
            yield _row(stage, sizes[stage], rounds, partial(_build, stage, experiment, store, folder))
        size, score = _scoring(experiment, store, folder, scored)
        yield _row("evaluate", size, rounds, score)


def _row(stage: str, size: int, rounds: int, build: Callable[[int], object]) -> Row:
    speeds: dict[int, list[float]] = {PROCESSES: [], 1: []}
    for _ in range(rounds):
        for processes, found in speeds.items():
            began = time.monotonic()
            build(processes)
            found.append(size / 1e6 / (time.monotonic() - began))
    name = f"{stage} by {PROCESSES} processes against one"
    return compared(name, speeds[PROCESSES], speeds[1], "MB/s", ask=1.7, most=False)


def _build(stage: str, experiment: ExperimentConfig, store: Store, data: Path, processes: int) -> None:
    """Build a stage in a store that has its inputs alone."""
    with temporary_folder("bench-") as folder:
        for name in plans(experiment)[stage].inputs:
            (folder / name).symlink_to(Path(store.uri, name))
        run_stage(stage, experiment, Store(str(folder)), Runtime(data_workers=processes, threads=1), data)


def _size(experiment: ExperimentConfig, store: Store, stage: str, data: Path) -> int:
    """Bytes of the texts that a stage reads."""
    sources = experiment.chat.sources if stage == "chat_shards" and experiment.chat else experiment.sample.sources
    return sum(pq.read_table(path).nbytes for one in sources for path in (data / str(one.mirror)).glob("*.parquet"))


def _scoring(
    experiment: ExperimentConfig, store: Store, folder: Path, scored: int
) -> tuple[int, Callable[[int], object]]:
    """Held-out text for an untrained model of the experiment's shape: its bytes, and a function that scores it."""
    torch.manual_seed(1)
    CausalLM(experiment.model).save_pretrained(folder / "model")
    specs = plans(experiment)
    tokenizer = store.find("tokenizer", specs["tokenizer"].fingerprint)
    sample = store.find("sample", specs["sample"].fingerprint)
    assert tokenizer is not None and sample is not None
    write_model_files(tokenizer.local(), experiment.model.max_position_embeddings, chat=False, out=folder / "model")
    labels = [source.label for source in experiment.sample.sources]
    data = ScoringData(TaskSetup(experiment.seed), SampleDocuments(sample, labels, scored), None)
    questions = experiment.evaluate.model_copy(update={"tasks": [], "instructions": 0, "prompts": []})

    def score(processes: int) -> Mapping[str, Any]:
        runtime = Runtime(data_workers=processes, threads=1, device="cpu")
        out = folder / "scores"
        out.mkdir(exist_ok=True)
        loaded = load_model(folder / "model", runtime.configure_torch(), chat=False)
        return score_model(loaded, questions, data, runtime, out, "bench")

    size = sum(int(text["bytes"]) for text in score(1)["text"].values())
    return size, score


def _repeated(data: Path, folder: Path, copies: int) -> ExperimentConfig:
    """The experiment `small` without benchmarks, on a mirror in `folder` with copies of its texts."""
    experiment, path = load_experiment("small")
    assert experiment.chat is not None
    size = 0
    for source in experiment.sample.sources:
        size += _copy(data, folder, str(source.mirror), source.text_column, copies)
    for chat in experiment.chat.sources:
        _copy(data, folder, str(chat.mirror), chat.column, copies)
    chats = [
        source.model_copy(update={"conversations": copies * source.conversations}) for source in experiment.chat.sources
    ]
    experiment = experiment.model_copy(update={"chat": experiment.chat.model_copy(update={"sources": chats})})
    experiment = changed(experiment, {"sample.bytes": size, "sample.validation_share": 0.05, "evaluate.tasks": []})
    return pin(experiment, folder / path.name, folder, resolve=True)[0]


def _copy(data: Path, folder: Path, mirror: str, column: str, copies: int) -> int:
    """Copy the training files of a source so many times. Returns the bytes of all texts."""
    (folder / mirror).mkdir(parents=True)
    size = 0
    for path in sorted((data / mirror).glob("train-*.parquet")):
        table = pq.read_table(path, columns=[column])
        rows = table[column].to_pylist()
        for number in range(copies):
            fresh = pa.array([_numbered(row, number) for row in rows], table.schema.field(column).type)
            size += fresh.nbytes
            pq.write_table(pa.table({column: fresh}), folder / mirror / f"train-{number:03d}-{path.name}")
    return size


def _numbered(row: Any, number: int) -> Any:
    """A text, or the first turn of a conversation, that begins with a number."""
    if isinstance(row, str):
        return f"{number} {row}"
    key = "content" if "content" in row[0] else "value"
    return [{**row[0], key: f"{number} {row[0][key]}"}, *row[1:]]
