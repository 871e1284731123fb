"""Estimate what an experiment reads, how often, and how long each stage takes on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from vectorclm.config import ExperimentConfig
from vectorclm.corpus.file_formats import PARQUET, format_of
from vectorclm.corpus.lines import COMPRESSED_SUFFIXES
from vectorclm.corpus.sources import TextSource, is_remote, local_files
from vectorclm.draft.speed import training_speed
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import stages_of

BYTES_PER_TOKEN = ((600, 2.0), (1500, 2.6), (3000, 3.1), (6000, 3.5), (12_000, 3.9), (70_000, 4.2))  # by vocabulary
UNPACKED = 3.0  # bytes of text for each compressed byte
SAMPLED, MERGED, ENCODED = 20e6, 1.5e6, 3e6  # bytes per second of the stages that prepare the text
RENDERED = 1500.0  # conversations per second
STARTED = 6.0  # seconds until a process with torch works
VALIDATED = 1.1  # a training with its validations, against its steps alone
FORWARD = 3.0  # tokens that are scored in the time of one that is trained
WRITTEN = 0.0006  # seconds for each token of an answer and each layer


@dataclass(frozen=True)
class Estimate:
    """Bytes of text by source (None = unknown before it is read), passes over the text, and seconds by stage."""

    available: Mapping[str, int | None]
    drawn: int
    epochs: float
    speed: float
    seconds: Mapping[str, float]


def estimate(experiment: ExperimentConfig, data: Path | None, runtime: Runtime) -> Estimate:
    """Estimate an experiment by the sizes of its files and a few seconds of training steps; nothing is downloaded."""
    model, shards, pretrain = experiment.model, experiment.shards, experiment.pretrain
    speed = training_speed(model, shards.sequence_length, pretrain.batch_size, runtime)
    available = {source.label: text_bytes(source, data) for source in experiment.sample.sources}
    drawn = _drawn(experiment, available)
    per_token = next(figure for vocabulary, figure in BYTES_PER_TOKEN if model.vocab_size <= vocabulary)
    whole = sum(size if size is not None else drawn for size in available.values())
    held_out = drawn * experiment.sample.validation_share / per_token
    questions = experiment.evaluate
    scored = STARTED + held_out / (FORWARD * speed)
    answers = len(questions.prompts) + questions.instructions
    spoken = WRITTEN * model.num_hidden_layers * questions.max_new_tokens
    seconds = {
        "sample": 1 + whole / SAMPLED,
        "tokenizer": 1 + min(drawn, experiment.tokenizer.bytes) / MERGED,
        "shards": 1 + drawn / ENCODED,
        "pretrain": STARTED + VALIDATED * pretrain.tokens / speed,
        "evaluate_base": scored + answers * spoken,
        "export": 1.0,
    }
    if (chat := experiment.chat) is not None and experiment.finetune is not None:
        count = sum(source.conversations for source in chat.sources)
        tokens = experiment.finetune.epochs * (chat.tokens or count * min(chat.sequence_length, 300) * 0.7)
        seconds["chat_shards"] = 1 + count / RENDERED
        seconds["finetune"] = STARTED + VALIDATED * tokens / (1 - experiment.replay) / speed
        seconds["evaluate"] = scored + (answers + questions.chat_prompts) * spoken
    ordered: dict[str, float] = {stage.name: seconds.get(stage.name, 1.0) for stage in stages_of(experiment)}
    epochs = pretrain.tokens * per_token / max(1.0, drawn * (1 - experiment.sample.validation_share))
    return Estimate(available, drawn, epochs, speed, ordered)


def _drawn(experiment: ExperimentConfig, available: Mapping[str, int | None]) -> int:
    """The bytes that are drawn: each source's share of `sample.bytes`, or all that it has."""
    total = sum(source.weight for source in experiment.sample.sources)
    drawn = 0.0
    for source in experiment.sample.sources:
        share = experiment.sample.bytes * source.weight / total
        size = available[source.label]
        drawn += share if size is None else min(share, size)
    return round(drawn)


def text_bytes(source: TextSource, data: Path | None) -> int | None:
    """The bytes of text in a source's files, about; None for a hub repository and the generated world."""
    if source.is_generated or is_remote(source, data):
        return None
    return sum(_file_bytes(path, source.text_column) for path in local_files(source, data))


def _file_bytes(path: Path, column: str) -> int:
    if format_of(path) is not PARQUET:
        return int(path.stat().st_size * (UNPACKED if path.name.endswith(COMPRESSED_SUFFIXES) else 1))
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        return sum(part.total_uncompressed_size for part in columns if part.path_in_schema.split(".")[0] == column)
