"""`small` on a mirror: nothing of a document is lost, doubled or changed on its way into the windows.

On the text at VECTORCLM_DATA where that is set, else on generated text in the same schemas.
"""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.corpus.sample_reader import read_texts
from vectorclm.dataset import position_ids
from vectorclm.evaluation.harness_tasks import build_tasks
from vectorclm.evaluation.tasks import read_task
from vectorclm.lineage.pinning import check_sources, pin
from vectorclm.runtime.devices import Runtime
from vectorclm.settings import validate
from vectorclm.shards.config import SPLITS
from vectorclm.shards.writer import read_windows
from vectorclm.stages import run_stage
from vectorclm.store.artifact import Store
from vectorclm.tokenizer import BOS_ID, EOS_ID, IM_END_ID, IM_START_ID, PAD_ID, load_tokenizer

Made = dict[str, Path]


@pytest.fixture(scope="module")
def experiment(mirror: Path) -> ExperimentConfig:
    """`small`, pinned to the mirror, with less text and a vocabulary that generated text can fill."""
    small, path = load_experiment("small")
    values = small.model_dump()
    values["sample"] |= {"bytes": 600_000, "validation_share": 0.2}
    values["tokenizer"] |= {"vocab_size": 512, "bytes": 300_000}
    values["model"]["vocab_size"] = 512
    for source in values["chat"]["sources"]:
        source["conversations"] = 100
    pinned, notes = pin(validate(ExperimentConfig, values, "test"), path, mirror, resolve=False)
    assert notes == []
    check_sources(pinned, mirror, hub=False)
    return pinned


@pytest.fixture(scope="module")
def made(experiment: ExperimentConfig, mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    store = Store(str(tmp_path_factory.mktemp("store")))
    stages = ("sample", "tokenizer", "shards", "chat_shards")
    return {stage: run_stage(stage, experiment, store, Runtime(), mirror)[0].local() for stage in stages}


def test_every_document_decodes_to_itself(made: Made) -> None:
    tokenizer = load_tokenizer(made["tokenizer"])
    texts = [text for label in sorted(made["sample"].glob("*/")) for text in read_texts(label, "train")]
    assert len(texts) > 50
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert min(ids, default=5) >= 5  # nothing in a document becomes a special token


def test_the_windows_are_the_documents_whole_where_they_fit(made: Made, experiment: ExperimentConfig) -> None:
    tokenizer, length = load_tokenizer(made["tokenizer"]), experiment.shards.sequence_length
    for label in sorted(path for path in made["sample"].iterdir() if path.is_dir()):
        for split in SPLITS:
            short: Counter[tuple[int, ...]] = Counter()
            tokens: Counter[int] = Counter()
            for text in read_texts(label, split):
                ids = (BOS_ID, *tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID)
                tokens.update(ids)
                short.update([ids] if len(ids) <= length else [])
            found: Counter[tuple[int, ...]] = Counter()
            for shard in read_windows(made["shards"] / label.name, split):
                bounds = position_ids(shard.input_ids.astype(np.int64)) == 0
                parts = np.split(shard.input_ids.reshape(-1), np.flatnonzero(bounds)[1:])
                found.update(tuple(part.tolist()) for part in parts if part[0] != PAD_ID)
            assert short <= found
            assert tokens == Counter(i for part in found.elements() for i in part)


def test_hardly_anything_is_padding(made: Made) -> None:
    """On real text, of which there is enough for it; generated documents are all about as long as each other."""
    if "VECTORCLM_DATA" not in os.environ:
        pytest.skip("VECTORCLM_DATA names no folder of real text")
    for label, counts in json.loads((made["shards"] / "manifest.json").read_text())["summary"].items():
        train = counts["train"]
        assert train["padding_tokens"] <= 512 + 0.001 * train["tokens"], label
        assert train["dropped_tokens"] == train["documents_split_that_fit"] == 0


def test_no_document_is_in_both_splits_or_twice(made: Made) -> None:
    for label in made["sample"].glob("*/"):
        texts = Counter(text for split in SPLITS for text in read_texts(label, split))
        assert max(texts.values()) == 1, label.name


def test_all_three_chat_schemas_are_learnt_from(made: Made, experiment: ExperimentConfig) -> None:
    counts = json.loads((made["chat_shards"] / "manifest.json").read_text())["summary"]["sources"]
    assert all(counts[source.label]["train"] > 20 for source in experiment.chat.sources), counts
    for window in read_windows(made["chat_shards"] / "chat", "train"):
        assert window.supervised is not None
        ends = window.supervised.astype(bool) & (window.input_ids == IM_END_ID)
        assert ends.any() and not window.supervised[window.input_ids == IM_START_ID].any()
        assert 0.05 < window.supervised.mean() < 0.98


def test_every_benchmark_reads_as_questions(experiment: ExperimentConfig, mirror: Path) -> None:
    choices = {"hellaswag": {4}, "arc_easy": {3, 4, 5}, "piqa": {2}, "blimp": {2}}
    for task in experiment.evaluate.tasks:
        for name, asked in build_tasks(task, read_task(task, mirror, None)).items():
            assert len(asked.eval_docs), name
            for doc in asked.eval_docs.select(range(min(100, len(asked.eval_docs)))):
                found = asked.doc_to_choice(doc)
                assert len(found) in choices[task.label]
                assert len(set(found)) == len(found), doc
                assert 0 <= int(asked.doc_to_target(doc)) < len(found)
